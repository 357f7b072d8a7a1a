"""Signature of a run's record. It proves that this user started the run, so that the paths in the record can be
trusted.

The key is a file in keifu's settings folder. A run from another machine has no valid signature: the user must name its
paths again.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from keifu.folders import cache, config

KEY = "signing-key"  # file in the settings folder; earlier versions: in the cache
BYTES = 32
SIGNED = ("name", "options", "place")  # signed entries of the record


def sign(record: Mapping[str, Any]) -> str | None:
    """Return the signature of a run's record; None if the key cannot be stored."""
    with suppress(OSError):
        return _signature(record, _key())
    return None


def is_signed(record: Mapping[str, Any]) -> bool:
    """Return whether the record has a signature by this user's key."""
    signature = record.get("signature")
    with suppress(OSError):
        return isinstance(signature, str) and hmac.compare_digest(
            signature.encode(), _signature(record, _key()).encode()
        )
    return False


def _signature(record: Mapping[str, Any], key: bytes) -> str:
    content = json.dumps([record.get(name) for name in SIGNED], sort_keys=True, default=str)
    return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """Read the key, or create it at first use: in the settings folder, or in the cache if that folder cannot be
    written.
    """
    earlier = cache() / KEY
    with suppress(OSError):
        return _read_or_make(config() / KEY, earlier.read_bytes() if earlier.is_file() else os.urandom(BYTES))
    return _read_or_make(earlier, os.urandom(BYTES))


def _read_or_make(path: Path, new: bytes) -> bytes:
    """Return the key in the file `path`, which only this user can read. If there is none, write `new`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(new)
    key = path.read_bytes()
    if len(key) != BYTES:
        raise OSError(f"{path} is not a key")
    return key

"""Debian packages as archives: fetched by apt-get without being installed, and read member by member; knows no data.

A .deb file is an ar archive of a version, the package's control files, and its content as data.tar with a compression.
"""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from keifu.errors import UserError

AR_MAGIC = b"!<arch>\n"


def download(package: str, version: str, file: str, folder: Path, given: Path) -> Path:
    """Lets apt-get fetch the file of a package at an exact version into `folder`; nothing is installed.

    Where that gives no file, the `UserError` names the other way: the file, put into the folder `given`.
    """
    elsewhere = f"fetch {file} on a Debian machine with `apt-get download {package}` and put it into {given}."
    if not shutil.which("apt-get"):
        raise UserError(f"{package} is a Debian package, and this machine has no apt-get to fetch it with: {elsewhere}")
    command = ["apt-get", "download", "-q", f"{package}={version}"]
    apt = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    fetched = next((path for path in folder.glob("*.deb") if path.is_file()), None)
    if apt.returncode or fetched is None:
        complaints = [line for line in apt.stderr.splitlines() if line.startswith("E:")] or ["apt-get said nothing"]
        if "No space left on device" in apt.stderr:
            raise UserError(f"The disk is full: nothing of {file} was kept; free some space.")
        reason = complaints[0].removeprefix("E:").strip().rstrip(".")
        tried = f"`apt-get download {package}={version}` gave no file: {reason}."
        raise UserError(f"{tried} Run `apt-get update` and try again; or {elsewhere}")
    return fetched


def contents(file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each plain file in the package, one after the other; names begin with "./"."""
    with tarfile.open(fileobj=io.BytesIO(_data(file)), mode="r:*") as archive:
        for member in archive:
            if content := archive.extractfile(member) if member.isfile() else None:
                yield member.name, content


def _data(file: Path) -> bytes:
    """The bytes of data.tar, compressed as they are."""
    with file.open("rb") as archive:
        if archive.read(len(AR_MAGIC)) == AR_MAGIC:
            # 60 bytes before each member: its name in 16, its size in decimal digits from byte 48 on; sizes are even.
            while len(header := archive.read(60)) == 60:
                size = int(header[48:58])
                if header.startswith(b"data.tar"):
                    return archive.read(size)
                archive.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{file.name} is no Debian package: it holds no data.tar.")

"""Facts of the current request: its id, its size, and values for the access log."""

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

PROTOCOLS = {"/v1/messages": "anthropic", "/api/": "ollama"}  # by the beginning of a path
ID = re.compile(r"[\w.:-]{1,64}")


@dataclass
class Facts:
    """Facts of one request. strict: whether fields without effect are refused. ignored: names of such fields in the
    request.

    protocol: service whose form errors have. size: bytes of the body so far. reason: error message for the log, without
    values sent by the client.
    """

    id: str = "none"
    strict: bool = True
    ignored: list[str] = field(default_factory=list)
    protocol: str = "openai"
    size: int = 0
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reason: str = ""


_CURRENT: ContextVar[Facts] = ContextVar("keifu_request")


def begin(sent: str, strict: bool, path: str = "") -> Facts:
    """Create the facts of a new request, which `current` then returns.

    Args:
        sent: the client's request id. If it is empty or has signs other than letters, digits and ".:-_", one is made.
        strict: see `Facts`.
        path: of the request, which decides about the protocol.
    """
    protocol = next((name for start, name in PROTOCOLS.items() if path.startswith(start)), "openai")
    facts = Facts(sent if ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}", strict, protocol=protocol)
    _CURRENT.set(facts)
    return facts


def current() -> Facts:
    """Return the facts of the current request; outside of a request, unused facts."""
    return _CURRENT.get(None) or Facts()

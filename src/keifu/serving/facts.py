"""Facts of the request that is being answered: its id, its size, and the values for the access log."""

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

ID = re.compile(r"[\w.:-]{1,64}")


@dataclass
class Facts:
    """Facts of one request. strict: whether fields that nothing heeds are refused. ignored: those that were sent.

    size: bytes of the body so far. reason: the error that was answered, without the values that the client sent.
    """

    id: str = "none"
    strict: bool = True
    ignored: list[str] = field(default_factory=list)
    size: int = 0
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reason: str = ""


_CURRENT: ContextVar[Facts] = ContextVar("keifu_request")


def begin(sent: str, strict: bool) -> Facts:
    """Return the facts of a new request, which `current` gives from now on.

    Args:
        sent: the id that the client chose; another is made if it is empty or has other signs than letters and ".:-_".
        strict: see `Facts`.
    """
    facts = Facts(sent if ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}", strict)
    _CURRENT.set(facts)
    return facts


def current() -> Facts:
    """Return the facts of the request that is being answered; outside of one, facts that nobody reads."""
    return _CURRENT.get(None) or Facts()

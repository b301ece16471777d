"""Remove passwords, tokens and control characters from texts that people see and logs keep."""

import logging
import re
from typing import Any

HIDDEN = "***"

# The text between `://` and the last `@` of a URL: a user and a password, or a token alone. SQLAlchemy accepts a
# password with a raw slash in it, so after a colon that begins no port all text up to the `@` counts.
_USER = re.compile(r"(?<=://)(?:[^\s/@?#'\"<>]*:(?!\d+(?:/|$))[^\s'\"<>]*|[^\s/?#'\"<>]*)@")
_QUERY = re.compile(
    r"(?i)(?<=[?&;])([\w.\-]*(?:token|key|secret|pass|pwd|sig|auth|cred|session)[\w.\-]*=)[^&;#\s'\"<>]+"
)

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def redacted(text: str) -> str:
    """Return a text without the passwords of the URLs in it.

    The part of a URL before its `@` becomes `***`, and so does the value of a query parameter whose name says that it
    is a secret (`token`, `sig`, `api_key`, ...).
    """
    if "://" in text:
        text = _USER.sub(f"{HIDDEN}@", text)
    return _QUERY.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def visible(text: str) -> str:
    """Return a text with control characters, which a terminal would obey, as `\\x1b`; line breaks and tabs are kept.

    The names of tensors, tokens and files come from models of unknown authors.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def printable(text: str) -> str:
    """At most 500 characters of a text, with `?` for everything but printable ASCII."""
    return re.sub(r"[^ -~]", "?", text)[:500]


def redact_logs() -> None:
    """Remove passwords and control characters from all that this process logs from now on, by any library."""
    made = logging.getLogRecordFactory()
    if getattr(made, "redacts", False):
        return

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        return _clean(made(*args, **kwargs))

    factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)


def _clean(record: logging.LogRecord) -> logging.LogRecord:
    try:
        said = record.getMessage()
    except Exception:  # the arguments do not fit the message: logging itself reports that
        return record
    if (clean := visible(redacted(said))) != said:
        record.msg, record.args = clean, ()
    if record.exc_info and record.exc_info[0]:
        trace = logging.Formatter().formatException(record.exc_info)
        if (clean := visible(redacted(trace))) != trace:
            record.exc_text = clean  # formatters take this text instead of formatting the exception
    return record

"""What the Hub client's errors mean to a user, and which of them may go away by themselves."""

import errno
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from lewis.errors import InputError, LewisError, TransientError

# All that a call of the client may raise.
CLIENT_ERRORS = (OSError, ValueError, httpx2.HTTPError, httpx2.InvalidURL, SafetensorsParsingError)


def explain(ref: str, error: Exception, endpoint: str) -> LewisError:
    """Return the error to raise instead of one of CLIENT_ERRORS. It quotes no HTTP header, since one has the token."""
    # The client may raise "not in the local cache" with the server's answer as its cause; the answer says more.
    error = next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), error)
    server = urlsplit(endpoint).netloc.rpartition("@")[2]
    match error:
        case HfHubHTTPError():
            return _explain_answer(ref, error, server)
        case OfflineModeIsEnabled():
            return InputError(f"{ref}: HF_HUB_OFFLINE is set, and this is not in the cache; unset it to download")
        case SafetensorsParsingError():
            return InputError(f"{ref}: not a safetensors file: {error}")
        case HFValidationError() | httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return InputError(f"{ref}: cannot ask '{endpoint}' for it ({error}); check the name and HF_ENDPOINT")
        case OSError() if error.errno and not _is_broken_transfer(error):
            place = error.filename or "the cache"
            return LewisError(f"{ref}: cannot write {place}: {error.strerror}; free space, or set HF_HOME elsewhere")
    return TransientError(f"{ref}: {server} is unreachable, or the transfer broke ({type(error).__name__}); try again")


def asked_wait(error: BaseException) -> float | None:
    """Return the seconds that a busy Hub (429 or 503) asks to wait (`Retry-After`), at least 1; None if it asks none.

    The header may name a time, which is already past by a local clock that is ahead of the Hub's.
    """
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError) and each.response.status_code in (429, 503):
            text = each.response.headers.get("Retry-After", "")
            if text.isdecimal() and len(text) < 10:
                return max(1.0, float(text))
            with suppress(ValueError):
                return max(1.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def was_reset(error: BaseException) -> bool:
    """Whether a connection broke off in a way that the client does not resume itself."""
    return any(isinstance(each, httpx2.ReadError | httpx2.WriteError) for each in _chain(error))


def retryable(error: BaseException) -> bool:
    """Whether running again can help: yes for a busy or unreachable server, and for a broken transfer."""
    chain = list(_chain(error))
    if any(isinstance(e, InputError | OfflineModeIsEnabled) for e in chain):
        return False
    for e in chain:
        if isinstance(e, LewisError):
            return isinstance(e, TransientError)
        status = getattr(getattr(e, "response", None), "status_code", None)
        if isinstance(status, int):
            return _heals(status)
    return any(_is_broken_transfer(e) for e in chain)


def _explain_answer(ref: str, error: HfHubHTTPError, server: str) -> LewisError:
    status, token = error.response.status_code, get_token()
    if isinstance(error, GatedRepoError) and token:
        return InputError(f"{ref}: gated, and your HF_TOKEN has not been granted access; ask for it on its page")
    if isinstance(error, GatedRepoError):
        return InputError(f"{ref}: gated; accept its conditions on its page at {server}, then set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{ref}: the repo has no such revision; expected a branch, a tag or a full commit")
    if isinstance(error, RepositoryNotFoundError) and token:
        return InputError(f"{ref}: no such repo at {server}, or your HF_TOKEN may not see it; check the spelling")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{ref}: no such repo at {server}, or a private one; check the spelling, or set HF_TOKEN")
    if status == 401:
        advice = "was refused as invalid or expired; make a new one" if token else "is needed; set it"
        return InputError(f"{ref}: HF_TOKEN {advice} (401 from {server})")
    if status == 403:
        return InputError(f"{ref}: {server} forbids it (403); give HF_TOKEN the permission to read this repo")
    if _heals(status) or status == 404:  # 404 for a file that the commit lists: the mirror is not up to date
        return TransientError(f"{ref}: {server} answered {status}; try again later")
    return InputError(f"{ref}: {server} answered {status}; check the name and HF_ENDPOINT")


def _heals(status: int) -> bool:
    """Whether an HTTP status may go away by itself."""
    return status in (408, 429) or status >= 500


def _is_broken_transfer(error: BaseException) -> bool:
    if isinstance(error, httpx2.TransportError | ConnectionError | LocalEntryNotFoundError):
        return True
    unreachable = (errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH)
    return isinstance(error, OSError) and (error.errno in unreachable or "Consistency check failed" in str(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, also those that `from None` hides, as `datasets` does with the Hub's answers."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__

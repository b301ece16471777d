"""Calls of the Hub's client: its endpoint and cache, repeated calls, and its errors as ours.

huggingface_hub reads the environment variables only when it is imported; here they are read at each call.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from huggingface_hub import constants

from lewis import private_names
from lewis.errors import InputError
from lewis.models.hub.pin import FORMS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
T = TypeVar("T")
_AGAIN, _LONGEST = 3, 300.0
_PIECE = 1 << 20  # bytes of a download that are lost at most when it breaks off


def endpoint() -> str:
    """Return the URL of the Hub, by HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def cache_folder() -> Path:
    """Return the folder where the Hub's client keeps what it downloads."""
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("HF_HUB_CACHE") or (f"{home}/hub" if home else constants.HF_HUB_CACHE)
    return Path(cache).expanduser().absolute()


def offline() -> bool:
    """Whether the Hub must not be asked (HF_HUB_OFFLINE)."""
    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def api() -> HfApi:
    """Return a client of the Hub at HF_ENDPOINT, with the user's token.

    Raises:
        InputError: if the token holds characters that no token has.
    """
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[!-~]*", get_token() or ""):
        # The HTTP library would quote the whole header, with the token, in its error.
        raise InputError("HF_TOKEN holds characters that no token has (a space, a line break?); copy it again")
    return HfApi(endpoint=endpoint())


def snapshot(source: str, commit: str) -> Path:
    """Return the folder where the Hub's client keeps the files of one commit of a model repo."""
    return cache_folder() / f"models--{source.replace('/', '--')}" / "snapshots" / commit


def check_repo_id(ref: str, source: str) -> None:
    """Check that `source` has the form of a Hub repo's name, `org/name`.

    Args:
        ref: the reference that it is a part of, for the error message.
        source: the name.

    Raises:
        InputError: if it does not have this form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(source)
        if "/" in source:
            return
    raise InputError(f"{ref}: neither a Hub repo's name nor an existing folder; {FORMS}")


@contextmanager
def without_xet() -> Iterator[None]:
    """Make all threads of this process use LFS instead of Xet for transfers, while the block lasts."""
    with private_names.HUB_WITHOUT_XET.replaced(True):
        yield


def ask(ref: str, question: Callable[[], T]) -> T:
    """Call the Hub's client; call it again after a connection reset, or after the wait that a busy Hub asks for.

    Args:
        ref: what is asked for, for messages.
        question: a call of the client. It is repeated at most `_AGAIN` times after resets, which the client does not
            handle itself, and after waits of at most `_LONGEST` seconds in all.

    Raises:
        InputError, TransientError, LewisError: what `lewis.models.hub.errors.explain` makes of the client's errors.
    """
    with errors(ref):
        return repeated(ref, question)


def repeated(ref: str, question: Callable[[], T], *, after_reset: bool = True) -> T:
    """Call the Hub's client as `ask` does, but raise the client's own errors.

    Args:
        ref: what is asked for, for messages.
        question: a call of the client.
        after_reset: whether to repeat the call after a reset, when it is unknown whether the Hub has executed it.
    """
    from lewis.models.hub.errors import was_reset

    return _repeated(ref, question, was_reset if after_reset else lambda _: False)


@functools.cache
def resume_downloads() -> None:
    """Make downloads of this process resume where they broke off; they fail after `_AGAIN` tries without a new byte.

    The client itself resumes after some kinds of breaks only. After a reset, an error 5xx, or an answer that ends
    early, it removes the partial file; and each break loses all of the piece that has not arrived whole.
    """
    from lewis.models.hub.errors import retryable

    once = private_names.HUB_GET.get()

    @functools.wraps(once)
    def get(url: str, temp_file: BinaryIO, **options: Any) -> None:
        if "_nb_retries" in options:  # the client retries in its `except` block: raise its error for `again` instead
            raise
        begin = temp_file.tell()

        def done() -> int:
            return temp_file.tell() - begin

        def again(error: BaseException) -> bool:
            return retryable(error) and done() < (options.get("expected_size") or math.inf)

        name = options.get("displayed_filename") or url.rpartition("/")[2]
        _repeated(name, lambda: once(url, temp_file, **{**options, "resume_size": done()}), again, done)

    private_names.HUB_GET.put(get)
    private_names.HUB_PIECE.put(_PIECE)


def _repeated(
    what: str, question: Callable[[], T], again: Callable[[BaseException], bool], done: Callable[[], int] = lambda: 0
) -> T:
    """Repeat a call of the client after errors for which `again` is true, while it makes progress or has tries left.

    Args:
        what: the name of what is asked for, for the log.
        question: the call.
        again: whether an error may go away.
        done: how far the call came. Progress since the last error resets the counts of tries and waits.

    Raises:
        Exception: the last one of the client.
    """
    from lewis.models.hub.errors import CLIENT_ERRORS, asked_wait

    tries, waited, before = 0, 0.0, done()
    while True:
        try:
            return question()
        except CLIENT_ERRORS as error:
            if done() > before:
                tries, waited, before = 0, 0.0, done()
            wait = asked_wait(error)
            if wait is not None and waited + wait <= _LONGEST:
                waited += wait
            elif tries < _AGAIN and again(error):
                tries, wait = tries + 1, 1.0
            else:
                raise
            logger.warning("%s: %s; asking again in %.0f s", what, type(error).__name__, wait)
            time.sleep(wait)


@contextmanager
def errors(ref: str) -> Iterator[None]:
    """Turn what the client raises in this block into our errors, by `lewis.models.hub.errors.explain`."""
    from lewis.models.hub.errors import CLIENT_ERRORS, explain

    try:
        yield
    except InputError:
        raise
    except CLIENT_ERRORS as error:
        raise explain(ref, error, endpoint()) from error

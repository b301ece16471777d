"""Secrets in the store: each is made when it is first needed, in a file that only its owner may read."""

import secrets
from pathlib import Path

from lewis import store
from lewis.errors import InputError


def path(name: str) -> Path:
    """Where the secret of a name is, whether or not it exists."""
    return store.home() / name


def read_or_make(name: str, fix: str, prefix: str = "") -> str:
    """The secret of a name; made when it is missing.

    Args:
        name: of its file in the store.
        fix: what to do about a file that cannot be used, for the error message.
        prefix: what a new secret begins with.

    Raises:
        InputError: if others may read the file, or it is empty.
    """
    file = path(name)
    with store.lock(name):
        if not file.exists():
            with store.written_beside(file) as beside:
                beside.touch(mode=0o600)
                beside.write_text(f"{prefix}{secrets.token_urlsafe(32)}\n")
    if file.stat().st_mode & 0o077:
        raise InputError(f"{file}: others may read it: expected mode 0600; {fix}")
    found = file.read_text().strip()
    if not found:
        raise InputError(f"{file}: it is empty; {fix}")
    return found

"""The secret that the Hub sends with each delivery."""

import os
import secrets

from lewis import store
from lewis.errors import InputError


def webhook_secret() -> str:
    """The secret that the Hub must send: `LEWIS_WEBHOOK_SECRET`, or the store's `webhook-secret`, made when missing.

    Raises:
        InputError: if others may read the file, or it is empty.
    """
    given = os.environ.get("LEWIS_WEBHOOK_SECRET", "").strip()
    if given:
        return given
    path = store.home() / "webhook-secret"
    with store.lock("webhook-secret"):
        if not path.exists():
            with store.written_beside(path) as beside:
                beside.touch(mode=0o600)
                beside.write_text(secrets.token_urlsafe(32) + "\n")
    if path.stat().st_mode & 0o077:
        raise InputError(f"{path}: others may read it: expected mode 0600; remove it, and tell the Hub the new secret")
    found = path.read_text().strip()
    if not found:
        raise InputError(f"{path}: it is empty; remove it, and tell the Hub the new secret")
    return found

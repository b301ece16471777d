"""The secret that the Hub sends with each delivery."""

import os
from pathlib import Path

from lewis_flows.service import secret_file

_NAME = "webhook-secret"


def path() -> Path:
    """The file of the secret."""
    return secret_file.path(_NAME)


def webhook_secret() -> str:
    """The secret that the Hub must send: `LEWIS_WEBHOOK_SECRET`, or the store's `webhook-secret`, made when missing.

    Raises:
        InputError: if others may read the file, or it is empty.
    """
    given = os.environ.get("LEWIS_WEBHOOK_SECRET", "").strip()
    return given or secret_file.read_or_make(_NAME, "remove it, and tell the Hub the new secret")

"""Whether the receiver can do its work: it needs the Prefect server, the key to it, and the folder of recipes."""

import base64
import logging
import threading
import time

import httpx
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

from lewis.errors import LewisError
from lewis.redact import printable, redacted
from lewis_flows import recipes_folder

logger = logging.getLogger("lewis.webhook")
KEPT = 5.0  # seconds for which an answer is given again, so that whoever asks often causes no load
_TIMEOUT = 4.0


class Readiness:
    """What is missing; threads may share it."""

    def __init__(self) -> None:
        self._lock, self._until, self._missing = threading.Lock(), 0.0, list[str]()

    def missing(self) -> list[str]:
        """The names of what does not work: `prefect`, `recipes`. Why is in the log, as anyone may ask."""
        with self._lock:
            if time.monotonic() >= self._until:
                before, found = self._missing, {"prefect": _prefect(), "recipes": _recipes()}
                self._missing = [name for name, why in found.items() if why]
                self._until = time.monotonic() + KEPT
                if self._missing != before:
                    told = "; ".join(f"{name}: {found[name]}" for name in self._missing)
                    logger.log(logging.WARNING if told else logging.INFO, "%s", printable(told or "ready"))
            return list(self._missing)


def _prefect() -> str:
    """What is wrong with the Prefect server; empty if it answers and takes the key."""
    secret = PREFECT_API_AUTH_STRING.value() or ""
    headers = {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"} if secret else {}
    try:
        status = httpx.get(f"{PREFECT_API_URL.value()}/admin/version", headers=headers, timeout=_TIMEOUT).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return redacted(f"{PREFECT_API_URL.value()} does not answer ({type(error).__name__})")
    if status == httpx.codes.UNAUTHORIZED:
        return "it refuses the key: set PREFECT_API_AUTH_STRING"
    return "" if status == httpx.codes.OK else f"it answers with status {status}"


def _recipes() -> str:
    """What is wrong with the folder of recipes; empty if it can be read."""
    try:
        recipes_folder.folder()
        recipes_folder.signature()
    except (LewisError, OSError) as error:
        return str(error)
    return ""

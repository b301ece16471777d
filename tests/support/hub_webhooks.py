"""How the local Hub tells others of pushes: the payload of the real one (version 3), and its delivery."""

import hashlib
import json
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from tests.support.hub_storage import Repo


class Webhook(NamedTuple):
    """Whom the Hub tells."""

    url: str
    secret: str | None = None


class Delivered(NamedTuple):
    """A delivery that is over: the last answer's status (None if nothing answered) and text."""

    url: str
    payload: dict[str, Any]
    attempts: int
    status: int | None
    answer: str


def payload(
    server: str, repo_type: str, name: str, repo: Repo, event: dict[str, str], ref: dict[str, Any] | None
) -> dict[str, Any]:
    """What a delivery says.

    Args:
        server: URL of the Hub.
        event: `action` and `scope`.
        ref: the branch or tag that moved, with its old and new commit.
    """
    folder = "" if repo_type == "model" else f"{repo_type}s/"
    about = {
        "type": repo_type,
        "name": name,
        "id": _object_id(f"{repo_type} {name}"),
        "private": repo.private,
        "url": {"web": f"{server}/{folder}{name}", "api": f"{server}/api/{repo_type}s/{name}"},
        "headSha": repo.branches.get("main"),
        "tags": [],
        "owner": {"id": _object_id(name.partition("/")[0])},
    }
    webhook = {"id": _object_id("webhook"), "version": 3}
    return {"event": event, "repo": about, "webhook": webhook, **({"updatedRefs": [ref]} if ref else {})}


def deliver(webhook: Webhook, payload: dict[str, Any], attempts: int = 5) -> Delivered:
    """Send it, a few times if the receiver is away or answers 5xx."""
    headers = {"Content-Type": "application/json", "User-Agent": "HuggingFace-Webhook"}
    headers |= {"X-Webhook-Secret": webhook.secret} if webhook.secret is not None else {}
    request = urllib.request.Request(webhook.url, json.dumps(payload).encode(), headers)
    for attempt in range(1, attempts + 1):
        status, answer = _send(request)
        if status is not None and status < 500:
            break
        if attempt < attempts:
            time.sleep(0.2 * 2**attempt)
    return Delivered(webhook.url, payload, attempt, status, answer)


def _send(request: urllib.request.Request) -> tuple[int | None, str]:
    try:
        with urllib.request.urlopen(request, timeout=15) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return None, str(error)


def _object_id(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:24]

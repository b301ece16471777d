"""The event that a new release is, which starts the merges: the poll and the webhook both announce it here."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import quote

from lewis.errors import InputError, LewisError, TransientError
from lewis.models.pin import find_folder
from lewis.models.source import split_adapter
from lewis.recipe.recipe import Recipe

EVENT = "lewis.expert.released"

_PATIENCE = 10.0  # seconds for one request; who calls is expected to try again, so the client need not


def announce(recipe: str, ref: str, repo: str, old: str | None, new: str) -> str:
    """Give Prefect the event, and return only when its server took it.

    The resource is `lewis.expert.<repo>`. Its label `lewis.recipe` lets a trigger collect the events of each recipe by
    itself: two recipes that share an expert get two events about one resource.

    Args:
        recipe: its name in the folder of recipes.
        ref: the model as the recipe writes it.
        repo: `org/name`, or the path of a local folder.
        old: the commit before, if it is known.
        new: the commit released.

    Returns:
        The event's id, a UUID.

    Raises:
        TransientError: the server is unreachable or busy.
        LewisError: the server refuses it.
        InputError: there is no server to ask.
    """
    event: dict[str, object] = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": EVENT,
        "resource": {"prefect.resource.id": resource_id(repo), "prefect.resource.name": repo, "lewis.recipe": recipe},
        "payload": {"recipe": recipe, "ref": ref, "repo": repo, "old": old, "new": new},
    }
    _post(event)
    return str(event["id"])


def resource_id(repo: str) -> str:
    """The resource that events about a repo or folder name: `lewis.expert.org/name`, odd characters quoted."""
    return f"lewis.expert.{quote(repo, safe='/')}"


def hub_repos(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The Hub repos whose main branch the recipe's base and experts follow: pairs of `org/name` and reference.

    A repo pinned to a commit, a tag or another branch is not followed. Of `base+adapter`, both are.
    """
    refs = [recipe.base_model, *(entry.model for entry in recipe.models)]
    for ref in dict.fromkeys(ref for ref in refs if ref):
        for part in filter(None, split_adapter(ref, recipe.root)):
            repo, _, revision = part.partition("@")
            if revision in ("", "main") and repo.count("/") == 1 and not _is_folder(part, recipe):
                yield repo, ref


def _is_folder(ref: str, recipe: Recipe) -> bool:
    try:
        return find_folder(ref, recipe.root) is not None
    except InputError:  # it can only mean a folder, which is not there now
        return True


def _post(event: dict[str, object]) -> None:
    # Prefect's own emit_event hands the event to a thread and forgets it: it could be lost without a word.
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = PREFECT_API_URL.value()
    if not url:
        raise InputError("PREFECT_API_URL is not set: there is no server to tell of a release; start `lewis up`")
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": _PATIENCE}) as client,
        ):
            client.request("POST", "/events", json=[event])
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise LewisError(
                f"Prefect refuses the event ({status}): check PREFECT_API_AUTH_STRING or its key"
            ) from None
        kind = TransientError if status >= 500 or status in (408, 429) else LewisError
        raise kind(f"Prefect did not take the event: it answered {status}; look at its server's log") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TransientError(f"Prefect did not take the event ({type(error).__name__}); is its server up?") from None

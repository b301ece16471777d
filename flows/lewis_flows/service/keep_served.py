"""Keep champions in service: a restarted server gets its model back, and no move of a champion is missed."""

import logging

from prefect.client.orchestration import SyncPrefectClient, get_client

from lewis.errors import TransientError
from lewis.recipe.recipe import Recipe
from lewis.serving import hub, service
from lewis_flows import prefect_runs, recipes_folder, secret_blocks
from lewis_tasks.support import events

logger = logging.getLogger("lewis.served")
EVERY = 60.0  # seconds between two calls of `look`


def look() -> list[str]:
    """Start `serve/<recipe>` of each recipe with a target that lacks the champion; return the names of these recipes.

    A version that a target has refused is not tried again, nor are the targets after it given that version; one that
    failed because a server was down is tried again after a while.

    Raises:
        TransientError: if MLflow does not answer.
        httpx.HTTPError: if Prefect does not answer.
    """
    plans = {name: plan for name in recipes_folder.names() if (plan := _plan(name))}
    if not plans:
        return []
    secret_blocks.load_for_serving()
    due = [name for name, plan in plans.items() if _lacks(name, plan)]
    with get_client(sync_client=True) as client:
        return [name for name in due if _start(client, name)]


def _plan(name: str) -> Recipe | None:
    """Return a recipe that has targets; None if it has none, or if its file is wrong, which is reported elsewhere."""
    try:
        plan = recipes_folder.load(name)
    except Exception:  # of any kind, as in `recipes_folder.load_all`
        return None
    return plan if hub.targets(plan) else None


def _lacks(name: str, plan: Recipe) -> bool:
    """Whether a target of a recipe lacks the champion; False, with a warning, if that cannot be found out."""
    try:
        if (champion := service.champion_of(plan)) is None:
            return False
        return service.is_due(hub.targets(plan), champion, service.owner_of(plan))
    except TransientError:  # MLflow does not answer
        raise
    except Exception as error:  # whatever is wrong with one recipe's targets does not stop the others
        logger.warning("%s: its targets are left out: %s: %s", name, type(error).__name__, error)
        return False


def _start(client: SyncPrefectClient, name: str) -> bool:
    """Start the deployment `serve/<name>`, unless it is missing or paused, or one of its runs goes on or waits."""
    deployment = prefect_runs.deployment(client, f"{prefect_runs.SERVE}/{name}")
    if deployment is None or deployment.paused:  # `Follower` will create it, somebody will resume it
        return False
    open_, same = ("SCHEDULED", *prefect_runs.UNFINISHED), {"any_": [deployment.id]}
    runs, now = prefect_runs.of_flows(client, (prefect_runs.SERVE,), open_, deployment_id=same), events.now(client)
    if any(prefect_runs.waits(run, now) for run in runs):
        return False
    logger.info("%s: a target has not the champion; serving it again", name)
    prefect_runs.start(client, deployment.id)
    return True

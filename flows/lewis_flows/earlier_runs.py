"""Facts from earlier runs of a recipe: which of its texts was merged last, which commits are broken on the Hub itself.

An edit of a recipe counts as a release: it starts a merge when the file is deployed. From the merged texts the poll
finds an edit whose run merged nothing, one made while the deployment was paused, and a recipe that was never merged.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from lewis import store
from lewis.models.source import commits_of
from lewis.recipe.recipe import Recipe
from lewis_flows import approval, prefect_runs
from lewis_flows.release_event import SETTLE
from lewis_tasks.support.flow_run import BROKEN, EDITED, MODEL, RECIPE, did_its_work, tagged


def start_of_edit(client: SyncPrefectClient, deployment: UUID) -> None:
    """Start the run of an edit of a recipe; it begins after `SETTLE`, as that of a release."""
    prefect_runs.start(client, deployment, SETTLE, [EDITED])


def edited(client: SyncPrefectClient, deployment: DeploymentResponse) -> datetime | None:
    """Return when the last run was created that an edit to the deployed text started; None if there was none."""
    wanted = {"deployment_id": {"any_": [deployment.id]}, "tags": {"all_": [EDITED]}}
    newest = FlowRunSort.EXPECTED_START_TIME_DESC
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted), sort=newest, limit=1)
    return next((run.created for run in runs if run.deployment_version == deployment.version), None)


def merged(client: SyncPrefectClient, recipes: Iterable[str]) -> dict[str, str]:
    """Return, for each recipe, the digest of its text that was merged last; empty if no run merged any."""
    found = _texts(client)
    return {name: found.get(name) or _texts(client, f"recipe:{name}").get(name, "") for name in recipes}


def is_unmerged(recipe: Recipe, merged: Mapping[str, str]) -> bool:
    """Whether a recipe's text is not the one that was merged last; `merged` is the result of that function."""
    return merged[recipe.name] != store.digest(recipe.text)


def still_broken(client: SyncPrefectClient, recipe: Recipe, commits: Iterable[str]) -> set[str]:
    """Return those of `commits` that a run of a recipe found broken on the Hub, so that another run would fail too.

    The finding of a run holds until the recipe is edited, which may exclude the broken part, or a later run merges the
    commit.

    Raises:
        httpx.HTTPError: if the server does not answer, or refuses.
    """
    text, merges = store.digest(recipe.text), (prefect_runs.MERGE,)
    tags = sorted(f"{BROKEN}:{commit}" for commit in commits)
    found: dict[str, datetime] = {}
    for run in prefect_runs.all_of_flows(client, merges, ("FAILED",), tags={"any_": tags}):
        if prefect_runs.recipe_of(run) == recipe.name and run.labels.get(RECIPE, text) == text and run.end_time:
            for commit in tagged(run, BROKEN):
                found.setdefault(commit, run.end_time)
    if not found:
        return set()
    of_recipe, since = {"all_": [f"recipe:{recipe.name}"]}, {"after_": min(found.values())}
    states = ("COMPLETED", "CANCELLED", "PAUSED")
    for run in prefect_runs.all_of_flows(client, merges, states, tags=of_recipe, start_time=since):
        keys = (str(key) for name, key in run.labels.items() if name.startswith(MODEL) and _merged_all(run))
        for commit in {commit for key in keys for commit in commits_of(key)}:
            if commit in found and run.start_time and run.start_time >= found[commit]:
                del found[commit]
    return set(found)


def _texts(client: SyncPrefectClient, *tags: str) -> dict[str, str]:
    """Return recipe -> digest of its merged text, as `merged`, from the newest runs that have all `tags`."""
    states, newest = (*prefect_runs.ENDED, "PAUSED"), FlowRunSort.START_TIME_DESC
    limits: dict[str, Any] = {"tags": {"all_": list(tags)}} if tags else {}
    found: dict[str, str] = {}
    for run in prefect_runs.of_flows(client, (prefect_runs.MERGE,), states, newest, **limits):
        if RECIPE in run.labels and _merged_all(run):
            found.setdefault(prefect_runs.recipe_of(run), str(run.labels[RECIPE]))
    return found


def _merged_all(run: FlowRun) -> bool:
    """Whether a run without overrides did its work, or got as far as to ask a person, whatever the answer was."""
    return bool(did_its_work(run) or approval.asked(run)) and not run.parameters.get("overrides")

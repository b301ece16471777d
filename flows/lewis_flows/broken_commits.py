"""Commits that a run found broken on the Hub itself: its recipe waits for others, for as long as that holds."""

from collections.abc import Iterable
from datetime import datetime

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from lewis import store
from lewis.models.source import commits_of
from lewis.recipe.recipe import Recipe
from lewis_flows import approval, prefect_runs
from lewis_tasks.support.flow_run import BROKEN, MODEL, RECIPE, did_its_work, tagged


def still_broken(client: SyncPrefectClient, recipe: Recipe, commits: Iterable[str]) -> set[str]:
    """Those of some commits that a run of a recipe found broken, so that no other run is of use.

    What a run found holds until the recipe is edited, which may exclude what is broken, or a later run merges the
    commit.

    Raises:
        httpx.HTTPError: if the server does not answer, or refuses.
    """
    text, newest, merges = store.digest(recipe.text), FlowRunSort.END_TIME_DESC, (prefect_runs.MERGE,)
    tags = sorted(f"{BROKEN}:{commit}" for commit in commits)
    found: dict[str, datetime] = {}
    for run in prefect_runs.all_of_flows(client, merges, ("FAILED",), newest, tags={"any_": tags}):
        if prefect_runs.recipe_of(run) == recipe.name and run.labels.get(RECIPE, text) == text and run.end_time:
            for commit in tagged(run, BROKEN):
                found.setdefault(commit, run.end_time)
    if not found:
        return set()
    of_recipe, since = {"all_": [f"recipe:{recipe.name}"]}, {"after_": min(found.values())}
    states = ("COMPLETED", "CANCELLED", "PAUSED")
    for run in prefect_runs.all_of_flows(client, merges, states, newest, tags=of_recipe, start_time=since):
        for commit in _merged(run):
            if commit in found and run.start_time and run.start_time >= found[commit]:
                del found[commit]
    return set(found)


def _merged(run: FlowRun) -> set[str]:
    """The commits that a run has merged as the recipe says; none if it did not come to its end."""
    if not (did_its_work(run) or approval.asked(run)) or run.parameters.get("overrides"):
        return set()
    keys = (str(key) for name, key in run.labels.items() if name.startswith(MODEL))
    return {commit for key in keys for commit in commits_of(key)}

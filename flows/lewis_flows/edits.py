"""Edits of recipes: each is a release of the recipe, which starts a merge when the file is deployed.

Prefect's runs say which text was merged last. So the poll finds an edit whose run came to nothing, or that was made
while the deployment was paused, and a recipe that no run has merged.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from lewis import store
from lewis.recipe.recipe import Recipe
from lewis_flows import approval, prefect_runs
from lewis_flows.release_event import SETTLE
from lewis_tasks.support.flow_run import EDITED, RECIPE, did_its_work


def start(client: SyncPrefectClient, deployment: UUID) -> None:
    """Start the run of an edit; it begins as long after it as after a release."""
    prefect_runs.start(client, deployment, SETTLE, [EDITED])


def merged(client: SyncPrefectClient, recipes: Iterable[str]) -> dict[str, str]:
    """Recipe -> digest of the text that its last run had, of the runs that did their work; empty if there is none."""
    found = _texts(client)
    return {name: found.get(name) or _texts(client, f"recipe:{name}").get(name, "") for name in recipes}


def _texts(client: SyncPrefectClient, *tags: str) -> dict[str, str]:
    """Recipe -> digest of a text, as `merged`, of the newest runs with some tags."""
    states, newest = (*prefect_runs.ENDED, "PAUSED"), FlowRunSort.START_TIME_DESC
    limits: dict[str, Any] = {"tags": {"all_": list(tags)}} if tags else {}
    found: dict[str, str] = {}
    for run in prefect_runs.of_flows(client, (prefect_runs.MERGE,), states, newest, **limits):
        done = did_its_work(run) or approval.asked(run)  # whatever became of the question
        if done and RECIPE in run.labels and not run.parameters.get("overrides"):
            found.setdefault(prefect_runs.recipe_of(run), str(run.labels[RECIPE]))
    return found


def is_unmerged(recipe: Recipe, merged: Mapping[str, str]) -> bool:
    """Whether no run has merged the text that a recipe has; `merged` is what the function gives."""
    return merged[recipe.name] != store.digest(recipe.text)


def started(client: SyncPrefectClient, deployment: DeploymentResponse) -> datetime | None:
    """When the last run began to wait that an edit to the deployed text started; None if there was none."""
    wanted = {"deployment_id": {"any_": [deployment.id]}, "tags": {"all_": [EDITED]}}
    newest = FlowRunSort.EXPECTED_START_TIME_DESC
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted), sort=newest, limit=1)
    return next((run.created for run in runs if run.deployment_version == deployment.version), None)

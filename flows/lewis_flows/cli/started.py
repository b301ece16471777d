"""`lewis run NAME` while the service is up: a run of the recipe's deployment, followed to its end."""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse

from lewis.errors import InputError, LewisError, TransientError
from lewis.input_files import read_bytes
from lewis.recipe import yaml_text
from lewis_flows import json_logs, prefect_runs, recipes_folder
from lewis_flows.cli import runs
from lewis_flows.service.links import server
from lewis_tasks.support.flow_run import did_its_work

_PAUSE = 1.0  # seconds between two looks at a run that has not begun
_WAITS = {
    "AwaitingConcurrencySlot": "waits for its turn: another run of the recipe goes on",
    "Late": "no worker has taken it yet: has one time for it, and is its work pool or queue paused?",
}


def run(path: Path, overrides: Sequence[str]) -> FlowRun | None:
    """Start a run of the deployment of a recipe, and print its log on stderr until it ends or waits for a person.

    If the run is skipped, since another run merges the same, that other run is followed.

    Args:
        path: the recipe's file, in the folder of recipes.
        overrides: `key.path=value` each.

    Returns:
        The run that was followed last, as it ended. None if none was started, as the recipe has to run in this
        process: no worker is online, or the deployment is of another text, or does not allow the overrides.

    Raises:
        LewisError: if the run failed, died or was cancelled.
        TransientError: if the server does not answer.
        KeyboardInterrupt: saying that the run goes on.
    """
    started: FlowRun | None = None
    try:
        with server() as (client, _):
            if (deployment := _deployment(client, path, overrides)) is None:
                return None
            given = {"recipe": path.stem, **({"overrides": [*overrides]} if overrides else {})}
            started = client.create_flow_run_from_deployment(deployment.id, parameters=given)
            ended = _follow(client, started)
            while other := prefect_runs.replaced_by(ended):
                print(f"{ended.name}: skipped: {ended.state and ended.state.message}", file=sys.stderr, flush=True)
                started = client.read_flow_run(other)
                ended = _follow(client, started)
    except (TransientError, KeyboardInterrupt) as error:
        if started is None:
            raise
        goes_on = (
            f"the run goes on: `lewis logs {quote(path.stem)} --follow` shows it, `lewis cancel {started.id}` ends it"
        )
        raise type(error)(f"{error}; {goes_on}" if str(error) else goes_on) from error
    state = ended.state
    if state is None or not (did_its_work(ended) or state.is_paused()):
        raise LewisError(f"{ended.name}: {ended.state_name}: {(state and state.message) or 'no reason is given'}")
    return ended


def _deployment(client: SyncPrefectClient, path: Path, overrides: Sequence[str]) -> DeploymentResponse | None:
    """Find the deployment of this text of a recipe; None without one, without a worker, or with refused overrides."""
    found = prefect_runs.deployment(client, f"{prefect_runs.MERGE}/{path.stem}")
    text = read_bytes(path, yaml_text.MAX_BYTES)
    if found is None or not found.work_pool_name or found.version != recipes_folder.version(text):
        return None
    try:
        recipes_folder.load_for_deployment(path, overrides)
    except InputError:
        return None
    workers = client.read_workers_for_work_pool(found.work_pool_name)
    return found if any(each.status == WorkerStatus.ONLINE for each in workers) else None


def _follow(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Print what a run waits for, then its log, until it ends or waits for a person; return the run as it is then."""
    _wait(client, run)
    as_json = json_logs.is_json()
    return runs.print_log(client, run.id, logging.INFO, follow=True, as_json=as_json, file=sys.stderr)


def _wait(client: SyncPrefectClient, run: FlowRun) -> None:
    """Wait until a run begins or ends, and say what it waits for."""
    shown = ""
    while (run := client.read_flow_run(run.id)).state and (run.state.is_scheduled() or run.state.is_pending()):
        if run.state_name != shown:
            shown = str(run.state_name)
            print(f"{run.name}: {_WAITS.get(shown, shown)}", file=sys.stderr, flush=True)
        time.sleep(_PAUSE)

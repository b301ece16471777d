"""Put work pool, device limit, deployments and automations on a Prefect server, and keep them up to date."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import tzlocal
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation import work_queue
from lewis.input_files import read_bytes
from lewis.recipe import yaml_text
from lewis_flows import environment, polls, prefect_runs, recipes_folder
from lewis_flows.service import orphaned_runs, schedules, worker
from lewis_flows.service.automations import put_automations
from lewis_flows.turn import crash_dead_runs
from lewis_tasks.support import moves
from lewis_tasks.support.device_slot import LIMIT, slots

POOL = work_queue.MERGES
PREFECT_YAML = recipes_folder.SHIPPED.resolve() / "prefect.yaml"
JOB = {k: v for k, v in environment.DEFAULTS.items() if not k.startswith(("PREFECT_SERVER_", "PREFECT_WORKER_"))}
TEMPLATE: dict[str, Any] = {
    # For a worker that was not started by `lewis up`: no telemetry, and the heartbeat that `lewis-dead-runs` waits for.
    "job_configuration": {"env": JOB, "stream_output": True},
    # Who starts a run may choose its parameters, and nothing of its process: no command, environment or folder.
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
"""The base job template of a work pool of processes."""


def deploy(file: Path = PREFECT_YAML, recipes: Sequence[str] | None = None) -> list[str]:
    """Create or update the pool, the limit, the deployments of `file` and the automations.

    Where `LEWIS_EVALUATE_POOL` names a pool for evaluations, it is made too, and the deployment `evaluate` put into it.
    Where the recipes are in the store, their folder is made first if it is missing.

    Args:
        file: what to deploy.
        recipes: names of those that get a nightly schedule; by default, those in the folder that can run.

    Returns:
        The names of the recipes that have a nightly schedule now.

    Raises:
        InputError: if the file or the notification block is not there, or a setting is wrong.
        LewisError: if Prefect refuses a deployment.
    """
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; give the path of your prefect.yaml with --prefect-file, or leave it out"
        )
    recipes_folder.make()
    recipes = schedules.Folder().runnable() if recipes is None else list(recipes)
    with get_client(sync_client=True) as client:
        for pool in {POOL, work_queue.pool()}:
            _put_pool(client, pool)
        _create_limit(client)
        put_automations(client)
    content = yaml_text.load(read_bytes(file, yaml_text.MAX_BYTES), str(file))
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a mapping with `deployments`, got {type(content).__name__}")
    schedules.add_schedules(content, recipes)
    put_time_zone(content)
    for each in content.get("deployments") or []:
        if each.get("name") == prefect_runs.EVALUATE and work_queue.pool() != POOL:
            each["work_pool"] = {"name": work_queue.pool()}
    with store.scratch_folder("deploy") as scratch:
        complete = scratch / "prefect.yaml"
        complete.write_text(yaml.safe_dump(content, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(complete)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        # Check the output too: the command exits with 0 if it skips a file that it cannot read.
        if done.returncode or "successfully created" not in done.stdout:
            raise LewisError(f"{file}: prefect deploy refused it:\n{done.stdout}{done.stderr}")
    with get_client(sync_client=True) as client:
        schedules.remove_stale(client, content, recipes)
    return recipes


def put_time_zone(content: dict[str, Any]) -> None:
    """Give the cron schedules in the content of a `prefect.yaml` that name no time zone the one of this machine."""
    for each in content.get("deployments") or []:
        for schedule in each.get("schedules") or []:
            if "cron" in schedule:
                schedule.setdefault("timezone", tzlocal.get_localzone_name())


def _put_pool(client: SyncPrefectClient, name: str) -> None:
    """Create the work pool, or give a pool of processes that is there already our template."""
    try:
        pool = client.read_work_pool(name)
        if pool.type == "process" and pool.base_job_template != TEMPLATE:
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=TEMPLATE))
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=TEMPLATE))


def _create_limit(client: SyncPrefectClient) -> None:
    """Limit how many devices are busy at once, over all machines; a limit that exists stays as the user set it."""
    try:
        client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=slots()))


class Deployed:
    """Keeps the deployments equal to the folder of recipes, while `lewis up` runs."""

    def __init__(self, say: Callable[[str], None], prefect_file: Path | None = None) -> None:
        """Deploy nothing yet.

        Args:
            say: called with what is done.
            prefect_file: what to deploy; by default, the `prefect.yaml` that comes with the project.
        """
        self._say, self._file = say, prefect_file or PREFECT_YAML
        self._folder, self._recipes, self._told = schedules.Folder(), list[str](), ""

    def begin(self) -> None:
        """Bring the server up to date after a start of the service: deployments, runs that died, missed polls.

        Raises:
            InputError, LewisError: as `deploy`.
        """
        self._say("deploying")
        crash_dead_runs()
        polls.drop_missed()
        recipes_folder.make()
        self._deploy(self._folder.runnable())
        self.worker_died()  # if there was one, it is not there now
        moves.tell()

    def worker_died(self) -> None:
        """Bring the server up to date after the worker of `lewis up` has died: what it had not begun is to be run."""
        orphaned_runs.give_back(worker.name_of_up())

    def follow(self) -> None:
        """Deploy again if other recipes can run than those that were deployed.

        What does not succeed is told, and done at a later call: the folder or the server may be away for a moment.
        """
        try:
            if (now := self._folder.runnable()) != self._recipes:
                self._deploy(now)
            self._told = ""
        except (LewisError, httpx.HTTPError) as error:
            if (told := f"the recipes could not be deployed; trying again: {error}") != self._told:
                self._say(told)
            self._told = told

    def _deploy(self, recipes: list[str]) -> None:
        deploy(self._file, recipes)
        self._recipes = recipes
        self._say(f"recipes in {recipes_folder.folder()}: {', '.join(recipes) or 'none'}")

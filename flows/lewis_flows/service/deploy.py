"""Put work pool, device limit, deployments and automations on a Prefect server, and keep them up to date."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation import work_queue
from lewis.input_files import read_bytes
from lewis.recipe import yaml_text
from lewis_flows import environment, prefect_runs, recipes_folder
from lewis_flows.service import orphaned_runs, recipe_deployments, worker
from lewis_flows.service.automations import put_automations
from lewis_flows.service.credentials import connected
from lewis_flows.service.recipe_files import Folder, RecipeFile
from lewis_flows.turn import crash_dead_runs
from lewis_tasks.support import moves
from lewis_tasks.support.device_slot import LIMIT, slots

logger = logging.getLogger(__name__)
POOL = work_queue.MERGES
PREFECT_YAML = recipes_folder.SHIPPED.resolve() / "prefect.yaml"
JOB = {k: v for k, v in environment.DEFAULTS.items() if not k.startswith(("PREFECT_SERVER_", "PREFECT_WORKER_"))}
TEMPLATE: dict[str, Any] = {
    # For a worker that was not started by `lewis up`: no telemetry, and the heartbeat that `lewis-dead-runs` waits for.
    "job_configuration": {"env": JOB, "stream_output": True},
    # Users who start a run may set its parameters, but no command, environment or folder of its process.
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
"""The base job template of a work pool of processes."""


def deploy(file: Path = PREFECT_YAML) -> list[str]:
    """Bring a Prefect server up to date: as `deploy_service`, and the deployments of the recipes.

    What an operator changed and is kept, and what an edited recipe leads to, is logged.

    Args:
        file: what to deploy in addition to the recipes.

    Returns:
        The names of the recipes that can run.

    Raises:
        InputError: as `deploy_service`, or if the folder of recipes cannot be read.
        LewisError: if Prefect refuses a deployment.
    """
    deploy_service(file)
    follower = Follower(logger.info)
    follower.deploy()
    return follower.runnable()


def deploy_service(file: Path = PREFECT_YAML) -> None:
    """Create or update the pool, the limit, the automations and the deployments of `file`.

    Where `LEWIS_EVALUATE_POOL` names a pool for evaluations, it is made too, and the deployment `evaluate` put into it.
    Where the recipes are in the store, their folder is made first if it is missing.

    Args:
        file: a `prefect.yaml`.

    Raises:
        InputError: if the file or the notification block is not there, or a setting is wrong.
        LewisError: if Prefect refuses a deployment.
    """
    content = _content(file)
    with get_client(sync_client=True) as client:
        for pool in {POOL, work_queue.pool()}:
            _put_pool(client, pool)
        try:  # how many devices may be busy at a time, over all machines; an existing limit stays as the user set it
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=slots()))
        put_automations(client)
    if content.get("deployments"):
        _deploy_file(file, content)
    recipes_folder.make()


def _content(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; give the path of your prefect.yaml with --prefect-file, or leave it out"
        )
    content = yaml_text.load(read_bytes(file, yaml_text.MAX_BYTES), str(file))
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a mapping with `deployments`, got {type(content).__name__}")
    listed = content.get("deployments") or []
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise InputError(
            f"{file}: deployments: expected a list of mappings, got {str(listed)[:100]}; "
            "copy one from deployments/prefect.yaml"
        )
    return content


def _deploy_file(file: Path, content: dict[str, Any]) -> None:
    for each in content["deployments"]:
        if each.get("name") == prefect_runs.EVALUATE and work_queue.pool() != POOL:
            each["work_pool"] = {"name": work_queue.pool()}
        for schedule in each.get("schedules") or []:
            if "cron" in schedule:
                schedule.setdefault("timezone", recipe_deployments.time_zone())
    with store.scratch_folder("deploy") as scratch:
        complete = scratch / "prefect.yaml"
        complete.write_text(yaml.safe_dump(content, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(complete)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        # Check the output too: the command exits with 0 if it skips a file that it cannot read.
        if done.returncode or "successfully created" not in done.stdout:
            raise LewisError(f"{file}: prefect deploy refused it:\n{done.stdout}{done.stderr}")


def _put_pool(client: SyncPrefectClient, name: str) -> None:
    """Create a work pool, or give an existing pool of processes the template `TEMPLATE`."""
    try:
        pool = client.read_work_pool(name)
        if pool.type == "process" and pool.base_job_template != TEMPLATE:
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=TEMPLATE))
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=TEMPLATE))


def begin(file: Path | None = None) -> None:
    """Bring the server up to date when the service starts: deployments, runs that died, and new champions.

    Raises:
        InputError, LewisError: as `deploy_service`.
    """
    crash_dead_runs()
    deploy_service(file or PREFECT_YAML)
    worker_died()  # the worker of an earlier start of the service has ended
    moves.report()


def worker_died() -> None:
    """Update the server after the worker of `lewis up` has died: runs that it had not begun are scheduled again."""
    orphaned_runs.give_back(worker.name_of_up())


class Follower:
    """Keeps the deployments of the recipes equal to the folder; threads may share it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Deploy nothing yet; `say` will be called with what is done."""
        self._say, self._folder, self._problem, self._lock = say, Folder(), "", threading.Lock()
        self._known: list[RecipeFile] | None = None  # before the first deploy
        self._stays = False  # whether a deployment is kept that no recipe asks for, because a run of it goes on

    def runnable(self) -> list[str]:
        """The names of the deployed recipes that can run."""
        return [each.name for each in self._known or () if not each.why]

    def deploy(self) -> None:
        """Deploy what has changed in the folder since the last call.

        Raises:
            InputError: if the folder cannot be read.
            httpx.HTTPError: if the server does not answer.
        """
        files = self._folder.files()
        with get_client(sync_client=True) as client:
            for each in files:
                for line in recipe_deployments.put(client, each) if each not in (self._known or ()) else ():
                    self._say(line)
            self._stays = recipe_deployments.remove_stale(client, files)
        self._known = files

    def follow(self) -> bool:
        """Deploy if the folder has changed; log a failure, and try again at a later call.

        It fails, for example, while the folder or the server is unavailable.

        Returns:
            Whether the folder had changed, and was deployed.
        """
        try:
            with self._lock:
                changed = self._known is None or self._folder.files() != self._known
                if changed or self._stays:
                    self.deploy()
            if changed:
                self._say(f"recipes in {recipes_folder.folder()}: {', '.join(self.runnable()) or 'none'}")
            self._problem = ""
            return changed
        except (LewisError, httpx.HTTPError, PrefectException) as error:
            no_pool = f"there is no work pool {POOL}: `lewis deploy` makes it"
            why = no_pool if isinstance(error, ObjectNotFound) else error
            if (problem := f"the recipes could not be deployed; trying again: {why}") != self._problem:
                logger.warning("%s", problem)
            self._problem = problem
            return False


def main() -> int:
    """Run a step of `lewis up` that needs Prefect's client: `... service.deploy begin [FILE]`, or `worker-died`.

    Returns:
        The exit code: 2 if a setting or the key is wrong, 1 after another error; what is wrong is on stdout.
    """
    what, *file = sys.argv[1:]
    try:
        environment.prepare()
        with connected(os.environ["PREFECT_API_URL"]):
            if what == "begin":
                begin(*map(Path, file))
            else:
                worker_died()
    except LewisError as error:
        print(error)  # noqa: T201
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

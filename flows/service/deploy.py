"""Put work pool, device limit, deployments and automations on a Prefect server, or bring them up to date."""

import logging
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from lewis.errors import InputError, LewisError
from lewis.input_files import read_bytes
from lewis.models.pin import find_folder
from lewis.recipe import yaml_limits
from lewis.recipe.recipe import Recipe
from lewis_flows import environment, recipes_folder
from lewis_flows.service.automations import put_automations
from lewis_tasks.support.device_slot import LIMIT, slots

logger = logging.getLogger(__name__)
POOL = "lewis"
PREFECT_YAML = recipes_folder.SHIPPED / "prefect.yaml"
JOB = {k: v for k, v in environment.DEFAULTS.items() if not k.startswith(("PREFECT_SERVER_", "PREFECT_WORKER_"))}
TEMPLATE: dict[str, Any] = {
    # For a worker that was not started by `lewis up`: no telemetry, and the heartbeat that `lewis-dead-runs` waits for.
    "job_configuration": {"env": JOB, "stream_output": True},
    # Who starts a run may choose its parameters, and nothing of its process: no command, environment or folder.
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
"""The base job template of the work pool."""


def deploy(file: Path = PREFECT_YAML) -> list[str]:
    """Create or update the pool, the limit, the deployments of `file` and the automations.

    Where the recipes are in the store, their folder is made first if it is missing.

    Returns:
        The names of the recipes that have a nightly schedule.

    Raises:
        InputError: if the file or the notification block is not there.
        LewisError: if Prefect refuses a deployment.
    """
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; give the path of your prefect.yaml with --prefect-file, or leave it out"
        )
    recipes_folder.make()
    recipes = recipes_folder.load_all()
    with get_client(sync_client=True) as client:
        _put_pool(client)
        _create_limit(client)
        put_automations(client)
    content = yaml_limits.load(read_bytes(file, yaml_limits.MAX_BYTES), str(file))
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a mapping with `deployments`, got {type(content).__name__}")
    add_schedules(content, recipes)
    with tempfile.TemporaryDirectory(prefix="lewis-") as scratch:
        complete = Path(scratch) / "prefect.yaml"
        complete.write_text(yaml.safe_dump(content, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(complete)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        # Check the output too: the command exits with 0 if it skips a file that it cannot read.
        if done.returncode or "successfully created" not in done.stdout:
            raise LewisError(f"{file}: prefect deploy refused it:\n{done.stdout}{done.stderr}")
    return sorted(recipes)


def add_schedules(content: dict[str, Any], recipes: dict[str, Recipe]) -> None:
    """Give every recipe a schedule of `merge-nightly`, and switch off those whose models are not on this machine."""
    nightly = next((d for d in content.get("deployments") or [] if d.get("name") == "merge-nightly"), None)
    if nightly is None:
        return
    schedules = nightly.setdefault("schedules", None) or []
    # Leave out the schedules of recipes that are gone: their runs would fail every night.
    schedules = [s for s in schedules if (s.get("parameters") or {}).get("recipe") in recipes]
    hour = {k: v for k, v in (nightly["schedules"] or [{}])[0].items() if k in ("cron", "timezone")}
    hour.setdefault("cron", "0 3 * * *")
    known = {schedule["parameters"]["recipe"] for schedule in schedules}
    schedules += [{"slug": name, **hour, "parameters": {"recipe": name}} for name in recipes if name not in known]
    for schedule in schedules:
        missing = _missing_folder(recipes[schedule["parameters"]["recipe"]])
        if missing:
            schedule["active"] = False
            logger.warning("%s: its nightly schedule is off: %s", schedule["parameters"]["recipe"], missing)
    nightly["schedules"] = schedules


def _missing_folder(recipe: Recipe) -> str | None:
    """The error of the first model that can only be a folder, if that folder does not exist."""
    for ref in [recipe.base_model, *(entry.model for entry in recipe.models)]:
        for part in (ref or "").split("+"):
            try:
                if part:
                    find_folder(part, recipe.root)
            except InputError as error:
                return str(error)
    return None


def _put_pool(client: SyncPrefectClient) -> None:
    """Create the work pool, or give a pool of processes that is there already our template."""
    try:
        pool = client.read_work_pool(POOL)
        if pool.type == "process" and pool.base_job_template != TEMPLATE:
            client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=TEMPLATE))
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=TEMPLATE))


def _create_limit(client: SyncPrefectClient) -> None:
    """Limit how many devices are busy at once, over all machines; a limit that exists stays as the user set it."""
    try:
        client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=slots()))

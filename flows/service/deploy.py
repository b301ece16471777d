"""What a Prefect server needs to know: work pool, device limit, deployments, automations. Safe to repeat."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from lewis.errors import InputError, LewisError
from lewis.models.pin import find_folder
from lewis.recipe.recipe import Recipe
from lewis_flows import recipes_folder
from lewis_tasks.support.device_slot import LIMIT, slots

logger = logging.getLogger(__name__)
POOL = "lewis"
TAG = "lewis"  # of our runs; a server may have others, whose heartbeats are slower
DEAD_AFTER = timedelta(seconds=75)  # without a heartbeat, which comes every 30 s
PREFECT_YAML = Path(__file__).resolve().parents[2] / "deployments" / "prefect.yaml"


def deploy(file: Path = PREFECT_YAML) -> list[str]:
    """Create or update the pool, the limit, the deployments of `file` and the automations.

    Returns:
        The names of the recipes that have a nightly schedule.

    Raises:
        InputError: if the file or the notification block is not there.
        LewisError: if Prefect refuses a deployment.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the path of your prefect.yaml, or deploy from a checkout")
    recipes = recipes_folder.load_all()
    with get_client(sync_client=True) as client:
        _create_pool(client)
        _create_limit(client)
        for automation in _automations(client):
            _put(client, automation)
    content = yaml.safe_load(file.read_text())
    add_schedules(content, recipes)
    with tempfile.TemporaryDirectory(prefix="lewis-") as scratch:
        complete = Path(scratch) / "prefect.yaml"
        complete.write_text(yaml.safe_dump(content, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(complete)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        # It exits with 0 when it skips a file that it cannot read.
        if done.returncode or "successfully created" not in done.stdout:
            raise LewisError(f"{file}: prefect deploy refused it:\n{done.stdout}{done.stderr}")
    return sorted(recipes)


def add_schedules(content: dict[str, Any], recipes: dict[str, Recipe]) -> None:
    """Give every recipe a schedule of `merge-nightly`, and switch off those whose models are not on this machine."""
    nightly = next((d for d in content.get("deployments") or [] if d.get("name") == "merge-nightly"), None)
    if nightly is None:
        return
    schedules = nightly.setdefault("schedules", None) or []
    # Those of recipes that are gone would fail every night.
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
    """What is wrong with the first model that can only be a folder, and is not there."""
    for ref in [recipe.base_model, *(entry.model for entry in recipe.models)]:
        for part in (ref or "").split("+"):
            try:
                if part:
                    find_folder(part, recipe.root)
            except InputError as error:
                return str(error)
    return None


def _create_pool(client: SyncPrefectClient) -> None:
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


def _create_limit(client: SyncPrefectClient) -> None:
    """The number of devices that may be busy at once, over all machines; one that exists is the user's to change."""
    try:
        client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=slots()))


def _automations(client: SyncPrefectClient) -> Iterator[AutomationCore]:
    yield AutomationCore(
        name="lewis-dead-runs",
        description="A run whose heartbeats stop has died with its process or machine.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=_ours(),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=DEAD_AFTER,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="Its heartbeats stopped: the process or machine died. Run it again: what was finished is kept.",
            )
        ],
    )
    block = _notification_block(client)
    if block is None:
        return
    failed = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        match_related=_ours(),
        posture=Posture.Reactive,
        threshold=1,
    )
    text = "{{ flow_run.name }}: {{ flow_run.state.name }}\n\n{{ flow_run.state.message }}\n\n{{ flow_run|ui_url }}"
    yield _notification("lewis-notify-failure", failed, block, "LEWIS: a run failed", text)
    promoted = EventTrigger(expect={"lewis.model.promoted"}, posture=Posture.Reactive, threshold=1)
    text = "{{ event.payload.uri }} is the champion now (recipe {{ event.payload.recipe }})"
    yield _notification("lewis-notify-promotion", promoted, block, "LEWIS: a new champion", text)


def _ours() -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.role": ["tag"], "prefect.resource.id": [f"prefect.tag.{TAG}"]})


def _notification(name: str, trigger: EventTrigger, block: UUID, subject: str, body: str) -> AutomationCore:
    return AutomationCore(
        name=name,
        trigger=trigger,
        actions=[SendNotification(block_document_id=block, subject=subject, body=body)],
    )


def _notification_block(client: SyncPrefectClient) -> UUID | None:
    """The id of the block that `LEWIS_NOTIFY` names, or that calls `LEWIS_NOTIFY_URL`; None if neither is set."""
    named, url = os.environ.get("LEWIS_NOTIFY"), os.environ.get("LEWIS_NOTIFY_URL")
    if url and not named:
        from prefect.blocks.notifications import CustomWebhookNotificationBlock

        block = CustomWebhookNotificationBlock(
            name="lewis", url=url, json_data={"subject": "{{subject}}", "body": "{{body}}"}
        )
        return block.save("lewis-notify", overwrite=True)
    if not named:
        return None
    kind, _, name = named.partition("/")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound:
        raise InputError(
            f"LEWIS_NOTIFY={named}: no such block; expected the type and name of a notification block of this "
            "server, for example slack-webhook/ops; `prefect block ls` lists them"
        ) from None


def _put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Create an automation, or bring the one of its name up to date."""
    found = client.read_automations_by_name(automation.name)
    if found:
        client.update_automation(found[0].id, automation.model_copy(update={"enabled": found[0].enabled}))
    else:
        client.create_automation(automation)

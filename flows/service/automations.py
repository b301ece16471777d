"""The automations on a Prefect server: mark dead runs, notify of failures and of new champions."""

import os
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from lewis.errors import InputError
from lewis_tasks.support.moves import NOTIFIES, PROMOTED

TAG = "lewis"  # of our runs; a server may have runs of others, whose heartbeats are slower
DEAD_AFTER = timedelta(seconds=75)  # without a heartbeat, which comes every 30 s


def put_automations(client: SyncPrefectClient) -> None:
    """Create the automations, or bring those of the same names up to date; one that was switched off stays off.

    Raises:
        InputError: if there is no such notification block as `LEWIS_NOTIFY` names.
    """
    for automation in _automations(client):
        found = client.read_automations_by_name(automation.name)
        if found:
            client.update_automation(found[0].id, automation.model_copy(update={"enabled": found[0].enabled}))
        else:
            client.create_automation(automation)


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
    promoted = EventTrigger(expect={PROMOTED}, posture=Posture.Reactive, threshold=1)
    recipe = "{% if event.payload.recipe %} (recipe {{ event.payload.recipe }}){% endif %}"
    text = f"{{{{ event.payload.uri }}}} is the champion now{recipe}"
    yield _notification(NOTIFIES, promoted, block, "LEWIS: a new champion", text)


def _ours() -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.role": ["tag"], "prefect.resource.id": [f"prefect.tag.{TAG}"]})


def _notification(name: str, trigger: EventTrigger, block: UUID, subject: str, body: str) -> AutomationCore:
    return AutomationCore(
        name=name,
        trigger=trigger,
        actions=[SendNotification(block_document_id=block, subject=subject, body=body)],
    )


def _notification_block(client: SyncPrefectClient) -> UUID | None:
    """The id of the block that `LEWIS_NOTIFY` names, or of one for `LEWIS_NOTIFY_URL`; None if neither is set."""
    named, url = os.environ.get("LEWIS_NOTIFY"), os.environ.get("LEWIS_NOTIFY_URL")
    if url and not named:
        from prefect.blocks.notifications import CustomWebhookNotificationBlock
        from prefect.types import SecretDict

        # As a secret, which Prefect stores encrypted and shows to nobody: the URL itself may be what lets one post.
        block = CustomWebhookNotificationBlock(
            name="lewis",
            url="{{url}}",
            secrets=SecretDict({"url": url}),
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        )
        saved = block.save("lewis-notify", overwrite=True)
        assert isinstance(saved, UUID)  # not awaitable, as there is no event loop here
        return saved
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

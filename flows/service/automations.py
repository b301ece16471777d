"""The automations on a Prefect server: mark dead runs, notify of failures and of new champions."""

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

from lewis import settings
from lewis.errors import InputError
from lewis_flows import prefect_runs, release_event
from lewis_tasks.support.moves import NOTIFIES, PROMOTED
from lewis_tasks.support.waiting import LONG, WAITING

TAG = "lewis"  # of our runs; a server may have runs of others, whose heartbeats are slower
DEAD_AFTER = timedelta(seconds=75)  # without a heartbeat, which comes every 30 s
STARTS_WITHIN = timedelta(minutes=10)  # from Pending, on a machine that is busy
_NOT_PENDING = (
    *("Running", "Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Scheduled", "Late"),
    "InfrastructurePending",  # its job waits in a cluster, for a GPU or an image; the worker watches it
)
_RUN = "{{ flow_run.name }}: {{ flow_run.state.message or flow_run.state.name }}\n\n{{ flow_run|ui_url }}"
_EVENT = "{{ event.payload.message }}{% if flow_run %}\n\n{{ flow_run|ui_url }}{% endif %}"


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
    yield AutomationCore(
        name="lewis-stuck-runs",
        description="A run whose worker died while it started the run's process would be Pending for ever.",
        trigger=EventTrigger(
            after={"prefect.flow-run.Pending"},
            expect={f"prefect.flow-run.{state}" for state in _NOT_PENDING},
            match=_ANY_RUN,
            match_related=_ours(),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=STARTS_WITHIN,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="It was never started: its worker died.")],
    )
    block = _notification_block(client)
    if block is None:
        return
    for name, state, flows, subject, description in _OF_RUNS:
        yield _notification(name, _ended_as(state, *flows), block, (subject, _RUN), description)
    for name, event, subject, description in _OF_EVENTS:
        trigger = EventTrigger(expect={event}, posture=Posture.Reactive, threshold=1)
        yield _notification(name, trigger, block, (subject, _EVENT), description)
    late = EventTrigger(
        after={"prefect.flow-run.Late"},
        expect={"prefect.flow-run.Pending", "prefect.flow-run.Running", "prefect.flow-run.Cancelled"},
        match=_ANY_RUN,
        match_related=[_ours(), _of_flows(prefect_runs.MERGE, prefect_runs.SEARCH, prefect_runs.EVALUATE)],
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=LONG,
    )
    told = "{{ flow_run.name }} was due long ago: is there a worker, and has it time?\n\n{{ flow_run|ui_url }}"
    yield _notification("lewis-notify-late", late, block, ("LEWIS: a run is late", told), "No worker takes a run.")
    promoted = EventTrigger(expect={PROMOTED}, posture=Posture.Reactive, threshold=1)
    told = "{{ event.payload.message }}{% if event.payload.recipe %} (recipe {{ event.payload.recipe }}){% endif %}"
    told += "\n\n{{ event.payload.url }}"
    yield _notification(NOTIFIES, promoted, block, ("LEWIS: a new champion", told), "The alias champion has moved.")


_ANY_RUN = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})
_OF_RUNS: tuple[tuple[str, str, tuple[str, ...], str, str], ...] = (
    (
        "lewis-notify-failure",
        "Failed",
        (*(each for each in prefect_runs.ALL if each != prefect_runs.EVALUATE), "approve"),  # its merge fails too
        "LEWIS: a run failed",
        "A run failed; its message says why.",
    ),
    (
        "lewis-notify-crash",
        "Crashed",
        (prefect_runs.MERGE, prefect_runs.SEARCH, prefect_runs.VERIFY),  # of a poll the next one does the work
        "LEWIS: a run died",
        "The process or machine of a run died.",
    ),
    ("lewis-notify-rejection", "Rejected", (), "LEWIS: a merge was rejected", "The gate let a merge not pass."),
    (
        "lewis-notify-approval",
        "AwaitingApproval",
        (),
        "LEWIS: a version waits for approval",
        "A person has to approve it.",
    ),
    (
        "lewis-notify-unpublished",
        "Unpublished",
        (),
        "LEWIS: a champion was not published",
        "The Hub refused a champion.",
    ),
)
"""Automations on the end of a run: name, name of its state, flows (of all if empty), subject, description."""

_OF_EVENTS = (
    ("lewis-notify-waiting", WAITING, "LEWIS: a run waits for long", "A run waits for a device, or for its turn."),
    (
        "lewis-notify-stuck",
        release_event.STUCK,
        "LEWIS: a release is not merged",
        "A release could not be merged thrice.",
    ),
)
"""Automations on events of ours: name, event, subject of the notification, description."""


def _ended_as(state: str, *flows: str) -> EventTrigger:
    return EventTrigger(
        expect={f"prefect.flow-run.{state}"},
        match=_ANY_RUN,
        match_related=[_ours(), _of_flows(*flows)] if flows else _ours(),
        posture=Posture.Reactive,
        threshold=1,
    )


def _of_flows(*names: str) -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.role": ["flow"], "prefect.resource.name": list(names)})


def _ours() -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.role": ["tag"], "prefect.resource.id": [f"prefect.tag.{TAG}"]})


def _notification(
    name: str, trigger: EventTrigger, block: UUID, words: tuple[str, str], description: str
) -> AutomationCore:
    return AutomationCore(
        name=name,
        description=description,
        trigger=trigger,
        actions=[SendNotification(block_document_id=block, subject=words[0], body=words[1])],
    )


def _notification_block(client: SyncPrefectClient) -> UUID | None:
    """The id of the block that `LEWIS_NOTIFY` names, or of one for `LEWIS_NOTIFY_URL`; None if neither is set."""
    named, url = settings.NOTIFY.get(), settings.NOTIFY_URL.get()
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

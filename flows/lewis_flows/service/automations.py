"""The automations on a Prefect server: mark dead runs, notify of failures and of new champions."""

from collections.abc import Iterator, Sequence
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
from lewis_flows.prefect_runs import ALL, EVALUATE, MERGE, SEARCH, SERVE, SKIPPED, VERIFY
from lewis_flows.release_event import STUCK, UNWATCHED
from lewis_flows.service.prefect_app import DEAD_AFTER, DEAD_RUNS
from lewis_flows.service.recipe_deployments import TAG
from lewis_tasks.support.events import LONG, WAITING
from lewis_tasks.support.moves import NOTIFIES, PROMOTED

SERVICE_TAG = "lewis-service"
"""Tag of the deployments of the service itself, in `prefect.yaml`."""

STARTS_WITHIN = timedelta(minutes=10)  # from Pending to the begin of a run, on a machine that is busy
_NOT_PENDING = (
    *("Running", "Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Scheduled", "Late"),
    "InfrastructurePending",  # its job waits in a cluster, for a GPU or an image; the worker watches it
)
_RUN = "{{ flow_run.name }}: {{ flow_run.state.message or flow_run.state.name }}\n\n{{ flow_run|ui_url }}"
# Of a run that waits, Suspended, the state has no message; a tag says which version it asks about.
_ASKS = (
    "{{ flow_run.name }}: {{ flow_run.state.message or '' }}{% for tag in flow_run.tags if tag.startswith('awaits:') %}"
    "{{ tag[7:] }} passed its gate, and waits for an answer on the run's page{% endfor %}\n\n{{ flow_run|ui_url }}"
)
_RUN_LATE = "{{ flow_run.name }} was due long ago: is there a worker, and has it time?\n\n{{ flow_run|ui_url }}"
_EVENT = "{{ event.payload.message }}{% if flow_run %}\n\n{{ flow_run|ui_url }}{% endif %}"
_PROMOTED = (
    "{{ event.payload.message }}{% if event.payload.recipe %} (recipe {{ event.payload.recipe }}){% endif %}"
    "\n\n{{ event.payload.url }}"
)


def put_automations(client: SyncPrefectClient) -> None:
    """Create the automations, or bring those of the same names up to date; one that was switched off stays off.

    Raises:
        InputError: if the notification block that `LEWIS_NOTIFY` names does not exist.
    """
    for automation in _automations(client):
        found = client.read_automations_by_name(automation.name)
        if found:
            client.update_automation(found[0].id, automation.model_copy(update={"enabled": found[0].enabled}))
        else:
            client.create_automation(automation)


def _automations(client: SyncPrefectClient) -> Iterator[AutomationCore]:
    died = "Its heartbeats stopped: the process or machine died. Run it again: what was finished is kept."
    yield AutomationCore(
        name=DEAD_RUNS,
        description="A run whose heartbeats stop has died with its process or machine.",
        trigger=_runs("*", after="heartbeat", within=DEAD_AFTER),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=died)],
    )
    yield AutomationCore(
        name="lewis-stuck-runs",
        description="A run whose worker died while it started the run's process would be Pending for ever.",
        trigger=_runs(*_NOT_PENDING, after="Pending", within=STARTS_WITHIN),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="It was never started: its worker died.")],
    )
    block = _notification_block(client)
    for name, trigger, subject, body, description in _notifications() if block else ():
        action = SendNotification(block_document_id=block, subject=f"LEWIS: {subject}", body=body)
        yield AutomationCore(name=name, description=description, trigger=trigger, actions=[action])


def _runs(*states: str, flows: Sequence[str] = (), after: str = "", within: timedelta = timedelta()) -> EventTrigger:
    """Return a trigger that fires when a run of `flows`, or of any flow, enters one of `states`.

    With `after`, the name of a state or `heartbeat`, it fires if no such state follows `within` a time.
    """
    tags = [f"prefect.tag.{TAG}", f"prefect.tag.{SERVICE_TAG}"]
    related = [ResourceSpecification({"prefect.resource.role": ["tag"], "prefect.resource.id": tags})]
    if flows:
        named = {"prefect.resource.role": ["flow"], "prefect.resource.name": list(flows)}
        related.append(ResourceSpecification(named))
    return EventTrigger(
        after={f"prefect.flow-run.{after}"} if after else set(),
        expect={f"prefect.flow-run.{state}" for state in states},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        match_related=related if flows else related[0],
        for_each={"prefect.resource.id"} if after else set(),
        posture=Posture.Proactive if after else Posture.Reactive,
        threshold=1,
        within=within,
    )


def _event(name: str) -> EventTrigger:
    return EventTrigger(expect={name}, posture=Posture.Reactive, threshold=1)


def _notifications() -> Iterator[tuple[str, EventTrigger, str, str, str]]:
    """Yield the name, trigger, subject, body and description of each notification."""
    failing = tuple(each for each in ALL if each != EVALUATE)  # the merge that started it reports it
    failed, died = _runs("Failed", flows=failing), _runs("Crashed", flows=(MERGE, SEARCH, SERVE, VERIFY))
    asks = _runs("AwaitingApproval", "Suspended", flows=(MERGE,))
    taken = ("Pending", "Running", "Cancelled", "AwaitingConcurrencySlot", SKIPPED)  # or another run does its work
    late = _runs(*taken, flows=(MERGE, SEARCH, EVALUATE, SERVE), after="Late", within=LONG)
    for name, trigger, subject, body, about in (
        ("failure", failed, "a run failed", _RUN, "A run failed; its message says why."),
        ("crash", died, "a run died", _RUN, "The process or machine of a run died."),
        ("rejection", _runs("Rejected"), "a merge was rejected", _RUN, "The gate let a merge not pass."),
        ("approval", asks, "a version waits for approval", _ASKS, "A person has to approve it."),
        ("unpublished", _runs("Unpublished"), "a champion was not published", _RUN, "The Hub refused a champion."),
        ("waiting", _event(WAITING), "a run waits for long", _EVENT, "A run waits for a device, or for its turn."),
        ("stuck", _event(STUCK), "a release is not merged", _EVENT, "A release could not be merged thrice."),
        ("watch", _event(UNWATCHED), "releases cannot be watched", _EVENT, "A recipe cannot be watched."),
        ("late", late, "a run is late", _RUN_LATE, "No worker takes a run."),
    ):
        yield f"lewis-notify-{name}", trigger, subject, body, about
    yield NOTIFIES, _event(PROMOTED), "a new champion", _PROMOTED, "The alias champion has moved."


def _notification_block(client: SyncPrefectClient) -> UUID | None:
    """Return the id of the notification block of `LEWIS_NOTIFY`, or of one for `LEWIS_NOTIFY_URL`; else None."""
    named, url = settings.NOTIFY.get(), settings.NOTIFY_URL.get()
    if url and not named:
        from prefect.blocks.notifications import CustomWebhookNotificationBlock
        from prefect.types import SecretDict

        # The URL is a secret, which Prefect stores encrypted and does not show: to know it may suffice for posting.
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

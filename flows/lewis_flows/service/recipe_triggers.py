"""The automations that start a recipe's deployments: its merge after a release, its `serve` when its champion moves."""

from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.events import DeploymentEventTrigger

from lewis_flows.release_event import EVENT, SETTLE
from lewis_tasks.support.moves import PROMOTED, serves


def is_missing(client: SyncPrefectClient, automation: str, *, is_new: bool) -> bool:
    """Whether a deployment lacks its automation; if it is new, delete that of a deleted deployment of its name."""
    found = client.read_automations_by_name(automation)
    for each in found if is_new else ():  # the server keeps it if somebody deletes the deployment
        client.delete_automation(each.id)
    return is_new or not found


def on_release(name: str, deployment: Any) -> Any:
    """The automation that starts a recipe's merge when one of its models was released."""
    about = f"Merges {name} when one of its models was released, and no other was for some seconds."
    match, rest = {"prefect.resource.id": "lewis.expert.*", "lewis.recipe": name}, SETTLE - timedelta(seconds=1)
    return _starts(deployment, f"release of {name}", about, EVENT, match, within=rest, schedule_after=SETTLE)


def on_promotion(name: str, model: str, deployment: Any) -> Any:
    """The automation that serves a recipe's model whenever its champion moves: by a run, a person or a rollback."""
    about = f"Puts the champion of {model} into service when it has moved."
    match = {"prefect.resource.id": f"lewis.model.{model}"}
    return _starts(deployment, f"{serves(model)}{name}", about, PROMOTED, match)


def _starts(deployment: Any, name: str, about: str, event: str, match: Any, **when: Any) -> Any:
    """The automation that starts a deployment after an event."""
    trigger = DeploymentEventTrigger(name=name, description=about, expect={event}, match=match, threshold=1, **when)
    trigger.set_deployment_id(deployment)
    return trigger.as_automation()

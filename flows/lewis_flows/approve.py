"""Approve or refuse a version that waits, from Prefect's page: a run of the deployment `approve`."""

from prefect import State, flow
from prefect.states import Completed

from lewis.registry import promotion
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support import moves
from lewis_tasks.support.failures import says_why


@flow(name="approve", flow_run_name="approve {model}/{version}", **run_tags.HOOKS)
@says_why
def approve_flow(model: str, version: int, why: str, refuse: bool = False) -> str | State[str]:
    """Let a version that passed its gate become the champion, or refuse it.

    Args:
        model: the registered model.
        version: its number.
        why: the reason, for the history.
        refuse: it does not become the champion, and no later run asks for it again.
    """
    uri, by = f"models:/{model}/{version}", f"the run {run_tags.url()}"
    if refuse:
        promotion.refuse(model, str(version), why, by)
    else:
        promotion.approve(model, str(version), why, by)
        moves.tell()
    name, line = ("Refused", f"{uri} is refused") if refuse else ("Approved", f"{uri} is the champion")
    run_tags.tag(verdict=name.lower(), trigger="hand")
    return Completed(name=name, message=line, data=uri)

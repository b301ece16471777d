"""The flow `verify`, a nightly check that all entries of the store and all versions still are what was written."""

from prefect import State, flow

from lewis_flows import prefect_runs
from lewis_flows.walk import submit
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.failures import result_of, says_why
from lewis_tasks.verify import verify


@flow(name=prefect_runs.VERIFY, flow_run_name="verify the store", **run_tags.HOOKS)
@says_why
def verify_flow() -> int | State[int]:
    """Check all entries of the store and all registered versions, without remembered checksums; return their number.

    Raises:
        LewisError: if something is damaged: the run fails, and notifications of failures report it.
    """
    run_tags.tag(trigger=run_tags.trigger(run_tags.this_run()))
    checked = int(result_of(submit(verify)))
    return run_tags.ending("Whole", f"{checked} entries and versions, all as they were written", checked)

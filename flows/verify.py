"""The nightly check: is every entry of the store, and every registered version, still what was written?"""

from prefect import State, flow

from lewis_flows import prefect_runs
from lewis_flows.submit import submit
from lewis_tasks.support.failures import result_of, says_why
from lewis_tasks.verify import verify


@flow(name=prefect_runs.VERIFY, flow_run_name="verify the store")
@says_why
def verify_flow() -> int | State[int]:
    """Read everything again, whatever is remembered of it; gives how many entries and versions are whole.

    Raises:
        LewisError: if something is damaged: the run fails, and whoever is told of failures is told of this.
    """
    return int(result_of(submit(verify)))

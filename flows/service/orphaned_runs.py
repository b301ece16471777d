"""What a worker had taken from its work pool and not begun when it died."""

import logging

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.states import Scheduled

from lewis_flows import prefect_runs
from lewis_flows.service.deploy import POOL

logger = logging.getLogger(__name__)


def give_back(worker: str) -> None:
    """Schedule again the runs of the work pool that are Pending, unless another worker than `worker` may begin them.

    Pending, a run holds its deployment's slot, and what is due meanwhile is skipped, polls too. An automation ends it,
    but only after ten minutes, as a machine may be busy. While the server does not answer, nothing is done.
    """
    try:
        with get_client(sync_client=True) as client:
            others = [each for each in client.read_workers_for_work_pool(POOL) if each.name != worker]
            if any(each.status == WorkerStatus.ONLINE for each in others):
                return
            for run in prefect_runs.of_flows(client, prefect_runs.ALL, {"type": {"any_": ["PENDING"]}}):
                if run.work_pool_name == POOL:
                    client.set_flow_run_state(run.id, Scheduled(message="Its worker died before it began."), force=True)
                    logger.info("run %s had not begun when its worker died; it is scheduled again", run.name)
    except httpx.HTTPError as error:
        logger.info("what the worker had taken is left Pending: %s", type(error).__name__)

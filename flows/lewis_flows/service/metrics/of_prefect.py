"""Numbers that Prefect's server knows: runs by outcome, steps by outcome and seconds, releases.

They are of the last day, by the server's clock of each run: a counter in this process would begin anew with it, and
would know nothing of what other workers did.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import TaskRunFilter
from prefect.client.schemas.objects import TaskRun
from prefect.client.schemas.sorting import TaskRunSort
from prefect.events.filters import EventFilter
from prefect.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prometheus_client.core import GaugeMetricFamily, Metric

from lewis_flows.prefect_runs import ALL, PAGE
from lewis_flows.release_event import EVENT

WINDOW = timedelta(days=1)
_LATE = timedelta(minutes=2)  # how much later than its end the server may hear that a task ended
_TIMEOUT = 10.0  # seconds for one request


class Ended(NamedTuple):
    """A task that has ended: which step it is, how it ended, when, and after how many seconds."""

    step: str
    outcome: str
    time: datetime
    seconds: float


class Steps:
    """The tasks of the last day; only those that have ended since the last question are asked for."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._lock = threading.Lock()
        self._known: dict[UUID, Ended] = {}

    def read(self, client: SyncPrefectClient, now: datetime) -> list[Ended]:
        """All tasks that ended in the day before `now`."""
        with self._lock:
            newest = max((each.time for each in self._known.values()), default=now - WINDOW)
            after = max(newest - _LATE, now - WINDOW)
            for run in _ended_tasks(client, after):
                if run.end_time is not None:
                    outcome = (run.state_name or "").lower()
                    seconds = run.total_run_time.total_seconds()
                    self._known[run.id] = Ended(_step(run), outcome, run.end_time, seconds)
            self._known = {key: each for key, each in self._known.items() if each.time >= now - WINDOW}
            return list(self._known.values())


def read(steps: Steps) -> Iterator[Metric]:
    """Ask the server."""
    now = datetime.now(UTC)
    once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
    with once, get_client(sync_client=True, httpx_settings={"timeout": _TIMEOUT}) as client:
        yield _runs(client, now)
        yield from _steps(steps.read(client, now))
        yield _releases(released(client, now - WINDOW))


def released(client: SyncPrefectClient, since: datetime) -> list[ReceivedEvent]:
    """The events of releases since a time, newest first."""
    wanted = EventFilter.model_validate({"event": {"name": [EVENT]}, "occurred": {"since": since}})
    page = client.read_events(wanted, limit=50)
    found = list(page.events)
    while page.next_page and (following := page.get_next_page_sync(client)):
        page = following
        found += page.events
    return found


def gauge(name: str, about: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    """A metric with a value for each tuple of its labels' values, in their order."""
    found = GaugeMetricFamily(name, about, labels=labels)
    for key, value in sorted(values.items()):
        found.add_metric(key, value)
    return found


def _runs(client: SyncPrefectClient, now: datetime) -> Metric:
    asked = {
        "history_start": (now - WINDOW).isoformat(),
        "history_end": now.isoformat(),
        "history_interval_seconds": WINDOW.total_seconds(),
    }
    counts = Counter[tuple[str, ...]]()
    for flow in ALL:
        body = {**asked, "flows": {"name": {"any_": [flow]}}}
        for interval in client.request("POST", "/flow_runs/history", json=body).json():
            for state in interval["states"]:
                counts[flow, state["state_name"].lower()] += state["count_runs"]
    about = "Runs of the last day, by flow and outcome, those that go on too. Polls that found nothing are not kept."
    return gauge("lewis_runs", about, ["flow", "outcome"], counts)


def _steps(ended: list[Ended]) -> Iterator[Metric]:
    seconds: dict[tuple[str, ...], float] = defaultdict(float)
    for each in ended:
        seconds[each.step,] += each.seconds
    about = "Steps of runs that ended in the last day; those with the outcome `cached` were found, not computed."
    yield gauge("lewis_steps", about, ["step", "outcome"], Counter((each.step, each.outcome) for each in ended))
    yield gauge("lewis_step_seconds", "Seconds that these steps took, in sum.", ["step"], seconds)


def _releases(events: list[ReceivedEvent]) -> Metric:
    counts = Counter[tuple[str, ...]]((str(event.payload.get("recipe", "")),) for event in events)
    return gauge("lewis_releases", "Releases seen in the last day, by recipe.", ["recipe"], counts)


def _ended_tasks(client: SyncPrefectClient, after: datetime) -> Iterator[TaskRun]:
    wanted, newest = TaskRunFilter.model_validate({"end_time": {"after_": after}}), TaskRunSort.END_TIME_DESC
    for offset in range(0, 1_000_000, PAGE):
        page = client.read_task_runs(task_run_filter=wanted, sort=newest, limit=PAGE, offset=offset)
        yield from page
        if len(page) < PAGE:
            return


def _step(run: TaskRun) -> str:
    """The name of the task's function: its key is that, and a part that changes with the function."""
    return run.task_key.rpartition("-")[0] or run.task_key

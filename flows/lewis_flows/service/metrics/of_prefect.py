"""Metrics from Prefect's server: runs by outcome, steps by outcome and duration, and releases.

They cover the last day, by the times that the server has of each run. A counter in this process would start at zero
with the process, and would not count what other workers did.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import TaskRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prometheus_client.core import GaugeMetricFamily, Metric

from lewis_flows import prefect_runs, recipes_folder, release_event
from lewis_flows.prefect_runs import ALL, ENDED, MERGE, UNFINISHED
from lewis_tasks.support.flow_run import pages
from lewis_tasks.support.patience import impatient

WINDOW = timedelta(days=1)
_LATE = timedelta(minutes=2)  # how long after the end of a task the server may learn of it
_TIMEOUT = 10.0  # seconds for one request
_OR_WAITS = {"operator": "or_", "name": {"any_": ["Late", "AwaitingConcurrencySlot"]}}  # states of the type SCHEDULED


class Step(NamedTuple):
    """A task that has ended: the id of its flow run, its step, how and when it ended, and its duration in seconds."""

    run: UUID | None
    step: str
    outcome: str
    time: datetime
    seconds: float


class Run(NamedTuple):
    """A flow run: its flow, its recipe, its state in lower case, and when it ended, or else was to begin."""

    flow: str
    recipe: str
    outcome: str
    time: datetime


T = TypeVar("T", bound=Step | Run)


class Recent(Generic[T]):
    """A cache of what ended in the last day: a `read` asks the server only for what ended since the previous one."""

    def __init__(self, ended: Callable[[SyncPrefectClient, datetime], Iterable[tuple[UUID, T]]]) -> None:
        """Start empty; `ended` asks the server for all that ended after a time, and gives pairs of id and item."""
        self._ended = ended
        self._known: dict[UUID, T] = {}

    def read(self, client: SyncPrefectClient, now: datetime) -> Mapping[UUID, T]:
        """Return id -> item of all that ended in the day before `now`."""
        newest = max((each.time for each in self._known.values()), default=now - WINDOW)
        self._known |= dict(self._ended(client, max(newest - _LATE, now - WINDOW)))
        self._known = {key: each for key, each in self._known.items() if each.time >= now - WINDOW}
        return self._known


class Prefect:
    """The metrics of one server, with a cache of its answers; `Source` ensures that one thread at a time reads."""

    def __init__(self) -> None:
        self._runs, self._steps = Recent(self._ended_runs), Recent(_ended_steps)
        self._flows = dict[UUID, str]()
        self._last = dict[str, Run]()

    def read(self) -> Iterator[Metric]:
        """Ask the server, and yield its metrics.

        Raises:
            httpx.HTTPError: if it does not answer, or refuses.
        """
        now = datetime.now(UTC)
        with impatient(_TIMEOUT) as client:
            if not self._last:  # the last run of a recipe may be older than a day
                found = prefect_runs.of_flows(client, (MERGE,), ENDED, FlowRunSort.END_TIME_DESC)
                self._note_last(dict(self._named(client, found)))
            ended = self._runs.read(client, now)
            self._note_last(ended)
            going = dict(self._named(client, prefect_runs.of_flows(client, ALL, UNFINISHED, state=_OR_WAITS)))
            steps = self._steps.read(client, now)
            released = release_event.announced(client, now - WINDOW)
        runs = {**ended, **going}
        counts = Counter((each.flow, each.outcome, each.recipe) for each in runs.values())
        about = "Runs of the last day, by flow, outcome and recipe, those that go on too; a poll is none."
        yield gauge("lewis_runs", about, ["flow", "outcome", "recipe"], counts)
        yield from _step_counts(steps.values(), {key: each.recipe for key, each in runs.items()})
        releases = Counter((str(event.payload.get("recipe", "")),) for event in released)
        yield gauge("lewis_releases", "Releases seen in the last day, by recipe.", ["recipe"], releases)
        there = {name: each for name, each in self._last.items() if recipes_folder.is_there(name)}
        last = {(name, each.outcome): each.time.timestamp() for name, each in there.items()}
        about = "When the last merge of a recipe ended (Unix time), with its verdict; none of one that was removed."
        yield gauge("lewis_last_run_timestamp_seconds", about, ["recipe", "outcome"], last)

    def _note_last(self, runs: Mapping[UUID, Run]) -> None:
        for each in runs.values():
            known, skipped = self._last.get(each.recipe), each.outcome == prefect_runs.SKIPPED.lower()
            if each.flow == MERGE and not skipped and (known is None or known.time < each.time):
                self._last[each.recipe] = each

    def _ended_runs(self, client: SyncPrefectClient, after: datetime) -> Iterator[tuple[UUID, Run]]:
        return self._named(client, list(prefect_runs.all_of_flows(client, ALL, ENDED, end_time={"after_": after})))

    def _named(self, client: SyncPrefectClient, runs: Sequence[FlowRun]) -> Iterator[tuple[UUID, Run]]:
        if not self._flows.keys() >= {run.flow_id for run in runs}:
            self._flows = prefect_runs.flow_names(client)
        for run in runs:
            time, outcome = run.end_time or run.expected_start_time or datetime.now(UTC), (run.state_name or "").lower()
            yield run.id, Run(self._flows.get(run.flow_id, ""), prefect_runs.recipe_of(run), outcome, time)


def gauge(name: str, about: str, labels: Sequence[str], values: Mapping[Any, float]) -> Metric:
    """Return a metric; `values` has the value for each tuple of label values, in the order of `labels`."""
    found = GaugeMetricFamily(name, about, labels=labels)
    for key, value in sorted(values.items()):
        found.add_metric(key, value)
    return found


def _step_counts(ended: Iterable[Step], recipes: Mapping[UUID | None, str]) -> Iterator[Metric]:
    counts, seconds = Counter[tuple[str, ...]](), defaultdict[tuple[str, ...], float](float)
    for each in ended:
        recipe = recipes.get(each.run, "")
        counts[each.step, each.outcome, recipe] += 1
        seconds[each.step, recipe] += each.seconds
    about = "Steps of runs that ended in the last day; those with the outcome `cached` were found, not computed."
    yield gauge("lewis_steps", about, ["step", "outcome", "recipe"], counts)
    yield gauge("lewis_step_seconds", "Seconds that these steps took, in sum.", ["step", "recipe"], seconds)


def _ended_steps(client: SyncPrefectClient, after: datetime) -> Iterator[tuple[UUID, Step]]:
    wanted, newest = TaskRunFilter.model_validate({"end_time": {"after_": after}}), TaskRunSort.END_TIME_DESC
    for run in pages(client.read_task_runs, task_run_filter=wanted, sort=newest):
        # The name of the task's function: a task's key is this name, "-", and a part that changes with the function.
        step = run.task_key.rpartition("-")[0] or run.task_key
        outcome, seconds = (run.state_name or "").lower(), run.total_run_time.total_seconds()
        yield run.id, Step(run.flow_run_id, step, outcome, run.end_time or after, seconds)

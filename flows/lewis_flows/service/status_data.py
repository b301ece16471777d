"""What `lewis status` reports: the parts of the service, its runs, what the champions hold, and what is wrong."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from pydantic import BaseModel

from lewis.reports.run_report import approve_command
from lewis_flows.polls import Poll
from lewis_flows.prefect_runs import MERGE
from lewis_tasks.support.device_queue import Place


class Part(BaseModel):
    """A part of the service, such as a server or a work pool; `state` says how it is, or what to do."""

    name: str
    url: str = ""
    up: bool
    state: str


class Run(BaseModel):
    """A run of a merge, a search or an evaluation.

    Attributes:
        recipe: name of the recipe.
        flow: name of the flow, such as `merge`.
        since: start, end or planned time, in UTC.
    """

    recipe: str
    name: str
    flow: str = ""
    deployment: str = ""
    state: str
    message: str = ""
    since: datetime | None


class Input(BaseModel):
    """A model that a recipe merges, with its commit in the champion and its newest one.

    Attributes:
        ref: as the recipe writes it.
        held: key of the commit that the champion was merged from; None if unknown, or if there is no champion.
        head: key of the newest commit; None if unknown.
    """

    ref: str
    held: str | None
    head: str | None


class Watched(BaseModel):
    """A recipe and its champion.

    Attributes:
        recipe: its name.
        registered: name of the registered model; empty if the recipe registers nothing.
        champion: version of the champion; None if there is none, or it is unknown.
        lost: version that became the champion last, and is none any more; empty if there is a champion, or none yet.
        waiting: version that passed its gate and waits for a person; None if there is none.
        inputs: base and experts.
        served: what its targets have in service, a line each, as `lewis served` prints them.
        unserved: those of these lines whose target, which the recipe still has, did not take the newest version that it
            was given.
        settled: whether a version with a verdict holds the newest commits of all `inputs`, and no author took a later
            release back since that verdict; None if unknown.
        behind_since: when a poll first saw a commit that the champion misses; None if there is none, or no poll saw it.
        paused: whether its deployment is paused, so that neither a schedule nor a release starts a merge.
        unmerged: whether no run has merged what its file says now; False if Prefect does not answer.
        next_attempt: when a release or an edit whose merge failed is tried again; None if none is, or `after` says it.
        after: what has to happen before a failed merge is tried again; empty if nothing has to.
        scores: number of a version -> the score that its gate looked at, oldest first; only where they were asked for.
        unknown: what could not be found out, and why.
        broken: whether the recipe's file, or one that its `evaluate` names, is wrong; `unknown` says why, in one text.
    """

    recipe: str
    registered: str = ""
    champion: str | None = None
    lost: str = ""
    waiting: str | None = None
    inputs: list[Input] = []
    served: list[str] = []
    unserved: list[str] = []
    settled: bool | None = None
    behind_since: datetime | None = None
    paused: bool = False
    unmerged: bool = False
    next_attempt: datetime | None = None
    after: str = ""
    scores: dict[int, float] = {}
    unknown: list[str] = []
    broken: bool = False

    @property
    def is_behind(self) -> bool:
        """Whether a model is newer than what the champion holds; False if the newest commits are not known."""
        return any(each.held and each.head and each.held != each.head for each in self.inputs)

    def attempt(self, now: datetime) -> str:
        """Return when a failed merge is tried again, as a text such as `at the next poll`; empty if it is not."""
        if self.after:
            return f"after {self.after}"
        if self.next_attempt is None:
            return ""
        return f"at {self.next_attempt.astimezone():%Y-%m-%d %H:%M}" if self.next_attempt > now else "at the next poll"


class Status(BaseModel):
    """The whole status. A section is None if it could not be found out; `unknown` says why, by section.

    `polled` is None before the first poll. `devices` are the tasks that hold a device of this machine, then those that
    wait for one.
    """

    parts: list[Part]
    running: list[Run] | None = None
    scheduled: list[Run] | None = None
    finished: list[Run] | None = None
    recipes: list[Watched] | None = None
    polled: Poll | None = None
    devices: list[Place] = []
    unknown: dict[str, str] = {}

    def last_runs(self) -> list[Run]:
        """Return the last merge and the last search of each recipe, of those that have ended."""
        found: dict[tuple[str, str], Run] = {}
        for run in self.finished or []:
            found.setdefault((run.flow, run.recipe), run)
        return list(found.values())


DOWN, UNKNOWN, BROKEN, FAILED, LATE, BEHIND, WAITS, UNSERVED, LOST = 10, 11, 12, 13, 14, 15, 16, 17, 18
"""The kinds of problems, which are exit codes of `lewis status --check`, in this order.

A part of the service is down; something could not be found out; a recipe is broken; its last run failed; a run is late;
a champion is behind, and nothing is done about it; a version waits for a person's approval; a target did not take the
champion; there is no champion any more.
"""

GRACE = timedelta(hours=1)  # how long a champion may be behind before that is a problem
FAILURES = ("Failed", "Crashed", "TimedOut", "Unpublished")  # names of the states of a run that failed


class Problem(BaseModel):
    """Something that is wrong with the service or a recipe.

    Attributes:
        code: its kind, which is an exit code.
        about: the part, section or recipe.
        text: what is wrong.
    """

    code: int
    about: str
    text: str


def problems(status: Status, now: datetime) -> list[Problem]:
    """Return what is wrong at the time `now`, by code; the first is the exit code of `--check` (0: none)."""
    return sorted(_problems(status, now), key=lambda problem: problem.code)


def _problems(status: Status, now: datetime) -> Iterator[Problem]:
    yield from (Problem(code=DOWN, about=part.name, text=part.state) for part in status.parts if not part.up)
    yield from _unknown(status)
    yield from _of_runs(status, now)
    yield from _of_champions(status, now)


def _unknown(status: Status) -> Iterator[Problem]:
    for section, why in status.unknown.items():
        yield Problem(code=UNKNOWN, about=section, text=why)
    if status.polled and (none := status.polled.problems.get("")):
        yield Problem(code=UNKNOWN, about="releases", text=none)
    for recipe in status.recipes or []:
        for why in recipe.unknown:
            yield Problem(code=BROKEN if recipe.broken else UNKNOWN, about=recipe.recipe, text=why)


def _of_runs(status: Status, now: datetime) -> Iterator[Problem]:
    attempts = {each.recipe: each.attempt(now) for each in status.recipes or []}
    began = {(run.flow, run.recipe): run.since for run in status.running or [] if run.state == "Suspended"}
    for run in status.last_runs():
        if status.recipes is not None and run.recipe not in attempts and "/" not in run.recipe:
            continue  # the recipe was removed
        suspended = began.get((run.flow, run.recipe))  # a suspended run has done its work
        if run.state in FAILURES and not (suspended and run.since and suspended >= run.since):
            attempt = attempts.get(run.recipe) if run.flow == MERGE else ""
            again = f" (tried again {attempt})" if attempt else ""
            yield Problem(code=FAILED, about=run.recipe, text=f"{_described(run)}{again}")
    for run in status.scheduled or []:
        if run.state == "Late":
            yield Problem(code=LATE, about=run.recipe, text=_described(run))


def _of_champions(status: Status, now: datetime) -> Iterator[Problem]:
    busy = {run.recipe for run in status.running or [] if run.state != "Suspended"}
    for recipe in status.recipes or []:
        since = recipe.behind_since
        if since and now - since > GRACE and not recipe.settled and recipe.recipe not in busy:
            text = f"its champion is behind since {since.astimezone():%Y-%m-%d %H:%M}"
            why = "its deployment is paused" if recipe.paused else "no run has merged what is newer"
            yield Problem(code=BEHIND, about=recipe.recipe, text=f"{text}, and {why}")
        if recipe.waiting:
            name = f"{recipe.registered}/{recipe.waiting}"
            text = f"{name} waits for `{approve_command(name)} --why TEXT`"
            yield Problem(code=WAITS, about=recipe.recipe, text=text)
        for line in recipe.unserved:
            yield Problem(code=UNSERVED, about=recipe.recipe, text=line)
        if recipe.lost:
            name = f"{recipe.registered}/{recipe.lost}"
            text = f"{name} was the champion, and MLflow has none now: the version or its alias was deleted there"
            yield Problem(code=LOST, about=recipe.recipe, text=text)


def _described(run: Run) -> str:
    message = run.message.partition("\n")[0]
    return f"{run.name}: {run.state}" + (f": {message}" if message else "")

"""What `lewis status` reports: the parts of the service, its runs, what the champions hold, and what is wrong."""

from collections.abc import Iterator
from datetime import datetime

from pydantic import BaseModel

from lewis_flows.polls import Poll
from lewis_tasks.support.device_queue import Place


class Part(BaseModel):
    """A part of the service; `state` says how it is, or what to do."""

    name: str
    url: str = ""
    up: bool
    state: str


class Run(BaseModel):
    """A run of the merge, of the search or of the watcher.

    Attributes:
        recipe: its name; empty for the watcher of all recipes.
        since: start, end or planned time, in UTC.
    """

    recipe: str
    name: str
    deployment: str = ""
    state: str
    message: str = ""
    since: datetime | None


class Input(BaseModel):
    """A model of a recipe.

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
        waiting: version that passed its gate and waits for a person; None if there is none.
        inputs: base and experts.
        unknown: what could not be found out, and why.
        broken: whether the recipe's file is wrong; `unknown` begins with why.
    """

    recipe: str
    registered: str = ""
    champion: str | None = None
    waiting: str | None = None
    inputs: list[Input] = []
    unknown: list[str] = []
    broken: bool = False


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


DOWN, UNKNOWN, BROKEN, FAILED, LATE = 10, 11, 12, 13, 14
"""The kinds of problems, the gravest first.

A part of the service is down; something could not be found out; a recipe is broken; its last run failed; a run is late.
"""


class Problem(BaseModel):
    """One problem.

    Attributes:
        code: its kind, which is an exit code.
        about: the part, section or recipe.
        text: what is wrong.
    """

    code: int
    about: str
    text: str


def problems(status: Status) -> list[Problem]:
    """What is wrong, the gravest first; the exit code of a check is the code of the first, or 0."""
    return sorted(_problems(status), key=lambda problem: problem.code)


def _problems(status: Status) -> Iterator[Problem]:
    for part in status.parts:
        if not part.up:
            yield Problem(code=DOWN, about=part.name, text=part.state)
    for section, why in status.unknown.items():
        yield Problem(code=UNKNOWN, about=section, text=why)
    if status.polled and (none := status.polled.problems.get("")):
        yield Problem(code=UNKNOWN, about="releases", text=none)
    for recipe in status.recipes or []:
        for why in recipe.unknown:
            yield Problem(code=BROKEN if recipe.broken else UNKNOWN, about=recipe.recipe, text=why)
    for run in status.finished or []:
        if run.state in ("Failed", "Crashed", "TimedOut", "Unpublished"):
            yield Problem(code=FAILED, about=run.recipe, text=_told(run))
    for run in status.scheduled or []:
        if run.state == "Late":
            yield Problem(code=LATE, about=run.recipe or run.name, text=_told(run))


def _told(run: Run) -> str:
    message = run.message.partition("\n")[0]
    return f"{run.name}: {run.state}" + (f": {message}" if message else "")

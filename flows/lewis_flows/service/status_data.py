"""What `lewis status` finds out: the parts of the service, its runs, and what the champions hold."""

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

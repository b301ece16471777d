"""What is wrong with the service, for whoever watches it: `lewis status --check`, with an exit code for each kind."""

from collections.abc import Iterator

from pydantic import BaseModel

from lewis_flows.service.status_data import Run, Status

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

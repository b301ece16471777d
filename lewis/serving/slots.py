"""The servers of `lewis up --serve`: two slots, blue and green, of which HAProxy gives one the requests of clients.

Two files of the store hold the wanted state and the current state. A run that serves a version writes the wanted state.
The part `champion` of `lewis up` starts and ends servers to reach it, also after a restart, and writes the current one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lewis import store

T = TypeVar("T")
NAMES = ("blue", "green")


@dataclass(frozen=True)
class Slot:
    """The model that the server of a slot must have.

    Attributes:
        alias: `Model.alias` of the version.
        folder: its files.
        base: folder of the model that the adapter sits on; empty for a full model.
        rank: the largest rank of adapters that the server takes.
    """

    alias: str
    folder: str
    base: str = ""
    rank: int = 0


@dataclass(frozen=True)
class Wanted:
    """The wanted state of the slots.

    Attributes:
        model: the registered model, whose name clients ask for.
        slots: name of a slot -> what its server must have; no server runs in other slots.
        traffic: the slot that gets the requests; empty before there is a champion.
        only: the one slot that may have a server, because memory is too small for two; empty: each may.
    """

    model: str
    slots: Mapping[str, Slot] = field(default_factory=dict)
    traffic: str = ""
    only: str = ""

    def slot_of(self, alias: str) -> str | None:
        """Return the name of the slot that must have a version, by its alias; None if there is none."""
        return next((name for name, slot in self.slots.items() if slot.alias == alias), None)


@dataclass(frozen=True)
class Running:
    """The current state of a slot.

    Attributes:
        alias: of the version that its server has; empty if it has no server.
        url: of the server, without /v1.
        ready: whether it answers.
        share: percent of the requests that it gets.
        failures: how often it has ended by itself, in a row.
        problem: how it ended last; empty if it runs.
    """

    alias: str
    url: str
    ready: bool = False
    share: int = 0
    failures: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Now:
    """The current state of `lewis up --serve`.

    Attributes:
        writer: its process, as `store.writer`.
        url: where clients send requests, without /v1.
        program: `vllm` or `transformers`.
        slots: name -> slot.
        system: where that process runs, as `store.system`.
    """

    writer: str
    url: str
    program: str
    slots: Mapping[str, Running]
    system: str = field(default_factory=store.system)

    def share(self, alias: str) -> int:
        """Percent of the requests that a version gets."""
        return sum(each.share for each in self.slots.values() if each.alias == alias)


def wanted() -> Wanted | None:
    """Read the wanted state of this machine's slots; None if it serves nothing, or the file has another form."""
    return _read(Wanted, Slot, _wanted())


def want(what: Wanted | None) -> None:
    """Write the wanted state of the slots; None: nothing is served."""
    if what is None:
        _wanted().unlink(missing_ok=True)
    else:
        store.write_json(_wanted(), asdict(what))


def now() -> Now | None:
    """Read the current state of the slots; None if `lewis up --serve` does not run, or the file has another form."""
    found = _read(Now, Running, _now())
    if found is None or store.has_restarted(found.system) or store.is_dead(found.writer, _now()):
        return None
    return found


def note(what: Now | None) -> None:
    """Write the current state of the slots; called by the serving process, with None when it ends."""
    if what is None:
        _now().unlink(missing_ok=True)
    else:
        store.write_json(_now(), asdict(what))


def is_ours(url: str) -> bool:
    """Whether a URL belongs to a server in one of the slots, which asks for the key of `lewis up --serve`."""
    found = now()
    return found is not None and any(url.startswith(f"{each.url}/") for each in found.slots.values())


def state() -> tuple[bool, str]:
    """Return whether the wanted state is reached, and what is served, in words."""
    what, found = wanted(), now()
    if what is None or found is None:
        return False, "does not run; `lewis up --serve` starts it"
    if not what.traffic:
        return True, f"waits for a champion of {what.model}"
    slot, alias = found.slots[what.traffic], what.slots[what.traffic].alias
    if slot.share and slot.alias == alias:
        return True, f"{alias} has {slot.share} % of the requests"
    return False, slot.problem or f"the server of {alias} is being started"


def _read(state: type[T], slot: type[Slot] | type[Running], path: Path) -> T | None:
    found: Any = store.read_json(path)
    try:
        return state(**{**found, "slots": {name: slot(**each) for name, each in found["slots"].items()}})
    except (TypeError, KeyError, AttributeError):  # absent, or not as this LEWIS writes it
        return None


def _wanted() -> Path:
    return store.home() / "champion.json"


def _now() -> Path:
    return store.home() / "champion-now.json"

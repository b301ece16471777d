"""The target `local`, which `lewis up --serve` adds to its recipe: a server of its own, behind HAProxy on one port.

A new version gets a server in the slot without traffic. It is checked there; then HAProxy gives it the requests, and
the old server ends when it has answered the requests that it has. An adapter is loaded into the running vLLM server if
that has the same base, which takes seconds, as with the kind `vllm`.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lewis import memory, settings
from lewis.errors import InputError, LewisError, TransientError
from lewis.models.lora.question import read_settings
from lewis.recipe.serve import Check, Target, VllmTarget
from lewis.registry import versions
from lewis.serving import slots, vllm
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.serving.slots import Now, Slot, Wanted

_PAUSE = 0.2  # seconds between two looks
_GPUS = ("/dev/nvidia0", "/dev/kfd")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as its largest rank
_MORE = 1.2  # memory that a server needs, as a multiple of the bytes of its weights
_GIVES_UP = 3  # failures of a server in a row after which `holds` is false, so that its files are verified again


class LocalTarget(Target):
    """This machine, under `lewis up --serve`.

    Attributes:
        timeout_minutes: how long a server may take to start.
        check: as in `VllmTarget`.
    """

    kind: Literal["local"] = "local"
    timeout_minutes: float = 30
    check: Check | None = Check()


def targets(name: str) -> list[Target]:
    """Return the target `local` of a registered model in a list; empty if this machine does not serve the model."""
    wanted = slots.wanted()
    return [LocalTarget()] if wanted and wanted.model == name else []


def offer(target: LocalTarget, model: Model, before: Served) -> None:
    """Start a server with the model, or load the adapter into the one that runs, and wait until it answers.

    Raises:
        TransientError: if `lewis up --serve` does not run.
        InputError: if it is an adapter, and there is no vLLM.
        LewisError: if there is not enough memory, or the server does not start.
    """
    wanted, now = _state()
    at = wanted.slot_of(model.alias)
    if at is None:
        new = _slot(model, now)
        if _takes(wanted, now, new):
            vllm.offer(_server(wanted, now), model)
            return
        at = next(name for name in slots.NAMES if name != wanted.traffic)
        alone = settings.UP_SERVE_SERVERS.get() == 1
        if wanted.traffic and not alone:
            _check_memory(new)
        others = {name: slot for name, slot in wanted.slots.items() if name == wanted.traffic}
        slots.want(replace(wanted, slots={**others, at: new}, only=at if alone else ""))
    _wait(target, at, lambda now: now.slots[at].alias == model.alias and now.slots[at].ready)


def api(target: LocalTarget, model: Model, before: Served) -> tuple[str, str]:
    """Return the URL of the API at which the offered model answers, and its name there."""
    wanted, now = _state()
    at = wanted.slot_of(model.alias) or wanted.traffic
    return f"{now.slots[at].url}/v1", model.alias if model.output == "lora" else model.name


def put(target: LocalTarget, model: Model, before: Served) -> str:
    """Move all requests to the new model; the old server ends by itself.

    Raises:
        TransientError, LewisError: as `offer`.
    """
    wanted, now = _state()
    at = wanted.slot_of(model.alias)
    if at is None:
        vllm.put(_server(wanted, now), model, before)
        at, slot = wanted.traffic, wanted.slots[wanted.traffic]
        slots.want(replace(wanted, slots={at: replace(slot, alias=model.alias, folder=str(model.folder))}))
        return model.alias
    slots.want(replace(wanted, traffic=at))
    try:
        _wait(target, at, lambda now: now.slots[at].share == 100)
    except LewisError:
        slots.want(replace(wanted, slots={name: slot for name, slot in wanted.slots.items() if name != at}, only=""))
        raise
    slots.want(Wanted(wanted.model, {at: wanted.slots[at]}, at))
    return model.alias


def withdraw(target: LocalTarget, model: Model, before: Served) -> None:
    """End the server that was started for a model, because it did not start or its check failed."""
    wanted = slots.wanted()
    at = wanted.slot_of(model.alias) if wanted else None
    if wanted and at and at != wanted.traffic:
        kept = {name: slot for name, slot in wanted.slots.items() if name != at}
        slots.want(replace(wanted, slots=kept, only=""))


def holds(target: LocalTarget, record: Served) -> bool:
    """Whether the version has the requests, or will have them as soon as its server is up again."""
    wanted, now = slots.wanted(), slots.now()
    at = wanted.slot_of(record.alias) if wanted else None
    if wanted is None or at is None or at != wanted.traffic:
        return False
    return now is None or now.slots[at].failures < _GIVES_UP


def _state() -> tuple[Wanted, Now]:
    wanted, now = slots.wanted(), slots.now()
    if wanted is None or now is None:
        raise TransientError("`lewis up --serve` does not run on this machine; start it")
    return wanted, now


def _slot(model: Model, now: Now) -> Slot:
    if model.output != "lora":
        return Slot(model.alias, str(model.folder))
    if now.program != "vllm":
        raise InputError(
            "this is an adapter, and `transformers serve` loads none: install vLLM, or give its program by "
            "LEWIS_UP_SERVE_COMMAND, or leave `output: {kind: lora}` out"
        )
    champion = versions.champion(model.name)
    if champion is None or champion.digest != model.digest:
        raise TransientError(f"{model.uri} is not the champion any more")
    base = versions.fetch(replace(champion, folder=model.folder)).base
    if base is None:
        raise LewisError(f"{model.uri}: the base of its adapter is gone, or has changed since the merge")
    rank = int(read_settings(model.folder)["r"])
    return Slot(model.alias, str(model.folder), str(base), next((each for each in _RANKS if each >= rank), rank))


def _takes(wanted: Wanted, now: Now, new: Slot) -> bool:
    """Whether the server that gets the requests can load the adapter of a new version."""
    has = wanted.slots.get(wanted.traffic)
    fits = bool(has and new.base and has.base == new.base and has.rank >= new.rank)
    return fits and now.slots[wanted.traffic].ready


def _server(wanted: Wanted, now: Now) -> VllmTarget:
    return VllmTarget(kind="vllm", url=now.slots[wanted.traffic].url)


def _check_memory(new: Slot) -> None:
    """Check that the machine's memory has room for a second server; servers on a GPU are not checked."""
    if any(Path(each).exists() for each in _GPUS) or not Path("/proc/meminfo").exists():
        return  # a server on a GPU says itself what it lacks
    folders = [Path(each) for each in (new.folder, new.base) if each]
    needs = _MORE * sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    if needs > (free := memory.available_bytes()):
        raise LewisError(
            f"a server next to the one that runs needs {needs / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: free "
            "some, or set LEWIS_UP_SERVE_SERVERS=1, which ends the old server first (requests fail meanwhile); then "
            "run `lewis serve`"
        )


def _wait(target: LocalTarget, at: str, found: Callable[[Now], bool]) -> None:
    """Wait until a slot is in the wanted state.

    Raises:
        TransientError: if `lewis up --serve` ends.
        LewisError: if the slot's server ends, or it takes too long.
    """
    deadline = time.monotonic() + 60 * target.timeout_minutes
    while not found(now := _state()[1]):
        if (slot := now.slots[at]).failures:
            raise LewisError(f"its server does not stay up: {slot.problem}")
        if time.monotonic() > deadline:
            raise LewisError(f"its server did not answer within {target.timeout_minutes:g} minutes")
        time.sleep(_PAUSE)

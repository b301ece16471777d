"""Put the champion into service at a target: verify its files, have the target serve them, record the result."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from lewis import store
from lewis.errors import InputError, LewisError, TransientError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.recipe.recipe import Recipe
from lewis.recipe.serve import Target
from lewis.registry import promotion, tracking, versions
from lewis.registry.tracking import AwayError
from lewis.registry.versions import Champion, Version
from lewis.serving import (
    canary,
    command,
    haproxy,
    hub,
    inference_service,
    kserve,
    local,
    model,
    openai,
    records,
    server_gate,
    vllm,
    webhook,
)
from lewis.serving.model import OutdatedError
from lewis.serving.records import Failure, Served

logger = logging.getLogger(__name__)
AGAIN = timedelta(minutes=5)  # pause after an attempt that failed because a server did not answer


@dataclass(frozen=True)
class Kind:
    """The functions of one kind of targets.

    Attributes:
        offer: makes the server answer for a new model while clients still get the old one; None: it cannot.
        put: puts a model into service, and returns the name that the server knows it by; if it raises, the target
            keeps what it had.
        withdraw: undoes `offer` if that or the check fails; None: there is nothing to undo.
        api: the URL of the OpenAI API and the name by which that knows the model, for the check; None: there is none.
        holds: whether the target still has what its record says; None: the target cannot be asked.
    """

    put: Callable[[Any, model.Model, Served], str]
    holds: Callable[[Any, Served], bool] | None = None
    offer: Callable[[Any, model.Model, Served], None] | None = None
    api: Callable[[Any, model.Model, Served], tuple[str, str] | None] | None = None
    withdraw: Callable[[Any, model.Model, Served], None] | None = None


KINDS: Mapping[str, Kind] = {
    "webhook": Kind(webhook.put),
    "command": Kind(command.put),
    "vllm": Kind(vllm.put, vllm.holds, vllm.offer, vllm.api),
    "openai": Kind(openai.put, api=openai.api),
    "haproxy": Kind(haproxy.put, haproxy.holds, haproxy.offer, haproxy.api),
    "kserve": Kind(kserve.put, kserve.holds, kserve.offer, kserve.api),
    "inference service": Kind(
        inference_service.put, inference_service.holds, inference_service.offer, inference_service.api
    ),
    "hub": Kind(hub.put),
    "local": Kind(local.put, local.holds, local.offer, local.api, local.withdraw),
}
"""`Target.form` -> the functions of that kind."""


def champion_of(recipe: Recipe) -> Champion | None:
    """Return the champion, the version that the targets of a recipe must serve; None if there is none yet."""
    return versions.champion(recipe.register_as.model) if recipe.register_as else None


def owner_of(recipe: Recipe) -> str:
    """Return the name of a recipe of a `register.group`, whose records are apart from other recipes'; else empty."""
    return recipe.name if recipe.register_as and recipe.register_as.group else ""


def serve(
    target: Target,
    champion: Champion,
    settings: EvalSettings | None = None,
    *,
    owner: str = "",
    again: bool = False,
) -> tuple[Served, bool]:
    """Put the champion into service at a target, unless the target has it already.

    If the version that the target has was rolled back, the champion takes its place without a canary, which could
    refuse it: a server that answers at length is slower than one that answers nothing.

    Args:
        target: of the recipe.
        champion: the version.
        settings: of the evaluation that scored it, whose answers the server has to give; None: it was not scored.
        owner: as `owner_of` returns it.
        again: put it into service even if the target has it.

    Returns:
        What the target has now, and whether this call put it there.

    Raises:
        OutdatedError: if the version is not the champion, or another one becomes it before all clients have this one;
            what the target had stays in service.
        InputError, TransientError, LewisError: as the functions of the kind; what the target had stays in service, and
            the record has the reason.
    """
    name, uri, block = champion.version.name, champion.version.uri, _digest(target)
    kind = KINDS[target.form]
    with store.SharedLock(f"serve-{name}-{target.label}"):
        before = record_of(name, target, owner)
        if owner and not before.recipe:
            before = _owned(before, owner)
        if (before.uri, before.digest, before.block) == (uri, champion.digest, block) and not again:
            if _still_holds(kind, target, before):
                return before, False
            logger.warning("%s: %s is not there any more; putting it there again", target.label, uri)
        previous, ready = before.previous if before.uri == uri else before.uri, None
        try:
            _check_champion(champion.version)
            ready = model.prepare(champion, previous or None, before.since)
            check = partial(_check_champion, champion.version)
            ready = replace(ready, check_champion=check, at_once=before.uri != uri and _is_withdrawn(before))
            checked, alias = _bring(kind, target, ready, before, settings)
        except AwayError:  # MLflow, not the target
            raise
        except LewisError as error:
            if not isinstance(error, OutdatedError):  # which is no failure of the target
                _write(before.refused(uri, str(error), passes=isinstance(error, TransientError)))
            if ready and ready.steps:
                records.write_canary(champion.version, target.label, ready.steps, str(error))
            stays = f"{before.uri} stays in service" if before.uri else "nothing is in service there"
            raise _alike(error, f"{uri} is not in service at {target.label}, {stays}: {error}") from error
        now = before.took(uri, champion.digest, alias, block, checked)
        _write(now)
        if ready.steps:
            records.write_canary(champion.version, target.label, ready.steps)
    logger.info("%s: %s is in service as %s", target.label, now.uri, now.alias)
    return now, True


def is_due(targets: Sequence[Target], champion: Champion, owner: str = "") -> bool:
    """Whether a run that serves these targets in order now may bring one of them to the champion.

    The targets are looked at in order. One that took the champion is passed over, unless its server says that it has
    lost it. The first of the others decides, since a run ends at the first target that fails:

    * The champion was not tried there, or was lost: a run is due.
    * The last attempt to serve it there failed: a run is due if that was more than `AGAIN` ago, and if the cause may
      have passed by itself, or the version that the target has was rolled back.

    Args:
        targets: of a recipe.
        champion: the version that they are to have.
        owner: as `owner_of` returns it.
    """
    for target in targets:
        record = record_of(champion.version.name, target, owner)
        if record.failure and record.failure.uri == champion.version.uri:
            return _may_try_again(record, record.failure)
        if _lacks(target, champion, record):
            return True
    return False


def _may_try_again(record: Served, failure: Failure) -> bool:
    age = datetime.now(UTC) - datetime.fromisoformat(failure.time)
    return age > AGAIN and (failure.passes or (record.uri != failure.uri and _is_withdrawn(record)))


def _lacks(target: Target, champion: Champion, record: Served) -> bool:
    if (record.uri, record.block) != (champion.version.uri, _digest(target)):
        return True
    holds = KINDS[target.form].holds
    try:
        return holds is not None and not holds(target, record)
    except LewisError:  # the server does not answer now; it is asked again later
        return False


def _is_withdrawn(record: Served) -> bool:
    """Whether the version that a target has in service was rolled back."""
    return bool(record.uri) and promotion.withdrawn(record.name, record.digest) is not None


def _check_champion(version: Version) -> None:
    if not promotion.is_champion(version.name, version.version):
        raise OutdatedError(f"{version.uri} is not the champion any more")


def _digest(target: Target) -> str:
    return store.digest(target.model_dump(mode="json"))


def _still_holds(kind: Kind, target: Target, record: Served) -> bool:
    try:
        return kind.holds is None or kind.holds(target, record)
    except LewisError:  # serving it will fail and report why
        return False


def _bring(
    kind: Kind, target: Target, ready: model.Model, before: Served, settings: EvalSettings | None
) -> tuple[str, str]:
    """Put a model into service if its check passes; return what the check found, and the model's name there."""
    if kind.offer:
        try:
            kind.offer(target, ready, before)
            checked = _check(kind, target, ready, before, settings)
            ready.check_champion()
        except LewisError:
            if kind.withdraw:
                kind.withdraw(target, ready, before)
            raise
        return checked, kind.put(target, ready, before)
    alias = kind.put(target, ready, before)
    try:
        return _check(kind, target, ready, before, settings), alias
    except LewisError:
        if before.alias:  # clients reach it already: go back to the version before
            kind.put(target, model.before(before), before)
        raise


def _check(kind: Kind, target: Target, ready: model.Model, before: Served, settings: EvalSettings | None) -> str:
    """Send the server the scored model's requests, if the target has a check; return the result as a sentence."""
    block, place = getattr(target, "check", None), kind.api(target, ready, before) if kind.api else None
    if block is None or place is None:
        return ""
    kept = server_gate.requests(ready.digest, settings)
    if not kept:
        logger.warning("%s: %s is not checked: its evaluation has kept no answers", target.label, ready.uri)
        return "not checked: its evaluation has kept no answers"
    checked = server_gate.check(*place, kept, block)
    server_gate.judge(checked)
    logger.info("%s: %s: %s", target.label, ready.uri, checked.line())
    return checked.line()


def _alike(error: LewisError, message: str) -> LewisError:
    """An error of the same kind, with another message."""
    if isinstance(error, server_gate.RefusedError):
        return server_gate.RefusedError(message, error.differing)
    kinds = canary.WorseError, OutdatedError, InputError, TransientError, LewisError
    return next(each for each in kinds if isinstance(error, each))(message)


def record_of(name: str, target: Target, owner: str = "") -> Served:
    """Return the record of what a target has in service of a registered model; without a version if it has nothing.

    Args:
        name: of the registered model.
        target: of a recipe. Targets of several recipes with one label and one block are one target, with one record.
        owner: as `owner_of` returns it.
    """
    with tracking.client(f"reading what is in service of {name}") as client:
        known = list(records.read(client, name))
    return _find(known, target, owner) or Served(name, target.label, target.kind, recipe=owner)


def _find(known: Sequence[Served], target: Target, owner: str) -> Served | None:
    """Return the record of a target: that of its block, else its recipe's, else one that no recipe owns."""
    block = _digest(target)
    alike = [each for each in known if (each.target, each.kind) == (target.label, target.kind)]
    found = [each for each in alike if each.block == block or not owner or each.recipe in (owner, "")]
    return max(found, key=lambda each: 2 if each.block == block else each.recipe == owner, default=None)


def _owned(record: Served, owner: str) -> Served:
    """Give the record that no recipe owns to a recipe; return the new one."""
    new = replace(record, recipe=owner)
    with tracking.client(f"recording what is in service of {record.name}") as client:
        records.write(client, new)
        records.remove(client, record)
    return new


def _write(record: Served) -> None:
    with tracking.client(f"recording what is in service of {record.name}") as client:
        records.write(client, record)


def tidy(name: str, targets: Sequence[Target], owner: str = "") -> None:
    """Remove records of targets that left the recipe, and files of versions that are served nowhere.

    For each target, the version before the one in service stays on the disk, for a return to it. Records of other
    recipes of a `register.group` stay, and so does `local`, which may be another machine.

    Args:
        name: of the registered model.
        targets: all of the recipe.
        owner: as `owner_of` returns it.
    """
    with tracking.client(f"reading what is in service of {name}") as client:
        known = list(records.read(client, name))
        own = [_find(known, each, owner) for each in targets]
        gone = [each for each in known if each not in own and each.kind != "local" and owner in ("", each.recipe)]
        for each in gone:
            records.remove(client, each)
    kept = {alias for each in known if each not in gone for alias in (each.alias, each.previous_alias)}
    model.remove_others(name, kept)

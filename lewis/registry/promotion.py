"""Promotion: the aliases of a registered model are moved by the gate's verdict or by hand.

Everything happens under the registry's lock. First the champion must still be the version that the gate compared with.
Then a record is written to the history, and the move to the outbox, so that it is reported even if this process dies.
The alias `champion`, which alone says what is in use, moves last.

A version that passed the gate may wait for a person's approval. Its tags say until when, and which champion the gate
compared it with: that must still be the champion.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation.gate import Incumbent, Standing, Verdict
from lewis.registry import history, outbox, repair, tracking, versions
from lewis.registry.aliases import move_champion, set_alias
from lewis.registry.outbox import Move
from lewis.registry.repair import WITHDRAWN
from lewis.registry.versions import Champion, Version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

WAITING = "waiting"
"""The value of the tag `lewis.verdict` of a version that passed the gate and is not approved yet."""

_UNTIL, _BESIDE = "lewis.approve_until", "lewis.approve_beside"
"""Tags of a version that waits: until when (UTC, ISO 8601), and what the gate compared it with."""


@dataclass(frozen=True)
class Promotion:
    """What `promote` did.

    Attributes:
        moved: whether the alias `champion` moved to the version.
        new: whether a record was added to the history; none is if the newest one has the same verdict and reasons.
        previous: `uri` of the version that had the alias before; None if there was no champion.
    """

    moved: bool
    previous: str | None
    new: bool = False


def promote(version: Version, verdict: Verdict, by: str = "", about: Mapping[str, Any] | None = None) -> Promotion:
    """Record the verdict on the version and move the aliases: `champion` if it passed, else `challenger`.

    A version that a person has to approve gets `challenger`. If the version is the champion already, no alias moves.

    Args:
        by: who promotes, for the history; by default the name of the user.
        about: further data to report with the move, as `Move.about`.

    Raises:
        LewisError: if the champion changed after the comparison, or the version's files are lost or damaged.
    """
    with store.SharedLock(f"registry-{version.name}"), tracking.client(f"promoting {version.uri}") as client:
        current = versions.champion_of(client, version.name)
        before = current.version.uri if current is not None else None
        if before == version.uri:
            logger.info("%s already is the champion", version.uri)
            if "lewis.verdict" not in client.get_model_version(version.name, version.version).tags:
                client.set_model_version_tag(version.name, version.version, "lewis.verdict", "passed")
            history.follow(client, version.name)  # finish what a process that died left undone
            return Promotion(moved=False, previous=before)
        if verdict.passed:
            _check_still_champion(current, verdict)
            if versions.whole(client, version.name, version.version) is None:
                raise LewisError(f"{version.uri}: its files are lost or damaged; run again to register it")
        said = WAITING if verdict.waits else "passed" if verdict.passed else "failed"
        tags = {
            **({history.METRIC: verdict.metric} if verdict.metric else {}),
            **({history.LUCK: f"{verdict.luck:.6g}"} if verdict.luck is not None else {}),
            **({history.MARK: (verdict.mark or version.uri).rpartition("/")[2]} if verdict.passed else {}),
        }
        if verdict.waits:
            tags |= _ask(client, version, verdict, before, by)
        facts = {"verdict": said, "compared with": verdict.compared_with, "reasons": verdict.reasons}
        file = {"verdict.json": json.dumps(facts, indent=2).encode()}
        if tracking.run_of(client, version.run_id):
            tracking.log_files(client, version.run_id, file, checked=True)
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.version, key, value)
        what = "waits" if verdict.waits else "promoted" if verdict.passed else "rejected"
        new = history.record(client, version.name, what, version.uri, before, "; ".join(verdict.reasons), by)
        moves = verdict.passed and not verdict.waits
        if moves:
            move = Move(version.name, version.version, before, list(verdict.reasons), dict(about or {}))
            move_champion(client, move)
        else:
            set_alias(client, version.name, "challenger", version.version)
        # Last: a version without a verdict is judged again, so what a process that died left undone is done then.
        client.set_model_version_tag(version.name, version.version, "lewis.verdict", said)
        history.follow(client, version.name)
        return Promotion(moves, before, new)


def promote_by_hand(name: str, version: str, why: str) -> str:
    """Make a version the champion by hand; return the `uri` of the champion before, empty if there was none.

    Raises:
        InputError: if there is no such version, its files are gone or damaged, it is the champion already, or no reason
            is given.
    """
    name = tracking.model_name(name)
    tracking.check_exists(name)
    with store.SharedLock(f"registry-{name}"), tracking.client(f"promoting {name}/{version}") as client:
        before = _move(client, name, version, "promoted by hand", why, becomes_mark=True)
        if client.get_model_version(name, version).tags.get("lewis.verdict") == WAITING:
            client.set_model_version_tag(name, version, "lewis.verdict", "passed")
        return before


def approve(name: str, version: str, why: str, by: str = "") -> str:
    """Approve a version that waits: make it the champion; return the `uri` of the one before, empty if there was none.

    Args:
        by: who approves, for the history; by default the name of the user.

    Raises:
        InputError: if it does not wait; if it can no longer be approved, because its time is up or the champion is
            not the one that the gate compared it with; if its files are gone or damaged; or if no reason is given.
    """
    name = tracking.model_name(name)
    tracking.check_exists(name)
    with store.SharedLock(f"registry-{name}"), tracking.client(f"approving {name}/{version}") as client:
        aliases = _aliases(client, name)
        if aliases.get("champion") == version:  # a process that approved it died after it had moved the alias
            _tags_of_waiting(client, name, version)
            before = f"models:/{name}/{aliases['previous']}" if "previous" in aliases else ""
        else:
            _check_waits(client, name, version, aliases.get("champion"))
            before = _move(client, name, version, "approved", why, by=by)
        client.set_model_version_tag(name, version, "lewis.verdict", "passed")
        return before


def is_waiting(name: str, version: str) -> bool:
    """Whether the verdict on a version is that it waits for approval; it stays so when it can no longer be approved."""
    name = tracking.model_name(name)
    with tracking.client(f"reading {name}/{version}") as client:
        found = versions.lookup(client, name, number=version)
    return found is not None and found.tags.get("lewis.verdict") == WAITING


def has_lapsed(tags: Mapping[str, str], champion: str) -> bool:
    """Whether a version that waits for approval can no longer be approved.

    Args:
        tags: of the version.
        champion: the number of the champion's version; empty if there is none.
    """
    until = _until(tags)
    return until is None or until < datetime.now(UTC) or _number(tags.get(_BESIDE, "")) != champion


def _until(tags: Mapping[str, str]) -> datetime | None:
    """Return until when a version waits for approval, in UTC if its tag names no time zone; None if it says no time."""
    try:
        found = datetime.fromisoformat(tags.get(_UNTIL, ""))
    except ValueError:  # a person has changed the tag in MLflow
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _number(compared: str) -> str:
    """Return the version number of the champion that a gate compared with; empty if there was no champion."""
    return compared.rpartition("/")[2] if compared.startswith("models:/") else ""


def is_champion(name: str, version: str) -> bool:
    """Whether a version is the champion."""
    return champion_number(name) == version


def champion_number(name: str) -> str | None:
    """Return the number of the champion's version; None if there is no champion.

    Raises:
        InputError: if there is no such model.
    """
    name = tracking.model_name(name)
    tracking.check_exists(name)
    with tracking.client(f"reading the champion of {name}") as client:
        return _aliases(client, name).get("champion")


def refuse(name: str, version: str, why: str, by: str = "") -> None:
    """Refuse a version that waits for approval. Later runs do not ask for its approval again.

    Raises:
        InputError: if it does not wait, or is the champion; or if no reason is given.
    """
    name = tracking.model_name(name)
    if not why.strip():
        raise InputError("--why: expected a reason, which `lewis history` will show")
    tracking.check_exists(name)
    with store.SharedLock(f"registry-{name}"), tracking.client(f"refusing {name}/{version}") as client:
        _tags_of_waiting(client, name, version)
        champion = _aliases(client, name).get("champion")
        if champion == version:  # a process that approved it died after it had moved the alias
            raise InputError(f"models:/{name}/{version} is the champion: take it back with `lewis rollback {name}`")
        before = f"models:/{name}/{champion}" if champion else None
        history.record(client, name, "refused", f"models:/{name}/{version}", before, why, by)
        client.set_model_version_tag(name, version, WITHDRAWN, why)
        client.set_model_version_tag(name, version, "lewis.verdict", "failed")
        history.follow(client, name)


def rollback(name: str, why: str, expected: str | None = None) -> str:
    """Make the previous champion the champion again; return its `uri`. No gate promotes the withdrawn version again.

    Args:
        expected: the number of the version to withdraw; None: the champion, whichever that is.

    Raises:
        InputError: if the version to withdraw is not the champion; if there is no previous champion, it was withdrawn
            itself, or its files are gone or damaged.
    """
    name = tracking.model_name(name)
    tracking.check_exists(name)
    with store.SharedLock(f"registry-{name}"), tracking.client(f"rolling back {name}") as client:
        aliases = _aliases(client, name)
        current, previous = aliases.get("champion"), aliases.get("previous")
        if expected not in (None, current):
            now = f"models:/{name}/{current}" if current else "none"
            raise InputError(
                f"models:/{name}/{expected} is not rolled back, since the champion is {now} by now; roll that back, or "
                f"see `lewis history {name}`"
            )
        if current is None:  # there never was one, or its version was deleted
            raise InputError(
                f"{name}: there is no champion to roll back; `lewis promote` makes a version the champion, and `lewis "
                f"history {name}` shows which ones were"
            )
        if current == previous:  # a process died between the two aliases
            moves = [each for each in history.read(client, name) if each.what not in history.REFUSED]
            to_current = [each.champion or "" for each in moves if each.version == f"models:/{name}/{current}"]
            previous = "".join(to_current[-1:]).rpartition("/")[2] or None
        if previous is None or current == previous:
            raise InputError(f"{name}: there is no previous champion to go back to; see `lewis history {name}`")
        reason = client.get_model_version(name, previous).tags.get(WITHDRAWN)
        if reason is not None:
            raise InputError(
                f"models:/{name}/{previous}, the previous champion, was rolled back itself ({reason}); "
                f"`lewis history {name}` shows all, `lewis promote` makes one of them the champion"
            )
        _move(client, name, previous, "rolled back", why, withdrawing=current)
        return f"models:/{name}/{previous}"


def withdrawn(name: str, digest: str) -> str | None:
    """Return the reason why a merge's version was refused or rolled back by hand; None if it was not.

    If the version's files are damaged, the reason also holds for the version that is registered in its place.
    """
    name = versions.check(name, digest)
    with tracking.client(f"reading the versions of {name}") as client:
        known = versions.of_digest(client, name, digest)
        if not known:
            return repair.inherited(client, name, digest).get(WITHDRAWN)
        return next((each.tags[WITHDRAWN] for each in known if WITHDRAWN in each.tags), None)


def standing(name: str, digest: str) -> Standing:
    """Return what the gate that judges a merge needs from the history of a registered model.

    The mark of a champion that no gate promoted is the champion itself.
    """
    name = versions.check(name, digest)
    with tracking.client(f"reading the history of {name}") as client:
        found, judged = _mark(client, name), list[str]()
        mark = Incumbent(Version.of(found).uri, versions.digest_in(found.tags)) if found else None
        with suppress(InputError):  # no version is registered yet
            judged = history.judged(history.read(client, name), mark.uri if mark else None)
        own = {Version.of(each).uri for each in versions.of_digest(client, name, digest)}
    number = next((place for place, uri in enumerate(judged, 1) if uri in own), len(judged) + 1)
    return Standing(mark, number, withdrawn(name, digest))


def mark(name: str) -> Champion | None:
    """Return the mark, which no later version may be worse than, as a model to score; None without a champion."""
    name = tracking.model_name(name)
    with tracking.client(f"reading the mark of {name}") as client:
        found = _mark(client, name)
        return versions.as_model(client, found, versions.model_of(client, found)) if found else None


def _mark(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """The version that the champion's tag names as its mark, if that still exists, else the champion."""
    champion = versions.lookup(client, name, alias="champion")
    number = champion.tags.get(history.MARK) if champion else None
    return (versions.lookup(client, name, number=number) if number else None) or champion


def _check_still_champion(current: Champion | None, verdict: Verdict) -> None:
    uri = current.version.uri if current is not None else None
    expected = verdict.compared_with if verdict.compared_with.startswith("models:/") else None
    if uri != expected:
        raise LewisError(
            f"the gate compared with {verdict.compared_with}, but the champion is {uri or 'none'} by now; "
            "run the flow again"
        )


def _ask(client: "MlflowClient", version: Version, verdict: Verdict, champion: str | None, by: str) -> dict[str, str]:
    """Return the tags of a version that begins to wait, none if it waits already; record an earlier wait as lapsed."""
    known = client.get_model_version(version.name, version.version).tags
    now = datetime.now(UTC)
    if known.get("lewis.verdict") == WAITING and _UNTIL in known:
        same = known.get(_BESIDE) == verdict.compared_with
        if same and (until := _until(known)) and until > now:
            return {}
        why = "nobody approved it in time" if same else f"it was compared with {known.get(_BESIDE)}"
        history.record(client, version.name, "lapsed", version.uri, champion, why, by)
    until = now + timedelta(hours=verdict.approve_hours or 0)
    return {_UNTIL: until.isoformat(timespec="seconds"), _BESIDE: verdict.compared_with}


def _tags_of_waiting(client: "MlflowClient", name: str, version: str) -> dict[str, str]:
    """Return the tags of a version, which must be waiting for approval.

    Raises:
        InputError: if there is no such version, or it does not wait.
    """
    uri, found = f"models:/{name}/{version}", versions.lookup(client, name, number=version)
    if found is None:
        raise InputError(f"{uri}: no such version; see `lewis history {name}`")
    if (verdict := found.tags.get("lewis.verdict")) != WAITING:
        given = verdict or "none yet"
        raise InputError(f"{uri}: it waits for no approval, its verdict is: {given}; see `lewis history {name}`")
    return dict(found.tags)


def _check_waits(client: "MlflowClient", name: str, version: str, champion: str | None) -> None:
    """Check that a version waits for approval, that its time is not up, and that the champion is still the same."""
    uri, tags = f"models:/{name}/{version}", _tags_of_waiting(client, name, version)
    again = "run its recipe again, which judges it again"
    if (until := _until(tags)) is None:
        raise InputError(f"{uri}: expected a time in its tag {_UNTIL} in MLflow, got {tags.get(_UNTIL)!r}; {again}")
    if until < datetime.now(UTC):
        raise InputError(f"{uri}: it waited for approval until {until:%Y-%m-%d %H:%M} UTC; {again}")
    if has_lapsed(tags, champion or ""):
        now = f"models:/{name}/{champion}" if champion else None
        raise InputError(
            f"{uri}: the gate compared it with {tags.get(_BESIDE)}, but the champion is {now} by now; {again}"
        )


def _move(
    client: "MlflowClient",
    name: str,
    version: str,
    what: str,
    why: str,
    withdrawing: str | None = None,
    by: str = "",
    becomes_mark: bool = False,
) -> str:
    if not why.strip():
        raise InputError("--why: expected a reason, which `lewis history` will show")
    current = _aliases(client, name).get("champion")
    if version == current:
        raise InputError(f"models:/{name}/{version} is the champion already")
    if (found := versions.whole(client, name, version)) is None:
        raise InputError(
            f"models:/{name}/{version}: no such version, or its files are gone or damaged; see `lewis history {name}`"
        )
    before = f"models:/{name}/{current}" if current else None
    history.record(client, name, what, f"models:/{name}/{version}", before, why, by)
    if withdrawing is not None:
        client.set_model_version_tag(name, withdrawing, WITHDRAWN, why)
    if WITHDRAWN in found.tags:
        client.delete_model_version_tag(name, version, WITHDRAWN)
    if becomes_mark:  # a gate may have passed it earlier, and have left the mark at an earlier version
        client.set_model_version_tag(name, version, history.MARK, version)
    about = {"digest": found.tags.get("lewis.digest", "")}
    move_champion(client, Move(name, version, before, [f"{what}: {why}"], about))
    history.follow(client, name)
    return before or ""


def settle() -> None:
    """Settle the moves in the outbox whose writer died: find out from the alias `champion` whether each happened."""
    for name in outbox.unsettled():
        with store.SharedLock(f"registry-{name}"), tracking.client(f"reading the champion of {name}") as client:
            try:
                champion = _aliases(client, name).get("champion")
            except InputError:  # the model was deleted: nothing to report
                champion = None
            outbox.settle(name, champion)


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in history.registered_model(client, name).aliases.items()}

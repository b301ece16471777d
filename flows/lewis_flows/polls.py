"""The results of polls, kept in the store: the last poll, and since when each champion is behind."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ValidationError

from lewis import store
from lewis.registry import releases
from lewis.registry.releases import Held

RETRY_AFTER = timedelta(hours=1)  # after a failed run, its release is announced again
_KEPT = 50  # commits remembered per model: the oldest says since when it is behind, a champion may be of any later one


class Poll(BaseModel):
    """The result of the last poll.

    Attributes:
        time: when it ended, UTC.
        checked: how many recipes it compared with the registry.
        problems: recipe -> why it could not be checked; under an empty name, why none could.
    """

    time: datetime
    checked: int = 0
    problems: dict[str, str] = {}


class _Seen(BaseModel):
    """What the polls remember about each recipe.

    Attributes:
        commits: recipe -> reference of a model -> the commits that its champion misses and when each was seen, oldest
            first.
        champions: as `champions` gives it.
    """

    commits: dict[str, dict[str, list[tuple[str, datetime]]]] = {}
    champions: dict[str, tuple[str, str]] = {}


def last() -> Poll | None:
    """The last poll of all recipes; None if there was none."""
    try:
        return Poll.model_validate(store.read_json(_last_file()))
    except ValidationError:
        return None


def remember(checked: int, problems: dict[str, str]) -> bool:
    """Store what a poll found. Returns whether its problems differ from those of the poll before."""
    before, now = last(), Poll(time=datetime.now(UTC), checked=checked, problems=problems)
    store.write_json(_last_file(), now.model_dump(mode="json"))
    return problems != (before.problems if before else {})


def note_missed(
    heads: Mapping[str, Mapping[str, str]], held: Mapping[str, Sequence[Held]], recipes: Sequence[str]
) -> None:
    """Note the champions, and the commits that they miss. Prefect's events have those too, but only of seven days.

    Args:
        heads: recipe -> reference -> commit key now, of the recipes that could be checked.
        held: recipe -> its registered versions.
        recipes: names of all recipes; what is known of others is forgotten.
    """
    before, now = _seen(), datetime.now(UTC)
    known = before.commits
    found = {name: commits for name, commits in known.items() if name in recipes}
    for name, current in heads.items():
        champion = releases.champion(held[name])
        missed = {}
        for ref, head in current.items() if champion else ():
            holds, seen = champion.commit_of(ref) if champion else None, known.get(name, {}).get(ref, [])
            if holds == head:
                continue
            keys = [key for key, _ in seen]
            seen = seen[keys.index(holds) + 1 :] if holds in keys else seen
            if not seen or seen[-1][0] != head:
                seen = [*seen, (head, now)]
            missed[ref] = seen if len(seen) <= _KEPT else [seen[0], *seen[1 - _KEPT :]]
        found[name] = missed
    kept = {name: versions for name, versions in before.champions.items() if name in recipes}
    champions = kept | {name: _named(versions) for name, versions in held.items()}
    if (after := _Seen(commits=found, champions=champions)) != before:
        store.write_json(_seen_file(), after.model_dump(mode="json"))


def _named(versions: Sequence[Held]) -> tuple[str, str]:
    champion, waits = releases.champion(versions), releases.waiting(versions)
    return champion.version if champion else "", waits.version if waits else ""


def champions() -> dict[str, tuple[str, str]]:
    """Return recipe -> its champion and the version that waits for approval, as polls saw them last; "" for none."""
    return _seen().champions


def behind_since() -> dict[str, datetime | None]:
    """Return recipe -> when the first commit was seen that its champion misses, UTC; None if it misses none.

    A recipe is left out until a poll could check it, and while it registers nothing.
    """
    commits = _seen().commits
    return {name: min((seen[0][1] for seen in refs.values()), default=None) for name, refs in commits.items()}


def newest_missed() -> dict[str, datetime | None]:
    """Return recipe -> when the last commit was seen that its champion misses, as `behind_since` gives the first."""
    commits = _seen().commits
    return {name: max((seen[-1][1] for seen in refs.values()), default=None) for name, refs in commits.items()}


def _seen() -> _Seen:
    try:
        return _Seen.model_validate(store.read_json(_seen_file()) or {})
    except ValidationError:
        return _Seen()


def _last_file() -> Path:
    return store.home() / "last-poll.json"


def _seen_file() -> Path:
    return store.home() / "behind.json"

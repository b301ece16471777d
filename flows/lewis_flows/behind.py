"""Since when a champion is behind: what the polls saw of commits that it was not merged from.

It is a file in the store, `behind.json`. Prefect's events would tell the same, but only of the last seven days.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from lewis import store
from lewis.registry import releases
from lewis.registry.releases import Held

_KEPT = 50  # commits remembered per model: the oldest says since when it is behind, a champion may be of any later one


class _Seen(BaseModel):
    """Recipe -> reference of a model -> the commits that its champion misses and when each was seen, oldest first."""

    commits: dict[str, dict[str, list[tuple[str, datetime]]]] = {}


def note(heads: Mapping[str, Mapping[str, str]], held: Mapping[str, Sequence[Held]], recipes: Sequence[str]) -> None:
    """Note what a poll saw.

    Args:
        heads: recipe -> reference -> commit key now, of the recipes that could be checked.
        held: recipe -> its registered versions.
        recipes: names of all recipes; what is known of others is forgotten.
    """
    known, now = _read().commits, datetime.now(UTC)
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
    if found != known:
        store.write_json(_path(), _Seen(commits=found).model_dump(mode="json"))


def since() -> dict[str, datetime | None]:
    """Recipe -> when the first commit was seen that its champion misses, UTC; None if it misses none.

    A recipe is left out until a poll could check it, and while it registers nothing.
    """
    commits = _read().commits
    return {name: min((seen[0][1] for seen in refs.values()), default=None) for name, refs in commits.items()}


def _read() -> _Seen:
    try:
        return _Seen.model_validate(store.read_json(_path()) or {})
    except ValidationError:
        return _Seen()


def _path() -> Path:
    return store.home() / "behind.json"

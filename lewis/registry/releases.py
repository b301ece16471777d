"""What was released since the last merge: compares the current commits of base and experts with the registry.

No state is kept: what has been merged is read from the tags of the registered versions at each call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lewis.errors import InputError
from lewis.models.hub.pin import find_folder
from lewis.models.source import Source, commits_of
from lewis.recipe.block import parts_of
from lewis.registry import lineage, tracking
from lewis.registry.history import in_tags, last_judged, registered_model
from lewis.registry.promotion import WAITING, has_lapsed
from lewis.registry.repair import WITHDRAWN


@dataclass(frozen=True)
class Held:
    """A registered version and what it was merged from.

    Attributes:
        version: its number in MLflow.
        digest: of the merge, 64 hex digits.
        verdict: of the gate: `passed`, `failed`, `waiting` for approval, or empty if there is none yet.
        aliases: the aliases that point to it, sorted.
        sources: tag -> commit key of an input; see `commit_of`.
        published: `org/name@commit` on the Hub; empty if it is not there.
        lapsed: whether it waited for a person's approval, and can no longer be approved.
        judged: when a gate judged it last (UTC, ISO 8601); empty if the history does not say.
        withdrawn: whether it was rolled back or refused by hand.
    """

    version: str
    digest: str
    verdict: str
    aliases: tuple[str, ...]
    sources: Mapping[str, str]
    published: str = ""
    lapsed: bool = False
    judged: str = ""
    withdrawn: bool = False

    def commit_of(self, ref: str) -> str | None:
        """The commit key of an input, by its reference in the recipe; None if the version has no such input."""
        return lineage.commit_of(self.sources, ref)


@dataclass(frozen=True)
class Moved:
    """A model whose current commit is not the one that was merged.

    Attributes:
        ref: as the recipe names it.
        repo: `org/name`, or the absolute path of a folder; for `base+adapter`, the part that moved.
        old: the commit key that was merged; None if none was.
        new: the commit key now.
    """

    ref: str
    repo: str
    old: str | None
    new: str


def heads(base: Source | None, experts: Sequence[Source]) -> dict[str, str]:
    """Return the current commit keys of the base and of every expert, which were just pinned, by reference."""
    return {source.ref: source.key for source in (base, *experts) if source}


def merged(name: str) -> list[Held]:
    """The versions of a registered model that LEWIS made and whose files were not found lost, newest first.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
        InputError: if this store was used with an MLflow that the environment does not name.
    """
    name = tracking.model_name(name)
    tracking.check_not_elsewhere()
    if not tracking.exists():  # a question should not create a database
        return []
    with tracking.client(f"reading the versions of {name}") as client:
        try:
            model = registered_model(client, name)
        except InputError:  # before the first registration
            return []
        versions = [v for v in client.search_model_versions(f"name='{name}'") if v.tags.get("lewis.digest")]
    aliases, judged = model.aliases, last_judged(in_tags(name, model.tags))
    number = str(aliases.get("champion", ""))
    return [
        Held(
            version=str(version.version),
            digest=version.tags["lewis.digest"],
            verdict=version.tags.get("lewis.verdict", ""),
            aliases=tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))),
            sources=lineage.sources(version.tags),
            published=version.tags.get("lewis.published", ""),
            lapsed=version.tags.get("lewis.verdict") == WAITING and has_lapsed(version.tags, number),
            judged=judged.get(f"models:/{name}/{version.version}", ""),
            withdrawn=WITHDRAWN in version.tags,
        )
        for version in sorted(versions, key=lambda version: int(version.version), reverse=True)
    ]


def champion(held: Sequence[Held]) -> Held | None:
    """Return the version in use, among a model's registered versions; None if there is none."""
    return next((version for version in held if "champion" in version.aliases), None)


def waiting(held: Sequence[Held]) -> Held | None:
    """Return the version that waits for approval, has the alias `challenger` and may still be approved; else None."""
    return next((each for each in approvable(held) if "challenger" in each.aliases), None)


def approvable(held: Sequence[Held]) -> list[Held]:
    """Return the versions that passed their gate, wait for a person, and may still be approved."""
    return [each for each in held if each.verdict == WAITING and not each.lapsed]


def moved(heads: Mapping[str, str], held: list[Held], *, base: str | None, root: Path) -> list[Moved]:
    """Return the models whose current commit is not in the newest merge; empty if that was judged.

    If an author takes a release back, the current commits are those of an earlier merge that was judged. Then the
    models are returned whose commits differ from those of the version that a gate judged last, so that this one does
    not stay the champion. It is judged once more for that, unless it is the champion or was withdrawn by hand.

    Only the first expert is returned, as one release is enough to start a merge, if the recipe was never merged, or if
    the run that merged the current commits died before the gate's verdict.

    Args:
        heads: what `heads` returned.
        held: what `merged` returned; the heads are compared with the first, or the one that was judged last.
        base: the recipe's reference of the base.
        root: the folder that relative paths start from.
    """
    first = next((ref for ref in heads if ref != base), base or "")  # slices may be of the base alone
    if not held:
        return [Moved(first, _repo(first, None, heads[first], root), None, heads[first])]
    current = [version for version in held if all(version.commit_of(ref) == head for ref, head in heads.items())]
    if current and not any(version.verdict for version in current):  # its run died before the gate's verdict
        return [Moved(first, _repo(first, None, heads[first], root), heads[first], heads[first])]
    last = _judged_since(current, held, heads) if current else held[0]
    if last is None:
        return []
    pairs = {ref: (last.commit_of(ref), head) for ref, head in heads.items()}
    found = [Moved(ref, _repo(ref, old, new, root), old, new) for ref, (old, new) in pairs.items() if old != new]
    base_moved = any(each.ref == base for each in found)
    # The commit key of an adapter without its own base contains the recipe's base, which may have moved alone.
    alone = {each.ref for each in found if len(parts_of(each.ref, root)) == 1}
    return [x for x in found if not (base_moved and x.ref in alone and _same_adapter(x.old, x.new))]


def _judged_since(current: list[Held], held: list[Held], heads: Mapping[str, str]) -> Held | None:
    """The version that a gate judged after those of the current commits; None if these need not be judged again."""
    if any("champion" in version.aliases or version.withdrawn for version in current):
        return None
    # Of a `register.group`, only the versions of recipes with these models: theirs alone follow the same releases.
    same = [version for version in held if None not in map(version.commit_of, heads)]
    last = max(same, key=lambda version: (version.judged, int(version.version)))
    return None if last in current or any(version.verdict and not version.judged for version in current) else last


def _same_adapter(old: str | None, new: str) -> bool:
    before, after = commits_of(old or ""), commits_of(new)
    return len(before) > 1 and before[1:] == after[1:]


def _repo(ref: str, old: str | None, new: str, root: Path) -> str:
    parts = parts_of(ref, root)
    before, after = commits_of(old or ""), commits_of(new)
    moved = [part for part, one, other in zip(parts, before, after, strict=False) if one != other]
    ref = moved[0] if len(parts) == len(before) == len(after) and moved else parts[-1]
    folder = find_folder(ref, root)
    return str(folder) if folder else ref.partition("@")[0]

"""The inputs that a version was merged from: their commits and content digests, and the tags that hold these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lewis import store
from lewis.registry import tracking

if TYPE_CHECKING:
    from lewis.importance.step import CalibrationEntry
    from lewis.models.source import ModelFiles

SOURCE = "lewis.source."  # the tag of an input starts with it


def lineage_of(
    base: ModelFiles | None, experts: Sequence[ModelFiles], calibrations: Sequence[CalibrationEntry]
) -> dict[str, str]:
    """Return reference in the recipe -> commit or content digest, of every input; of rows, `calibration:<name>`."""
    models = {files.ref: files.key for files in [*([base] if base else []), *experts]}
    return models | {f"calibration:{each.name}": each.digest for each in calibrations}


def source_tag(ref: str) -> str:
    """Return the name of the version's tag for the commit or digest of an input; several references may share one."""
    return tracking.key(f"{SOURCE}{ref.replace('/', '--')}")


def _own_tag(ref: str) -> str:
    """Return the tag's name for an input whose `source_tag` another input of the version has too, as long paths may."""
    end = f".{store.digest(ref)[:16]}"
    return source_tag(ref)[: tracking.MAX_KEY - len(end)] + end


def tags_of(lineage: Mapping[str, str]) -> dict[str, str]:
    """Return the tags for a version's inputs: name -> commit or content digest, which `commit_of` finds in them."""
    shared = Counter(map(source_tag, lineage))
    return {_own_tag(ref) if shared[source_tag(ref)] > 1 else source_tag(ref): key for ref, key in lineage.items()}


def commit_of(sources: Mapping[str, str], ref: str) -> str | None:
    """Return the commit or content digest of a version's input by its reference; None if there is no such input."""
    return sources.get(_own_tag(ref)) or sources.get(source_tag(ref))


def sources(tags: Mapping[str, str]) -> dict[str, str]:
    """Select the tags of a version that hold the commits and content digests of its inputs."""
    return {tag: key for tag, key in tags.items() if tag.startswith(SOURCE)}


def by_reference(sources: Mapping[str, str], known: Iterable[str]) -> dict[str, str]:
    """Return reference -> commit or content digest, of the inputs of a version.

    A reference cannot be read from its tag exactly, because MLflow does not accept every character.

    Args:
        sources: the version's tags, as `sources` selects them.
        known: references to look for. Where a tag belongs to none of them, the reference is guessed from the tag.
    """
    known = list(known)
    names = {source_tag(ref): ref for ref in known} | {_own_tag(ref): ref for ref in known}
    return {names.get(tag) or tag.removeprefix(SOURCE).replace("--", "/"): key for tag, key in sources.items()}

"""What the registered versions need of the store: their checkpoints, what these were made from, and their scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis import store
from lewis.registry import lineage, tracking
from lewis.store import kinds
from lewis.store.housekeeping import Needed

_NOT_MADE_FROM = ", no registered version was made from it"


@dataclass(frozen=True)
class _Versions:
    """What the tags and manifests of all registered versions say.

    Attributes:
        merges: digests of the registered merges.
        inputs: commits and digests of all that they were made from.
        means: expert -> mean density, of each merge that has densities.
    """

    merges: set[str]
    inputs: set[str]
    means: list[dict[str, float]]

    def is_merge(self, path: Path) -> bool:
        """Whether a checkpoint is registered."""
        return path.stem in self.merges

    def is_calibration(self, path: Path) -> bool:
        """Whether a version was made from a calibration set."""
        return path.stem in self.inputs

    def is_importance(self, path: Path) -> bool:
        """Whether a version was made from this model and this calibration set."""
        content = _content(path)
        return {content.get("model"), content.get("calibration")} <= self.inputs

    def is_allocation(self, path: Path) -> bool:
        """Whether a version has these mean densities: an allocation does not say which merge it is for."""
        experts = _content(path).get("experts") or {}
        return {ref: fields.get("mean") for ref, fields in experts.items()} in self.means

    def is_score(self, path: Path) -> bool:
        """Whether a registered model, or one that it was made from, has these scores."""
        return _content(path).get("model") in self.inputs | self.merges


def by_versions() -> dict[str, Needed]:
    """What `housekeeping.survey` has to keep, by the name of the kind; asks MLflow for all registered versions.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    found = _read()
    return {
        kinds.MERGED.name: Needed(found.is_merge, ", not registered"),
        kinds.IMPORTANCE.name: Needed(found.is_importance, _NOT_MADE_FROM),
        kinds.ALLOCATIONS.name: Needed(found.is_allocation, _NOT_MADE_FROM),
        kinds.CALIBRATIONS.name: Needed(found.is_calibration, _NOT_MADE_FROM),
        kinds.SCORES.name: Needed(found.is_score, ", not of a registered version or what it was made from"),
    }


def _read() -> _Versions:
    tags: list[dict[str, str]] = []
    if tracking.exists():  # without a database nothing was registered, and a look should not create one
        with tracking.client("listing the registered versions") as client:
            token: str | None = None
            while token is None or token:
                page = client.search_model_versions(max_results=1000, page_token=token)
                tags += [version.tags for version in page]
                token = page.token or ""
    merges = {each["lewis.digest"] for each in tags if each.get("lewis.digest")}
    inputs = {key for each in tags for key in lineage.sources(each).values()}
    manifests = [store.read_json(kinds.MERGED.path(digest) / store.MANIFEST) or {} for digest in merges]
    return _Versions(merges, inputs, [found["mean_density"] for found in manifests if found.get("mean_density")])


def _content(path: Path) -> dict[str, Any]:
    """What an entry holds; nothing if it is damaged."""
    content = store.read_json(path)
    return content if isinstance(content, dict) else {}

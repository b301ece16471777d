"""Which entries of the store the registered versions need: their checkpoints, the inputs of these, and scores."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis import store
from lewis.registry import lineage, tracking
from lewis.store import kinds
from lewis.store.housekeeping import Needed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_NOT_MADE_FROM = ", no registered version was made from it"


@dataclass(frozen=True)
class _Versions:
    """What all registered versions were made of, from their tags and manifests.

    Attributes:
        merges: digests of the registered merges.
        inputs: commits and content digests of everything that they were made from.
        means: expert -> mean density, one mapping for each merge that has densities.
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
        """Whether a version was made from the model and the calibration set of a measurement."""
        content = _content(path)
        return {content.get("model"), content.get("calibration")} <= self.inputs

    def is_statistics(self, path: Path) -> bool:
        """Whether a version was made from the model and the calibration set of second-order statistics."""
        content = _content(path / store.MANIFEST)
        return {content.get("model"), content.get("calibration")} <= self.inputs

    def is_allocation(self, path: Path) -> bool:
        """Whether a version has the mean densities of an allocation, which does not name its merge."""
        experts = _content(path).get("experts") or {}
        return {ref: fields.get("mean") for ref, fields in experts.items()} in self.means

    def is_score(self, path: Path) -> bool:
        """Whether scores are of a registered merge, or of a model that one was made from."""
        return _content(path).get("model") in self.inputs | self.merges


def by_versions() -> dict[str, Needed]:
    """For `housekeeping.survey`: name of a kind -> what to keep of it. Asks MLflow for all registered versions.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    found = _read()
    return {
        kinds.MERGED.name: Needed(found.is_merge, ", not registered"),
        kinds.IMPORTANCE.name: Needed(found.is_importance, _NOT_MADE_FROM),
        kinds.GRAMS.name: Needed(found.is_statistics, _NOT_MADE_FROM),
        kinds.ALLOCATIONS.name: Needed(found.is_allocation, _NOT_MADE_FROM),
        kinds.CALIBRATIONS.name: Needed(found.is_calibration, _NOT_MADE_FROM),
        kinds.SCORES.name: Needed(found.is_score, ", not of a registered version or what it was made from"),
    }


def all_versions(client: "MlflowClient") -> Iterator["ModelVersion"]:
    """All versions of all registered models."""
    token: str | None = None
    while token is None or token:
        page = client.search_model_versions(max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def _read() -> _Versions:
    tags: list[dict[str, str]] = []
    if tracking.exists():  # without a database nothing was registered, and a look should not create one
        with tracking.client("listing the registered versions") as client:
            tags = [version.tags for version in all_versions(client)]
    merges = {each["lewis.digest"] for each in tags if each.get("lewis.digest")}
    inputs = {key for each in tags for key in lineage.sources(each).values()}
    manifests = [store.read_json(kinds.MERGED.path(digest) / store.MANIFEST) or {} for digest in merges]
    return _Versions(merges, inputs, [found["mean_density"] for found in manifests if found.get("mean_density")])


def _content(path: Path) -> dict[str, Any]:
    """What an entry holds; nothing if it is damaged."""
    content = store.read_json(path)
    return content if isinstance(content, dict) else {}

"""Retention: which entries of the store the registered versions need, and which old runs of MLflow nothing needs.

A version needs its checkpoint, the inputs that this was made from, and the scores of both.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis import settings, store
from lewis.registry import history, lineage, logged_model, tracking
from lewis.store import housekeeping, kinds, size
from lewis.store.housekeeping import Needed
from lewis.store.outdated import Outdated
from lewis.store.runs import active_since

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)
_PARENT = "mlflow.parentRunId"
_FLOW_RUN = "lewis.prefect.flow_run_id"
_NOT_MADE_FROM = ", no registered version was made from it"


def by_versions() -> dict[str, Needed]:
    """Return which entries the registered versions need, by the name of their kind, for `housekeeping.survey`.

    Raises:
        InputError: if the versions are in an MLflow that the environment does not name.
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    merges, inputs, means, rounded = _registered()
    models = inputs | merges

    def is_measured_for_one(path: Path) -> bool:  # norms or second-order statistics: of a model and a calibration set
        content = _content(path)
        return {content.get("model"), content.get("calibration")} <= inputs

    def is_allocation_of_one(path: Path) -> bool:  # by its mean densities: an allocation does not name its merge
        experts = _content(path).get("experts") or {}
        found = {ref: fields.get("mean", 0.0) for ref, fields in experts.items()}
        return found in means or sorted(f"{mean:.6f}" for mean in found.values()) in rounded

    return {
        kinds.MERGED.name: Needed(lambda path: path.stem in merges, ", not registered"),
        kinds.IMPORTANCE.name: Needed(is_measured_for_one, _NOT_MADE_FROM),
        kinds.GRAMS.name: Needed(is_measured_for_one, _NOT_MADE_FROM),
        kinds.ALLOCATIONS.name: Needed(is_allocation_of_one, _NOT_MADE_FROM),
        kinds.CALIBRATIONS.name: Needed(lambda path: path.stem in inputs, _NOT_MADE_FROM),
        kinds.SCORES.name: Needed(
            lambda path: _content(path).get("model") in models,
            ", not of a registered version or what it was made from",
        ),
    }


def runs(before: float) -> tuple[list[Outdated], set[str]]:
    """Find old runs of MLflow to delete: they made no version, hold no chart and are not the newest search of a name.

    Args:
        before: Unix time in seconds.

    Returns:
        Those runs, and the ids of the Prefect runs that made registered versions, which must be kept.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    if not tracking.exists():  # a search should not create a database
        return [], set()
    with tracking.client("looking for old runs") as client:
        versions = {str(version.run_id) for version in tracking.every(client.search_model_versions)}
        found = {str(run.info.run_id): run for run in _all_runs(client)}
    kept = {key for key, run in found.items() if key in versions or history.CHART in run.data.tags}
    newest: dict[str, tuple[float, str]] = {}
    for key, run in found.items():
        if key not in kept and _PARENT not in run.data.tags:
            name = str(run.info.run_name)
            newest[name] = max(newest.get(name, (0.0, "")), (float(run.info.start_time), key))
    kept |= {key for _, key in newest.values()}
    kept |= {found[key].data.tags.get(_PARENT, "") for key in kept}
    old = [
        Outdated("mlflow", f"run {run.info.run_name}, {run.info.status.lower()}", key, run.info.end_time / 1000)
        for key, run in found.items()
        if key not in kept and run.data.tags.get(_PARENT) not in kept and _ended_before(run, before)
    ]
    flow_runs = {found[key].data.tags.get(_FLOW_RUN, "") for key in versions & found.keys()} - {""}
    return old, flow_runs


def remove(found: Outdated) -> None:
    """Delete a run, and the models that it logged if no version has them; `mlflow gc` frees their rows and files.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    with tracking.client(f"deleting {found.what}") as client:
        experiment = client.get_run(found.key).info.experiment_id
        models = client.search_logged_models([experiment], f"source_run_id = '{found.key}'")
        for model in models:
            if not any(
                key.startswith("mlflow.modelVersions") and model.tags[key] not in ("", "[]") for key in model.tags
            ):
                logged_model.discard(client, model)
        client.delete_run(found.key)


def _all_runs(client: "MlflowClient") -> Iterator["Run"]:
    """Return all runs that LEWIS logged, in its experiment and in the experiments of the teams."""
    base = tracking.experiment_name()
    ids = [e.experiment_id for e in client.search_experiments() if e.name == base or e.name.startswith(f"{base}/")]
    found = tracking.every(client.search_runs, ids) if ids else ()
    return (run for run in found if any(tag.startswith("lewis.") for tag in run.data.tags))


def _ended_before(run: "Run", before: float) -> bool:
    return run.info.status != "RUNNING" and bool(run.info.end_time) and run.info.end_time / 1000 < before


def _registered() -> tuple[set[str], set[str], list[dict[str, float]], list[list[str]]]:
    """Read from tags, manifests and runs what all registered versions were made from.

    Returns:
        The digests of the merges; commits and content digests of everything that they were made from; for each merge
        that has densities, expert -> mean density; and of merges that only other machines have, the mean densities as
        their runs have them: sorted, with six digits.
    """
    tags: list[dict[str, str]] = []
    rounded = list[list[str]]()
    tracking.check_not_elsewhere()
    if tracking.exists():  # without a database nothing was registered, and a search should not create one
        with tracking.client("listing the registered versions") as client:
            versions = list(tracking.every(client.search_model_versions))
            tags = [version.tags for version in versions]
            if elsewhere := {version.run_id for version in versions if _is_elsewhere(version.tags)}:
                runs = [run.data.params for run in _all_runs(client) if run.info.run_id in elsewhere]
                rounded = [sorted(run[key] for key in run if key.startswith("mean_density/")) for run in runs]
    merges = {each["lewis.digest"] for each in tags if each.get("lewis.digest")}
    inputs = {key for each in tags for key in lineage.sources(each).values()}
    manifests = [store.read_json(kinds.MERGED.path(digest) / store.MANIFEST) or {} for digest in merges]
    means = [found["mean_density"] for found in manifests if found.get("mean_density")]
    return merges, inputs, means, [each for each in rounded if each]


def _is_elsewhere(tags: Mapping[str, str]) -> bool:
    """Whether a version's merge is not in this store, by the version's tags."""
    return "lewis.digest" in tags and not kinds.MERGED.path(tags["lewis.digest"]).exists()


def _content(path: Path) -> dict[str, Any]:
    """Return the JSON of an entry of the store, or of its manifest; empty if it is damaged."""
    content = store.read_json(path / store.MANIFEST if path.is_dir() else path)
    return content if isinstance(content, dict) else {}


def make_room(needed: int) -> int:
    """Remove entries from the store until its quota leaves `needed` bytes; return the number of bytes freed.

    Entries that no registered version needs are removed, the longest unused first. Entries stay that were used in the
    last hour, or since the start of a run that is going on, or that began in the last week and died. Without a quota
    nothing is removed.

    Raises:
        InputError: if `LEWIS_QUOTA` is no size, or the versions are in an MLflow that the environment does not name.
        LewisError: if MLflow does not answer, or something cannot be removed.
    """
    quota = settings.QUOTA.get()
    if quota is None or (missing := size.total() + needed - quota) <= 0:
        return 0
    # Dead runs count, too: one that is run again needs what it had used. This is read first, since `by_versions` may
    # miss a version that is registered by a run which ends in between.
    began = active_since(dead=True)
    found = housekeeping.survey(0, needed=by_versions(), active_since=began)
    chosen, sum_ = list[housekeeping.Removable](), 0
    for item in sorted(found, key=lambda each: each.last_used):
        if sum_ >= missing:
            break
        if item.bytes:
            chosen.append(item)
            sum_ += item.bytes
    freed = housekeeping.remove(chosen)
    if chosen:
        logger.warning(
            "LEWIS_QUOTA leaves too little: %d entries that nothing needs were removed, %.2f GB, the longest unused "
            "first", len(chosen), freed / 1e9,
        )  # fmt: skip
    return freed

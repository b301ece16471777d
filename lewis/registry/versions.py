"""The model registry: MLflow is the source of truth for what was merged from what, and for which version is in use.

A version appears as the last step of a registration, so what is visible is complete. Alias `champion` is the version in
use, `previous` the one before (to go back to), `challenger` the last one that the gate refused.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.registry import logged_model, tracking
from lewis.reports.card import FRONT_MATTER
from lewis.store import kinds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

MAX_DESCRIPTION = 5000  # characters
SOURCE = "lewis.source."  # tags of a version: what it was merged from


@dataclass(frozen=True)
class Entry:
    """What to register.

    Attributes:
        name: of the registered model.
        folder: the merged checkpoint as `store.publish` left it; never rewritten afterwards.
        digest: of the merge, 64 hex digits: the identity of the version.
        params: of the recipe, flat.
        metrics: as in `{"merged/gsm8k/exact_match,none": 0.5, "base/...": ...}`. Those of `merged` go on the version.
        lineage: commit or content digest of every input, by its reference in the recipe.
        recipe: YAML.
        pictures: PNG files by name.
        tables: rows by name.
        card: Markdown, the version's description.
        tags: further tags of a new version, such as where it was made.
        documents: name of a metric -> task and digest of the documents that it was measured on.
    """

    name: str
    folder: Path
    digest: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    lineage: Mapping[str, str]
    recipe: str
    pictures: Mapping[str, bytes]
    tables: Mapping[str, list[dict[str, Any]]]
    card: str
    tags: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """A version of a registered model; `uri` is what `mlflow.transformers.load_model` takes."""

    name: str
    version: str
    run_id: str
    uri: str
    created: bool


@dataclass(frozen=True)
class Champion:
    """The version in use.

    Attributes:
        digest: of its merge; empty if LEWIS did not register it, or its files were lost.
        folder: its checkpoint on this disk; None if the artifacts are remote or damaged.
        metrics: its scores by `task/metric,filter`.
        sources: commit or content digest of every input, by `source_tag` of its reference.
    """

    version: Version
    digest: str
    folder: Path | None
    metrics: Mapping[str, float]
    sources: Mapping[str, str] = field(default_factory=dict)


def configure() -> None:
    """Choose the tracking store: `MLFLOW_TRACKING_URI`, or a database in the store. Creates both it and the experiment.

    Raises:
        TransientError: if the server does not answer.
        LewisError: if MLflow refuses.
    """
    with tracking.client("opening the tracking store"):
        pass


def register(entry: Entry) -> Version:
    """Register a merged checkpoint, once per digest.

    Raises:
        InputError: if the name or the digest is malformed.
        LewisError: if the checkpoint is damaged, or MLflow or the disk refuses; the run is FAILED, no version exists.
        TransientError: if the server does not answer.
    """
    name = _check(entry.name, entry.digest)
    if store.read_manifest(entry.folder) is None:
        raise LewisError(f"{entry.folder}: expected a whole merged checkpoint, files are missing or cut; merge again")
    with store.lock(f"registry-{name}"), tracking.client(f"registering {name}") as client:
        found = _find(client, name, entry.digest)
        if found is not None:
            _close_runs(client, name, entry.digest, finished=found.run_id)
            return found
        _clear_leftovers(client, name, entry.digest)
        return _create(client, name, entry)


def find(name: str, digest: str) -> Version | None:
    """The version of a merge, if it is registered and all its files are still there with their sizes."""
    name = _check(name, digest)
    with tracking.client(f"looking for {name}") as client:
        return _find(client, name, digest)


def champion(name: str) -> Champion | None:
    """The version in use, or None before the first promotion."""
    name = model_name(name)
    with tracking.client(f"reading the champion of {name}") as client:
        return champion_of(client, name)


def fetch(current: Champion) -> Champion:
    """Bring the checkpoint of a champion to this disk, if MLflow's artifacts are remote and the store has lost it.

    Raises:
        TransientError: if the server does not answer.
        LewisError: if MLflow or the disk refuses.
    """
    if current.folder is not None or not re.fullmatch("[0-9a-f]{64}", current.digest):
        return current
    folder = kinds.MERGED.path(current.digest)
    with kinds.MERGED.lock(current.digest), tracking.client(f"fetching {current.version.uri}") as client:
        if (store.read_manifest(folder) or {}).get("digest") != current.digest:
            version = client.get_model_version(current.version.name, current.version.version)
            model = _model_of(client, version)
            if model is None:
                return current
            logged_model.download(client, model, folder)
    return replace(current, folder=folder)


def link(version: Version) -> str:
    """Where MLflow's UI shows the version: on the tracking server, or where `mlflow ui` would serve by default."""
    return f"{_server()}/#/models/{quote(version.name)}/versions/{version.version}"


def run_link(version: Version) -> str:
    """Where MLflow's UI shows the run that made the version."""
    return f"{_server()}/#/runs/{version.run_id}"


def attach(version: Version, files: Mapping[str, str]) -> None:
    """Put text files, by name, beside what the version's run has logged.

    Raises:
        TransientError: if the server does not answer.
        LewisError: if MLflow or the disk refuses.
    """
    with tracking.client(f"attaching {', '.join(files)} to {version.uri}") as client:
        tracking.log_files(client, version.run_id, {name: text.encode() for name, text in files.items()})


def tag(version: Version, tags: Mapping[str, str]) -> None:
    """Put further tags on a version.

    Raises:
        TransientError: if the server does not answer.
        LewisError: if MLflow refuses.
    """
    with tracking.client(f"tagging {version.uri}") as client:
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.version, key, value)


def source_tag(ref: str) -> str:
    """The tag of a version that holds the commit or content digest of an input."""
    return tracking.key(f"{SOURCE}{ref.replace('/', '--')}")


def is_whole(client: "MlflowClient", name: str, version: str) -> bool:
    """Whether a version exists with all its files."""
    from mlflow.exceptions import MlflowException

    try:
        return _model_of(client, client.get_model_version(name, version)) is not None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def _create(client: "MlflowClient", name: str, entry: Entry) -> Version:
    from mlflow.entities import LoggedModelOutput

    experiment = tracking.experiment(client)
    tags = {"lewis.name": name, "lewis.digest": entry.digest}
    run_id = client.create_run(experiment, tags=tags, run_name=f"{name}-{entry.digest[:8]}").info.run_id
    try:
        plain = re.sub(r"[.%]", "_", name)  # a LoggedModel takes fewer characters than a registered model
        model = client.create_logged_model(experiment, plain, run_id, tags=tags, model_type="merged-llm")
        sizes = logged_model.write(client, model, entry.folder, entry.card)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        _log_run(client, run_id, model.model_id, entry)
        _create_registered_model(client, name)
        version = client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            model_id=model.model_id,
            tags=_version_tags(entry, sizes),
            description=tracking.cut(FRONT_MATTER.sub("", entry.card), MAX_DESCRIPTION, "card.md"),  # it would show it
            await_creation_for=0,
        )
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            _fail(client, experiment, run_id)
        raise
    client.set_terminated(run_id)
    logger.info("registered %s as version %s", name, version.version)
    return _version(version, created=True)


def _log_run(client: "MlflowClient", run_id: str, model_id: str, entry: Entry) -> None:
    import pandas as pd

    tracking.log_numbers(client, run_id, model_id, entry.params, entry.metrics, entry.documents)
    lineage = json.dumps(dict(entry.lineage), indent=2)
    texts = {"recipe.yaml": entry.recipe, "card.md": entry.card, "lineage.json": lineage}
    tracking.log_files(client, run_id, {**{name: text.encode() for name, text in texts.items()}, **entry.pictures})
    for name, rows in entry.tables.items():
        client.log_table(run_id, pd.DataFrame(rows), f"{name}.json")


def _version_tags(entry: Entry, sizes: Mapping[str, int]) -> dict[str, str]:
    merged = {k.removeprefix("merged/"): v for k, v in entry.metrics.items() if k.startswith("merged/")}
    return {
        "lewis.digest": entry.digest,
        "lewis.metrics": json.dumps(merged, sort_keys=True),
        "lewis.files": json.dumps(sizes),
        "lewis.recipe_digest": store.digest(entry.recipe),
        **{source_tag(ref): commit for ref, commit in entry.lineage.items()},
        **entry.tags,
    }


def _create_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(client: "MlflowClient", name: str, digest: str) -> Version | None:
    for found in _versions(client, name, digest):
        if _model_of(client, found) is not None:
            return _version(found, created=False)
    return None


def _versions(client: "MlflowClient", name: str, digest: str) -> list["ModelVersion"]:
    return list(client.search_model_versions(f"name='{name}' and tags.`lewis.digest`='{digest}'"))


def _model_of(client: "MlflowClient", version: "ModelVersion") -> "LoggedModel | None":
    """The LoggedModel behind a version, if all its files are still there."""
    from mlflow.exceptions import MlflowException

    model_id = (version.source or "").removeprefix("models:/")
    sizes = json.loads(version.tags.get("lewis.files", "{}"))
    try:
        return client.get_logged_model(model_id) if logged_model.is_whole(client, model_id, sizes) else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def champion_of(client: "MlflowClient", name: str) -> Champion | None:
    """`champion`, with a client that is open already."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(name, "champion")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            return None
        raise
    model = _model_of(client, version)
    folder = logged_model.local_folder(model) if model is not None else None
    return Champion(
        version=_version(version, created=False),
        digest=version.tags.get("lewis.digest", ""),
        folder=folder and folder / logged_model.CHECKPOINT,
        metrics=json.loads(version.tags.get("lewis.metrics", "{}")),
        sources={key: commit for key, commit in version.tags.items() if key.startswith(SOURCE)},
    )


def _clear_leftovers(client: "MlflowClient", name: str, digest: str) -> None:
    """Clear what earlier attempts left: the half-made of a killed process, and versions that lost their files."""
    for version in _versions(client, name, digest):
        logger.warning("version %s of %s lost its files; registering it anew", version.version, name)
        client.set_model_version_tag(name, version.version, "lewis.damaged", digest)
        client.delete_model_version_tag(name, version.version, "lewis.digest")
    _close_runs(client, name, digest, finished=None)
    for model in client.search_logged_models([tracking.experiment(client)], _made_by(name, digest)):
        if model.status == "FAILED":
            logged_model.discard(client, model)


def _close_runs(client: "MlflowClient", name: str, digest: str, finished: str | None) -> None:
    """End the runs whose process died: well if it had created the version `finished` belongs to, else as FAILED."""
    experiment = tracking.experiment(client)
    for run in client.search_runs([experiment], f"{_made_by(name, digest)} and attributes.status = 'RUNNING'"):
        if run.info.run_id == finished:
            client.set_terminated(run.info.run_id)
        else:
            _fail(client, experiment, run.info.run_id)


def _fail(client: "MlflowClient", experiment: str, run_id: str) -> None:
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        client.finalize_logged_model(model.model_id, "FAILED")
    client.set_terminated(run_id, "FAILED")


def _made_by(name: str, digest: str) -> str:
    return f"tags.`lewis.name` = '{name}' and tags.`lewis.digest` = '{digest}'"


def _server() -> str:
    uri = os.environ.get("LEWIS_MLFLOW_UI") or os.environ.get("MLFLOW_TRACKING_URI", "")  # `lewis up` sets the first
    if not uri.startswith("http"):
        return "http://127.0.0.1:5000"
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")  # no password in a link


def _version(version: "ModelVersion", created: bool) -> Version:
    uri = f"models:/{version.name}/{version.version}"
    return Version(version.name, str(version.version), version.run_id or "", uri, created)


def model_name(name: str) -> str:
    """`name` without what MLflow or its filters refuse."""
    cleaned = re.sub(r"[/:\"'`]", "_", name).strip()
    if not cleaned.strip("."):
        raise InputError(f"register.name: expected the name of a registered model, got {name!r}")
    return cleaned


def _check(name: str, digest: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise InputError(f"{name}: expected a digest of 64 hex digits, got {digest!r}")
    return model_name(name)

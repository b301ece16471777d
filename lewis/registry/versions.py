"""The versions of a registered model, and the champion among them.

MLflow is the source of truth for what was merged from what, and for which version is in use. The alias `champion` is
the version in use, `previous` the one before it (to go back to), `challenger` the last one that the gate refused.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from lewis import settings, store
from lewis.errors import InputError
from lewis.models.hub import repository
from lewis.models.lora.expert import is_adapter
from lewis.models.lora.question import read_settings
from lewis.models.source import ModelFiles
from lewis.registry import lineage, logged_model, tracking
from lewis.store import kinds
from lewis.store.manifest import DamagedError

logger = logging.getLogger(__name__)
DAMAGED = "lewis.damaged"  # tag of a version whose files are lost or damaged; its value is the digest of its merge
_DIGITS = 9  # of a version's number: a database fails on one that its integers cannot hold
MODE = "?workflowType=machine_learning"  # opens MLflow's pages for models; by default it shows traces and prompts
PAGE = "report.html"  # artifact of the run that made a version: its scores, pictures and steps

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        version: its number.
        run_id: of the MLflow run that made it.
        uri: `models:/<name>/<version>`, which `mlflow.transformers.load_model` takes.
        created: whether the call that returned it created it; False: it existed already.
    """

    name: str
    version: str
    run_id: str
    uri: str
    created: bool

    @classmethod
    def of(cls, version: "ModelVersion", *, created: bool = False) -> "Version":
        """Convert MLflow's description of a version."""
        uri = f"models:/{version.name}/{version.version}"
        return cls(version.name, str(version.version), version.run_id or "", uri, created)


@dataclass(frozen=True)
class Champion:
    """The version in use, or another one to be used in the same way, with its files, scores and inputs of the merge.

    Attributes:
        digest: of its merge; empty if LEWIS did not register it.
        folder: its checkpoint or adapter on this disk; None if the artifacts are remote or damaged.
        base: folder of the model that the adapter sits on, once `fetch` has found it; None for a full checkpoint.
        metrics: `task/metric,filter` -> score.
        sources: tag of an input -> its commit or content digest; see `lewis.registry.lineage`.
    """

    version: Version
    digest: str
    folder: Path | None
    metrics: Mapping[str, float]
    sources: Mapping[str, str] = field(default_factory=dict)
    base: Path | None = None

    def files(self, ref: str) -> ModelFiles | None:
        """Return the version as a model to score; None without its files, or without the base of an adapter."""
        if self.folder is None or not self.digest:
            return None
        if not is_adapter(self.folder):
            return ModelFiles.at(ref, self.digest, self.folder)
        return ModelFiles.at(ref, self.digest, self.base, self.folder) if self.base else None


def configure() -> None:
    """Open MLflow's tracking store (`MLFLOW_TRACKING_URI` or a database in the store); create it and the experiment.

    Raises:
        TransientError: if the server does not answer.
        LewisError: if MLflow refuses.
    """
    with tracking.client("opening the tracking store"):
        pass


def champion(name: str) -> Champion | None:
    """Return the version of a registered model that is in use; None before the first promotion."""
    name = tracking.model_name(name)
    with tracking.client(f"reading the champion of {name}") as client:
        return champion_of(client, name)


def fetch(current: Champion) -> Champion:
    """Download a champion's files, if MLflow's artifacts are remote, and an adapter's base; return it with the folders.

    Its folder stays None if the artifacts are damaged, which is logged.

    Raises:
        TransientError: if the server, or the Hub that has the base, does not answer.
        LewisError: if MLflow or the disk refuses.
    """
    current = fetch_files(current)
    if current.folder is None or not is_adapter(current.folder):
        return current
    return replace(current, base=_base_of(current, current.folder))


def _base_of(current: Champion, adapter: Path) -> Path | None:
    """Fetch the base that an adapter names, return its folder; None if it is gone or has changed since the merge."""
    settings = read_settings(adapter)
    name, revision = settings["base_model_name_or_path"], settings.get("revision")
    try:
        pinned = repository.resolve(f"{name}@{revision}" if revision else name, adapter)
        if pinned.commit in current.sources.values():
            return repository.fetch(pinned)
        why = "it has changed since the merge"
    except InputError as error:
        why = str(error)
    logger.warning("%s: its base %s cannot be used: %s", current.version.uri, name, why)
    return None


def fetch_files(current: Champion) -> Champion:
    """Download a version's files if MLflow's artifacts are remote and not in the store; return it with the folder."""
    if current.folder is not None or not re.fullmatch("[0-9a-f]{64}", current.digest):
        return current
    folder = kinds.MERGED.path(current.digest)
    with kinds.MERGED.lock(current.digest), tracking.client(f"fetching {current.version.uri}") as client:
        if (store.read_manifest(folder) or {}).get("digest") != current.digest:
            version = client.get_model_version(current.version.name, current.version.version)
            model = model_of(client, version)
            if model is None:
                return current
            if folder.exists():
                store.set_aside([folder], "its files are not those of its manifest")
            try:
                logged_model.download(client, model, folder)
            except DamagedError as error:
                logger.warning("%s is damaged: %s", current.version.uri, error)
                client.set_model_version_tag(version.name, version.version, DAMAGED, current.digest)
                return current
    return replace(current, folder=folder)


def page(name: str, version: str) -> str:
    """Return the URL of a version's page in MLflow: on the tracking server, else at `mlflow ui`'s address."""
    return f"{_server()}/#/models/{quote(name)}/versions/{version}{MODE}"


def model_page(name: str) -> str:
    """Return the URL of a registered model's page in MLflow, which names its champion."""
    return f"{_server()}/#/models/{quote(name)}{MODE}"


def public_page(name: str) -> str:
    """Return the URL of a registered model's page for readers elsewhere; empty if the server has no https address."""
    page = model_page(name)
    return page if page.startswith("https://") else ""


def run_link(version: Version) -> str:
    """Return the URL of the page in MLflow of the run that made the version."""
    return f"{_server()}/#/runs/{version.run_id}{MODE}"


def run_pages(version: Version) -> tuple[str, str] | None:
    """Return two URLs in MLflow: of the `PAGE` of the run that made a version, and of the charts of all runs.

    Return None if the run was deleted permanently.

    Raises:
        TransientError: if the server does not answer.
    """
    with tracking.client(f"reading the run of {version.uri}") as client:
        if (run := tracking.run_of(client, version.run_id)) is None:
            return None
    runs = f"{_server()}/#/experiments/{run.info.experiment_id}/runs"
    return f"{runs}/{version.run_id}/artifacts/{PAGE}{MODE}", f"{runs}{MODE}&compareRunsMode=CHART"


def attach(version: Version, files: Mapping[str, str]) -> None:
    """Add text files, by name, to the artifacts of the run that made the version.

    Raises:
        TransientError: if the server does not answer.
        LewisError: if MLflow or the disk refuses.
    """
    with tracking.client(f"attaching {', '.join(files)} to {version.uri}") as client:
        tracking.log_files(client, version.run_id, {name: text.encode() for name, text in files.items()})


def attached(version: Version, name: str) -> str | None:
    """Return a text file from the artifacts of the run that made the version; None if the run has no such file.

    Raises:
        TransientError: if the server does not answer.
    """
    from mlflow.exceptions import MlflowException

    with tracking.client(f"reading {name} of {version.uri}") as client:
        try:
            return tracking.file_of(client, version.run_id, name).decode()
        except (OSError, MlflowException):
            return None


def tag(version: Version, tags: Mapping[str, str]) -> None:
    """Add tags to a version.

    Raises:
        TransientError: if the server does not answer.
        LewisError: if MLflow refuses.
    """
    with tracking.client(f"tagging {version.uri}") as client:
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.version, key, value)


def whole(client: "MlflowClient", name: str, version: str) -> "ModelVersion | None":
    """Return a version by its number; None if it does not exist, or one of its files is missing or damaged."""
    found = lookup(client, name, number=version)
    return found if found is not None and model_of(client, found) is not None else None


def find(client: "MlflowClient", name: str, digest: str) -> Version | None:
    """Return the version of a merge; None if it is not registered, or one of its files is missing or damaged."""
    for found in of_digest(client, name, digest):
        if model_of(client, found) is not None:
            return Version.of(found)
    return None


def of_digest(client: "MlflowClient", name: str, digest: str) -> list["ModelVersion"]:
    """Return the versions of a merge, intact or damaged, except those that a later version has replaced."""
    return list(client.search_model_versions(f"name='{name}' and tags.`lewis.digest`='{digest}'"))


def model_of(client: "MlflowClient", version: "ModelVersion") -> "LoggedModel | None":
    """Return the LoggedModel of a version; None if its files are lost or damaged, which is logged."""
    try:
        return check_model(client, version)
    except DamagedError as error:
        logger.warning("models:/%s/%s is damaged and not used: %s", version.name, version.version, error)
        return None


def check_model(client: "MlflowClient", version: "ModelVersion", *, again: bool = False) -> "LoggedModel":
    """Check the files of a version, and return its LoggedModel.

    Args:
        version: of a registered model.
        again: read every file, even if its checksum is remembered.

    Raises:
        DamagedError: naming a file that is missing or damaged.
        InputError: if the store was moved.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_logged_model((version.source or "").removeprefix("models:/"))
        logged_model.check(client, model, again=again)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise DamagedError("its LoggedModel was deleted") from error
        raise
    # A remote store is checked by file sizes alone, which do not show that damaged files are whole again.
    if logged_model.local_folder(model) is None and DAMAGED in version.tags:
        raise DamagedError("a download of it was damaged")
    return model


def champion_of(client: "MlflowClient", name: str) -> Champion | None:
    """Return the version in use, with a client that is open already; None before the first promotion."""
    found = lookup(client, name, alias="champion")
    return None if found is None else as_model(client, found, model_of(client, found))


def lookup(client: "MlflowClient", name: str, *, number: str = "", alias: str = "") -> "ModelVersion | None":
    """Return a version by its number or its alias; None if there is no such model, number or alias."""
    from mlflow.exceptions import MlflowException

    if len(number) > _DIGITS:
        return None
    try:
        return client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def as_model(client: "MlflowClient", version: "ModelVersion", model: "LoggedModel | None") -> Champion:
    """Convert a version of MLflow to a `Champion`, with its files, scores and inputs.

    Args:
        model: the version's LoggedModel; None if that is damaged.
    """
    folder = logged_model.local_folder(model) if model is not None else None
    return Champion(
        version=Version.of(version),
        digest=digest_in(version.tags),
        folder=folder and folder / logged_model.CHECKPOINT,
        metrics=logged_model.facts(client, model).get("metrics", {}) if model is not None else {},
        sources=lineage.sources(version.tags),
    )


def digest_in(tags: Mapping[str, str]) -> str:
    """Return the digest of a version's merge from the version's tags; empty if LEWIS did not register it."""
    return tags.get("lewis.digest") or tags.get(DAMAGED, "")


def _server() -> str:
    uri = settings.MLFLOW_UI.get() or os.environ.get("MLFLOW_TRACKING_URI", "")  # `lewis up` sets the first
    if not uri.startswith("http"):
        return "http://127.0.0.1:5000"
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")  # without a password


def check(name: str, digest: str) -> str:
    """Check the name of a model and the digest of a merge; return the name as MLflow accepts it.

    Raises:
        InputError: if the name or the digest is malformed.
    """
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise InputError(f"{name}: expected a digest of 64 hex digits, got {digest!r}")
    return tracking.model_name(name)

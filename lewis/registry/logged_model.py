"""A checkpoint as an MLflow LoggedModel, without a second copy of the weights on disk.

MLflow's own `log_model` copies the weights twice. Here MLflow writes everything but the weights, which are then
hard-linked. This is safe because the store never changes the content of a file, which is read-only: it replaces the
file. If the disk damages one, the version is tagged as damaged and registered again (`lewis.registry.repair`).
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lewis import private_names, store
from lewis.errors import TransientError
from lewis.models.chat_template import template_in
from lewis.models.lora.question import read_settings
from lewis.registry import tracking
from lewis.store import kinds, manifest
from lewis.store.manifest import DamagedError, remembered_sha256

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

logger = logging.getLogger(__name__)

FACTS = "version.json"  # facts of a version that nobody filters versions by: its files, its scores
CHECKPOINT = "model"  # the subfolder in which MLflow's transformers flavor keeps the Hugging Face folder
WEIGHTS = "*.safetensors"


def write(
    client: "MlflowClient",
    model: "LoggedModel",
    folder: Path,
    card: str,
    base: Path | None,
    facts: Mapping[str, Any],
) -> None:
    """Write a checkpoint, or an adapter, into a pending LoggedModel and mark it READY.

    Args:
        folder: Hugging Face folder with config, tokenizer and safetensors, or a PEFT adapter with a tokenizer; left
            untouched.
        card: Markdown, stored as the model card.
        base: for an adapter, the folder of its base. Only its config is read: MLflow loads the base from where
            `adapter_config.json` says, a commit of the Hub or a folder, and puts the adapter on it.
        facts: JSON data of the version, kept as `version.json` next to the model with `files`: size in bytes and
            SHA-256 of every other file, by its path in the model's artifacts.

    Raises:
        TransientError: if a remote artifact store lacks something that was sent.
    """
    with _target(client, model) as target:
        _build(model, folder, target, card, base)
        written = _files(target)
        for path in written:
            if store.holds(path):
                store.restrict(path)
        files = {p.relative_to(target).as_posix(): (p.stat().st_size, remembered_sha256(p)) for p in written}
        store.write_json(target / FACTS, {**facts, "files": files})
    if local_folder(model) is None:
        try:
            check(client, model)
        except DamagedError as error:
            raise TransientError(
                f"{model.artifact_location}: not all that was sent is there: {error}; run again"
            ) from error
    client.finalize_logged_model(model.model_id, "READY")


def note_metrics(client: "MlflowClient", model: "LoggedModel", metrics: Mapping[str, float]) -> None:
    """Replace the metrics in the facts (`version.json`) of a version.

    Raises:
        DamagedError: if the facts are lost or damaged.
    """
    found = {**facts(client, model), "metrics": dict(metrics)}
    if (folder := local_folder(model)) is not None:
        store.write_json(folder / FACTS, found)
        return
    with store.scratch_folder("facts") as scratch:
        store.write_json(scratch / FACTS, found)
        client.log_model_artifacts(model.model_id, str(scratch))


def facts(client: "MlflowClient", model: "LoggedModel") -> dict[str, Any]:
    """Return the facts of a version, which `write` kept in its `version.json`.

    Raises:
        DamagedError: if the file is lost or damaged.
    """
    from mlflow.artifacts import download_artifacts

    if (folder := local_folder(model)) is not None:
        found = store.read_json(folder / FACTS)
    else:
        with store.scratch_folder("facts") as scratch:
            place = f"{model.artifact_location.rstrip('/')}/{FACTS}"
            there = download_artifacts(place, dst_path=str(scratch), tracking_uri=client.tracking_uri)
            found = store.read_json(Path(there))
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise DamagedError(f"{FACTS} is lost or damaged")
    return found


def check(client: "MlflowClient", model: "LoggedModel", *, again: bool = False) -> None:
    """Check that the artifact store still has every file of a model as it was written.

    Files on a file system of this machine are checked by their content, remote files by their sizes alone.

    Args:
        again: read every file, even if its checksum is remembered.

    Raises:
        DamagedError: naming the file that is missing or damaged.
        InputError: if the store was moved, so that no file is where MLflow has it.
    """
    if (place := local_folder(model)) is not None and len(place.parents) > 2:
        tracking.check_not_moved(place.parents[2])  # of EXPERIMENT/models/ID/artifacts
    try:
        files = {name: (int(size), str(sha256)) for name, (size, sha256) in facts(client, model)["files"].items()}
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{FACTS} is lost or damaged") from error
    if not files:
        raise DamagedError("the version does not say which files it has")
    if (folder := local_folder(model)) is not None:
        manifest.check_files(folder, files, again=again)
        return
    for parent, names in groupby(sorted(files, key=_parent), _parent):
        listed = client.list_logged_model_artifacts(model.model_id, parent or None)
        present = {PurePosixPath(file.path).name: file.file_size for file in listed}
        for name in names:
            if (size := present.get(PurePosixPath(name).name)) != files[name][0]:
                raise DamagedError(f"{name}: expected {files[name][0]} bytes, it has {size}")


def local_folder(model: "LoggedModel") -> Path | None:
    """The folder of the model's artifacts; None if they are not on a file system of this machine."""
    return tracking.local_path(model.artifact_location)


def download(client: "MlflowClient", model: "LoggedModel", folder: Path) -> None:
    """Download the checkpoint of a remote model into the store: the files of its original manifest, and no others.

    Raises:
        DamagedError: if a file is not what the manifest says.
    """
    from mlflow.artifacts import download_artifacts

    store.make_folder(folder.parent)
    scratch = store.beside(folder)  # so that it is swept if this process is killed
    scratch.mkdir()
    try:
        place = f"{model.artifact_location.rstrip('/')}/{CHECKPOINT}"
        found = Path(download_artifacts(place, dst_path=str(scratch), tracking_uri=client.tracking_uri))
        original = manifest.check(found)
        checksums = {name: sha256 for name, (_, sha256) in kinds.listed(original.pop("files")).items()}
        with store.publish(folder, original, checksums=checksums) as target:
            for name in checksums:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (found / name).rename(target / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def discard(client: "MlflowClient", model: "LoggedModel") -> None:
    """Delete a model that no version uses, with its local files; `mlflow gc` removes remote files."""
    from mlflow.exceptions import MlflowException

    if (folder := local_folder(model)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        client.delete_logged_model(model.model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # else MLflow's client sent the request twice
            raise


@contextmanager
def _target(client: "MlflowClient", model: "LoggedModel") -> Iterator[Path]:
    """Give the folder to build a model in: its own, which nobody reads while it is pending, or one to be uploaded."""
    if (folder := local_folder(model)) is not None:
        yield folder
        return
    uploads = store.make_folder(store.home() / "mlflow" / "uploads")
    store.sweep(uploads)
    scratch = uploads / f".{model.model_id}.{store.writer()}.upload.partial"
    try:
        yield scratch
        client.log_model_artifacts(model.model_id, str(scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(model: "LoggedModel", folder: Path, target: Path, card: str, base: Path | None) -> None:
    import mlflow.transformers
    from huggingface_hub import ModelCard
    from mlflow.models import Model

    description = Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        run_id=model.source_run_id,
        model_id=model.model_id,
    )
    packages = ("mlflow", "transformers", "torch", *(["peft"] if base else []))
    with store.scratch_folder("model") as scratch:
        skeleton = scratch / CHECKPOINT
        # without the modes: MLflow writes into copies of this
        shutil.copytree(folder, skeleton, ignore=shutil.ignore_patterns(WEIGHTS), copy_function=shutil.copyfile)
        if base is not None:  # MLflow looks up the model's class there
            shutil.copyfile(base / "config.json", skeleton / "config.json")
        with _pipeline_has_a_name():
            mlflow.transformers.save_model(
                str(skeleton),
                path=str(target),
                task="llm/v1/chat" if template_in(folder) else "text-generation",
                mlflow_model=description,
                model_card=ModelCard(card, ignore_metadata_errors=True),
                # By default MLflow imports the model to find its requirements, which needs torchvision.
                pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in packages],
            )
    # MLflow's LICENSE.txt only names the scratch folder as if it were a repo.
    (target / "LICENSE.txt").unlink(missing_ok=True)
    weights = [path for path in _files(folder) if path.match(WEIGHTS)]
    for path in weights:
        link(path, target / CHECKPOINT / path.relative_to(folder))
    description.model_size_bytes = (description.model_size_bytes or 0) + sum(path.stat().st_size for path in weights)
    description.flavors["transformers"]["source_model_name"] = model.name
    if base is not None:
        _refer_to_base(description.flavors["transformers"], target)
    description.save(str(target / "MLmodel"))


def _refer_to_base(flavor: dict[str, Any], target: Path) -> None:
    """Change MLflow's flavor to that of an adapter, as `save_model` would write it for a PeftModel in memory."""
    adapter = target / CHECKPOINT
    # A folder with both configs means a full model with an adapter next to it.
    (adapter / "config.json").unlink()
    settings = read_settings(adapter)
    name, revision = settings["base_model_name_or_path"], settings.get("revision")
    del flavor["model_binary"]
    flavor |= {"peft_adaptor": CHECKPOINT, "source_model_name": name}
    if revision:
        flavor |= {"source_model_revision": revision, "tokenizer_name": name, "tokenizer_revision": revision}
    else:  # the tokenizer is in the folder `components`
        flavor["local_base_model_path"] = name


@contextmanager
def _pipeline_has_a_name() -> Iterator[None]:
    """Put a class in place of the dotted name `impl` in transformers' table of pipelines, while the block lasts.

    MLflow 3.17 reads the name of a class there; transformers 5.23 has a dotted name. An empty class of that name is
    enough: importing the right one takes seconds.
    """
    task = private_names.PIPELINE_TASK.get()("text-generation")[1]
    impl = task["impl"]
    if isinstance(impl, str):
        task["impl"] = type(impl.rpartition(".")[2], (), {})
    try:
        yield
    finally:
        task["impl"] = impl


def link(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy where the file system allows no link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:  # another file system, or one without hard links
        logger.info("%s: cannot link (%s), copying", target, error.strerror)
        shutil.copyfile(source, target)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _parent(name: str) -> str:
    parent = PurePosixPath(name).parent.as_posix()
    return "" if parent == "." else parent

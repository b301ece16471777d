"""Write a version of a registered model into a folder, for programs that load models from a folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis import store
from lewis.errors import InputError, LewisError, nearest
from lewis.registry import logged_model, tracking, versions
from lewis.store import kinds, manifest
from lewis.store.manifest import DamagedError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Pulled:
    """What `pull` wrote.

    Attributes:
        uri: `models:/<name>/<version>`.
        folder: where the model is, a full checkpoint or a PEFT adapter.
        digest: of its merge.
        size: bytes of its files.
    """

    uri: str
    folder: Path
    digest: str
    size: int


def pull(what: str, folder: Path) -> Pulled:
    """Write a version into a folder, whose files are checked against the checksums of its merge, and its model card.

    Weights are hard links where the file system allows it, and read-only, since MLflow has the same file.

    Args:
        what: `NAME`, which means its champion, `NAME@ALIAS` or `NAME/VERSION`; MLflow's prefix `models:/` may be there.
        folder: to write. An older folder that LEWIS wrote is replaced.

    Raises:
        InputError: if there is no such model, alias or version, or the folder holds something else.
        LewisError: if the version's files are lost or damaged, or LEWIS did not register it.
        TransientError: if the server does not answer.
    """
    named(what)
    tracking.check_exists(what)
    with tracking.client(f"pulling {what}") as client:
        found = version_of(client, what)
        model = versions.as_model(client, found, _whole(client, found))
    model = versions.fetch_files(model)
    if model.folder is None:
        raise LewisError(f"{model.version.uri}: its files are lost or damaged, or LEWIS did not register it")
    try:
        merge = manifest.check(model.folder)
    except DamagedError as error:
        raise _damaged(model.version.uri, error) from error
    expected = kinds.listed(merge.pop("files"))
    with store.publish(folder, merge, checksums={name: sha256 for name, (_, sha256) in expected.items()}) as target:
        for each in expected:
            (target / each).parent.mkdir(parents=True, exist_ok=True)
            if Path(each).match(logged_model.WEIGHTS):
                logged_model.link(model.folder / each, target / each)
            else:
                shutil.copyfile(model.folder / each, target / each)
        try:  # again: a checksum that is remembered does not show damage by the disk since then
            manifest.check_files(target, expected, again=True)
        except DamagedError as error:
            raise _damaged(model.version.uri, error) from error
    for each in store.CARD:  # written after the merge, so its manifest has no checksums of them
        if (model.folder / each).is_file():
            (folder / each).parent.mkdir(exist_ok=True)
            shutil.copyfile(model.folder / each, folder / each)
    return Pulled(model.version.uri, folder, model.digest, sum(size for size, _ in expected.values()))


def version_of(client: "MlflowClient", what: str) -> "ModelVersion":
    """Return the version that a text names, in a form that `pull` takes, such as `NAME@ALIAS`.

    Raises:
        InputError: if there is no such model, alias or version.
    """
    name, number, alias = named(what)
    found = versions.lookup(client, name := tracking.model_name(name), number=number, alias=alias)
    if found is None:
        raise _unknown(client, what, name)
    return found


def named(what: str) -> tuple[str, str, str]:
    """Split `NAME`, `NAME/VERSION` or `NAME@ALIAS` into name, number and alias; number or alias is empty.

    Raises:
        InputError: if the text has none of these forms.
    """
    given = what.removeprefix("models:/")
    name, separator, number = given.partition("/")
    if separator:
        if name and number.isdecimal():
            return name, number, ""
    else:
        name, separator, alias = given.partition("@")
        if name and (alias or not separator):
            return name, "", alias or "champion"
    raise InputError(f"expected NAME, NAME@ALIAS or NAME/VERSION, for example my-merge/3, got {what!r}")


def _whole(client: "MlflowClient", version: "ModelVersion") -> "logged_model.LoggedModel":
    try:
        return versions.check_model(client, version)
    except DamagedError as error:
        raise _damaged(f"models:/{version.name}/{version.version}", error) from error


def _damaged(uri: str, error: DamagedError) -> LewisError:
    return LewisError(f"{uri} is damaged: {error}; a run of its recipe merges and registers it again")


def _unknown(client: "MlflowClient", what: str, name: str) -> InputError:
    """The error for a name that does not exist; it lists those that do."""
    there = client.search_model_versions(f"name='{name}'")
    if not there:
        models = [each.name for each in tracking.every(client.search_registered_models)]
        if name in models:
            return InputError(f"{what}: {name} has no version; a run of its recipe makes one")
        hint = nearest(name, models) if models else "; no model is registered"
        return InputError(f"{what}: expected a registered model, got {name!r}{hint}")
    numbers = ", ".join(sorted((str(each.version) for each in there), key=int))
    aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
    lacking = "no champion yet; name a version" if what == name else "no such version"
    return InputError(f"{what}: {name} has {lacking}: its versions are {numbers}, its aliases {aliases}")

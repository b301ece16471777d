"""Versions whose files are lost or damaged: they are found and tagged, and a version is registered in their place.

The weights in MLflow may be hard links of the store's, so that one damaged sector damages both. The next run writes
them again in the store, in new files, and registers them as a new version. The aliases move to it. A version is not
mended in place: a program that loaded it has the damaged files, and its number should not stand for two contents.
"""

import logging
from typing import TYPE_CHECKING

from lewis.registry import history, tracking, versions
from lewis.registry.aliases import move_champion, set_alias
from lewis.registry.outbox import Move
from lewis.registry.versions import DAMAGED, Version
from lewis.store import verification
from lewis.store.manifest import DamagedError
from lewis.store.verification import Damage, Verified

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)
WITHDRAWN = "lewis.withdrawn"  # tag of a version that was rolled back by hand; its value is the reason
_INHERITED = (WITHDRAWN, "lewis.verdict", "lewis.approve_", "lewis.published", history.MARK)


def verify() -> Verified:
    """Read all files of the store and of the registered versions again; remembered checksums are not trusted.

    A version whose files are lost or damaged is tagged. The next run of its recipe registers it again. If a database is
    damaged, the versions are not checked.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    found = verification.verify()
    checked, damaged, unchecked = found.checked, list(found.damaged), 0
    readable = all(each.kind != verification.DATABASE for each in damaged)
    if readable and tracking.exists():  # without a database nothing was registered, and a check should not create one
        with tracking.client("checking the registered versions") as client:
            for version in tracking.every(client.search_model_versions):
                digest = version.tags.get("lewis.digest")
                if not digest:  # LEWIS did not register it, or gave it up
                    continue
                checked += 1
                try:
                    versions.check_model(client, version, again=True)
                except DamagedError as error:
                    damaged.append(Damage("version", f"models:/{version.name}/{version.version}", str(error)))
                    mark(client, version, digest)
                try:
                    # Each run has a file with the recipe, for which earlier releases of LEWIS noted no checksum.
                    unchecked += "recipe.yaml" not in tracking.check_files(client, str(version.run_id))
                except DamagedError as error:  # scores, verdict, recipe: the model itself may be whole
                    damaged.append(Damage("run", f"runs:/{version.run_id}", str(error)))
    return Verified(checked, damaged, unchecked)


def mark(client: "MlflowClient", version: "ModelVersion", digest: str) -> None:
    """Tag a version as damaged."""
    client.set_model_version_tag(version.name, version.version, DAMAGED, digest)


def give_up(client: "MlflowClient", version: "ModelVersion", digest: str) -> None:
    """Tag a version as damaged, and let its merge be registered again. Call it under the registry's lock."""
    mark(client, version, digest)
    client.delete_model_version_tag(version.name, version.version, "lewis.digest")


def inherited(client: "MlflowClient", name: str, digest: str) -> dict[str, str]:
    """Return the tags that a new version of a merge takes from the damaged one before: verdict, mark, publication."""
    before = client.search_model_versions(f"name='{name}' and tags.`{DAMAGED}`='{digest}'")
    newest = max(before, key=lambda version: int(version.version), default=None)
    return {key: value for key, value in newest.tags.items() if key.startswith(_INHERITED)} if newest else {}


def point_aliases_to(client: "MlflowClient", version: Version, digest: str) -> None:
    """Move every alias of a merge's damaged versions to an intact version. Call it under the registry's lock.

    Each registration calls it, so that the next one completes what a process that died left undone.
    """
    name = version.name
    if DAMAGED in client.get_model_version(name, version.version).tags:  # its files are whole again
        client.delete_model_version_tag(name, version.version, DAMAGED)
    for alias, number in sorted(history.registered_model(client, name).aliases.items()):
        if str(number) == version.version:
            continue
        if client.get_model_version(name, str(number)).tags.get(DAMAGED) != digest:
            continue
        before = f"models:/{name}/{number}"
        if alias == "champion":
            _move_champion(client, version, before, digest)
        else:
            set_alias(client, name, alias, version.version)
        logger.warning("%s is damaged: the alias %s points at %s now", before, alias, version.uri)


def _move_champion(client: "MlflowClient", version: Version, before: str, digest: str) -> None:
    """Move the alias `champion` to an intact version and report it, so that servers replace the damaged one."""
    why = f"the files of {before} were damaged"
    history.record(client, version.name, "repaired", version.uri, before, why)
    move = Move(version.name, version.version, before, [f"repaired: {why}"], {"digest": digest})
    move_champion(client, move, keeps_previous=True)
    history.follow(client, version.name)

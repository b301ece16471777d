"""A version that is to be served: its files, verified, in a folder of the store that is never written to again."""

import re
import shutil
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from lewis import store
from lewis.errors import LewisError
from lewis.models.lora.expert import is_adapter
from lewis.registry.pull import pull
from lewis.registry.versions import Champion
from lewis.reports.canary import Step
from lewis.serving.records import Served
from lewis.store import manifest
from lewis.store.kinds import SERVED


class OutdatedError(LewisError):
    """The version is not the champion any more; the target has what it had before."""


@dataclass(frozen=True)
class Model:
    """The facts of a version that a target gets in order to serve it.

    Attributes:
        name: of the registered model.
        version: its number.
        digest: of its merge, 64 hex digits.
        folder: of its files, which are those of the merge.
        output: `full`, a checkpoint, or `lora`, an adapter.
        previous: `uri` of the version that the target had before; None if it had none.
        delivery: a UUID, the same in every repeated attempt to put this version into service.
        steps: the steps of its canary, which targets with a canary append.
        check_champion: raises OutdatedError if the version is not the champion any more, AwayError if MLflow does not
            answer. Called before clients get the version, and again and again while only some of them have it.
        at_once: whether all clients get it without a canary, because the version that they have was rolled back.
    """

    name: str
    version: str
    digest: str
    folder: Path
    output: str
    previous: str | None = None
    delivery: str = ""
    steps: list[Step] = field(default_factory=list, compare=False)
    check_champion: Callable[[], None] = field(default=lambda: None, compare=False)
    at_once: bool = False

    @property
    def uri(self) -> str:
        """`models:/name/version`."""
        return f"models:/{self.name}/{self.version}"

    @property
    def alias(self) -> str:
        """A name that no other content ever has, for servers and their caches: NAME-<version>-<digest8>."""
        return served_name(self.name, self.version, self.digest)


def served_name(name: str, version: str, digest: str) -> str:
    """Return the name that a version is served under, its `Model.alias`."""
    return f"{_plain(name)}-{version}-{digest[:8]}"


def recorded(record: Served) -> Model:
    """Return the version that a record has in service as a `Model`, without `output`; its files may be missing."""
    version = record.uri.rpartition("/")[2]
    return Model(record.name, version, record.digest, SERVED.path(record.alias or "none"), "")


def name_pattern(name: str) -> re.Pattern[str]:
    """Return a pattern that matches the aliases of all versions of a registered model."""
    return re.compile(rf"{re.escape(_plain(name))}-\d+-[0-9a-f]{{8}}")


def _plain(name: str) -> str:
    """Return a registered name with only those characters that may be in a file's name and in a URL."""
    plain = re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip(".-") or "model"
    return plain if plain == name else f"{plain}-{store.digest(name)[:6]}"  # "a b" is not "a-b"


def prepare(champion: Champion, previous: str | None = None, since: str = "") -> Model:
    """Fetch a version into the folder that it is served from, and verify every file by the checksums of its merge.

    Args:
        champion: the version.
        previous: as in `Model`.
        since: when the target took the version before; the delivery's id is made from it, too.

    Raises:
        LewisError: if its files are lost or damaged, or LEWIS did not register it.
        TransientError: if MLflow does not answer.
    """
    version = champion.version
    if not champion.digest:
        raise LewisError(f"{version.uri}: LEWIS did not register it, so its files cannot be verified; promote another")
    folder = SERVED.path(served_name(version.name, version.version, champion.digest))
    delivery = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{version.uri} {champion.digest} {previous} {since}"))
    return _fetched(Model(version.name, version.version, champion.digest, folder, "", previous, delivery))


def before(record: Served) -> Model:
    """Return the version that a record has in service, with its files, fetched if missing; raises as `prepare`."""
    return _fetched(recorded(record))


def _fetched(model: Model) -> Model:
    with SERVED.lock(model.alias):
        manifest.set_damaged_aside(model.folder)
        if (store.read_manifest(model.folder) or {}).get("digest") != model.digest:
            pull(model.uri, model.folder)
    return replace(model, output="lora" if is_adapter(model.folder) else "full")


def remove_others(name: str, kept: Collection[str]) -> None:
    """Remove the folders of a registered model's versions that are served nowhere.

    Args:
        name: of the model.
        kept: names as `served_name`.
    """
    for path in SERVED.entries():
        if name_pattern(name).fullmatch(path.name) and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)

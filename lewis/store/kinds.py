"""The table of kinds: where the entries of each kind are, how they are named, locked and checked, who shares them.

An entry is a file or a folder of `LEWIS_HOME/<kind>/`. It is believed by its head: the file itself, or the manifest of
a folder. The head has a checksum of its own, and says which other files belong to the entry. The steps that make
entries, the remote half that shares them, `lewis verify`, housekeeping and backups read this table.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from lewis.store import files, sealed_json
from lewis.store.files import MANIFEST
from lewis.store.folders import home, leads_out
from lewis.store.sealed_json import DamagedError


@dataclass(frozen=True)
class Kind:
    """One kind of entries.

    Attributes:
        name: of the kind, and of its folder in the store.
        pattern: of its entries in that folder, with the entry's digest in place of `*`.
        locks: first part of the names of its locks; empty if entries are made without a lock.
        manifest: whether an entry is a folder with a manifest.
        beside: ending of a second file that belongs to an entry and has the same name otherwise; empty if none does.
        beside_in: key of the entry's JSON that has the size and SHA-256 of the second file.
        check: parses a head, and raises `DamagedError` if it is not what was written; None: it has no checksum.
        shared: whether `LEWIS_STORE` keeps it; `merged`: only if `LEWIS_STORE_MERGED` is 1.
        removable: whether housekeeping removes entries that nobody needs.
        notes_use: whether readers call `store.mark_used` on an entry. Else an entry is as old as its newest file, and
            housekeeping removes none while a run goes on.
        writer: regular expression for the part of a file's name that names its writer (`store.writer`). Housekeeping
            leaves the file alone while the writer lives, since it may write nothing for days.
        refers_to: gives the files and folders that an entry refers to. The entry is in use when one of these is, and
            is worth nothing when one of these is gone.
        backed_up: whether backups have it, since it cannot be made again.
    """

    name: str
    pattern: str = "*.json"
    locks: str = ""
    manifest: bool = False
    beside: str = ""
    beside_in: str = ""
    check: Callable[[bytes], Mapping[str, Any] | None] | None = sealed_json.loads
    shared: Literal["never", "always", "merged"] = "never"
    removable: bool = True
    notes_use: bool = True
    writer: str = ""
    refers_to: Callable[[Path], list[Path]] | None = None
    backed_up: bool = False

    @property
    def folder(self) -> Path:
        """The folder of all entries of this kind."""
        return home() / self.name

    def path(self, digest: str) -> Path:
        """Where the entry of a digest is, whether or not it exists."""
        return self.folder / self.pattern.replace("*", digest)

    def lock(self, digest: str) -> FileLock:
        """The lock to hold on this machine while one looks for an entry and makes it; `store.turn` takes it, too."""
        return files.lock(self.locks + digest)

    def entries(self) -> list[Path]:
        """All entries on disk, sorted, without those being written."""
        return sorted(path for path in self.folder.glob(self.pattern) if not path.name.startswith("."))

    def head_of(self, path: Path) -> Path:
        """The head of the entry at `path`: the file that makes it an entry. Its modification time is the last use."""
        return path / MANIFEST if self.manifest else path

    def beside_of(self, path: Path) -> Path:
        """The second file of the entry at `path`."""
        return path.with_suffix(self.beside)

    def files_of(self, path: Path) -> list[Path]:
        """The file or folder of an entry, then its second file if it has one."""
        second = self.beside_of(path) if self.beside else None
        return [path, second] if second and second.is_file() else [path]

    def parts(self, path: Path, head: bytes) -> dict[str, tuple[int, str]]:
        """The other files of the entry at `path`, by what its head says.

        Returns:
            Name, in the folder of the entry or next to its file, -> size in bytes and SHA-256 (64 hex digits).

        Raises:
            DamagedError: if `head` is not whole, or names a file elsewhere.
        """
        try:
            content = (self.check(head) if self.check else None) or {}
            named = content["files"] if self.manifest else {}
            if self.beside:
                named = {self.beside_of(path).name: content[self.beside_in]}
            return listed(named)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{MANIFEST}: {error}" if self.manifest else str(error)) from error


def listed(files: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Name -> size in bytes and SHA-256 (64 hex digits) of the files that a head describes.

    Raises:
        DamagedError: if one is elsewhere.
        KeyError, TypeError, ValueError: if they are described in another way.
    """
    found = {str(name): (int(each["size"]), str(each["sha256"])) for name, each in files.items()}
    if outside := next(filter(leads_out, found), None):
        raise DamagedError(f"{outside!r}: expected the name of a file in the folder")
    return found


def check_png(data: bytes) -> None:
    """Check a PNG file, by the checksum that each of its chunks carries.

    Raises:
        DamagedError: if these are not all bytes of it, as they were written.
    """
    signature = b"\x89PNG\r\n\x1a\n"
    start, kind = len(signature), b""
    while data.startswith(signature) and kind != b"IEND" and start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        kind, stop = data[start + 4 : start + 8], start + 8 + length
        if zlib.crc32(data[start + 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
            break
        start = stop + 4
    else:
        if kind == b"IEND" and start == len(data):
            return
    raise DamagedError("its checksums do not fit")


MERGED = Kind("merged", "*", "merged-", manifest=True, shared="merged")  # merged checkpoints
IMPORTANCE = Kind(  # norms, with the second moments next to them
    "importance", locks="importance-", beside=".safetensors", beside_in="moments", shared="always"
)
GRAMS = Kind("grams", "*", "grams-", manifest=True, shared="always")  # second-order statistics of a model's inputs
ALLOCATIONS = Kind("allocations", locks="allocation-", shared="always")  # densities
CALIBRATIONS = Kind("calibrations", locks="calibration-", shared="always")  # token ids of calibration sets
INSPECTIONS = Kind("inspections", locks="inspection-", shared="always")  # how the weights of base and experts differ
GGUF = Kind("gguf", "*", "gguf-", manifest=True)  # a link to a GGUF file, its config, tokenizer, names
SCORES = Kind("scores", locks="scores-", shared="always")  # what lm-eval said of one model
ANSWERS = Kind("answers", "*.jsonl", check=None)  # finished batches of evaluations that are not done
DIGESTS = Kind("digests")  # remembered checksums and other facts, which hold for this disk only
PICTURES = Kind("pictures", "*.png", check=check_png, shared="always")
REPORTS = Kind("reports", "*.html", check=None, notes_use=False)  # pages of runs: <recipe>_<id of the run>
RUN_REPORTS = Kind("run-reports", notes_use=False)  # reports of runs of deployments: <id of the run>
LOGS = Kind("logs", "*.log", check=None, writer=r"-([0-9a-z]+-\d+)\.log$")  # of the servers: <server>-<writer>.log
SEARCHES = Kind("search", "*.log", check=sealed_json.check_lines, removable=False)  # Optuna's journals
OUTBOX = Kind("outbox", removable=False, backed_up=True)  # moves of the alias `champion` to report
SERVED = Kind("served", "*", "served-", manifest=True, removable=False)  # versions in service
QUARANTINE = Kind("quarantine", "*", check=None, notes_use=False)  # damaged entries that were set aside

TABLE = {
    kind.name: kind
    for kind in (
        *(MERGED, IMPORTANCE, GRAMS, ALLOCATIONS, CALIBRATIONS, INSPECTIONS, GGUF, SCORES),
        *(ANSWERS, DIGESTS, PICTURES, REPORTS, RUN_REPORTS, LOGS, SEARCHES, OUTBOX, SERVED, QUARANTINE),
    )
}
"""Name -> kind. Kinds that refer to entries of others are last."""
FOREIGN = ("mlflow", "prefect")
"""Folders of the store that other programs write to."""


def add(kind: Kind) -> Kind:
    """Add a kind of entries to the table that a package above this library makes."""
    TABLE[kind.name] = kind
    return kind


def kind_of(path: Path) -> Kind | None:
    """The kind of the entry at `path`, whether or not it exists; None if no entry of the store has such a path."""
    place = path.absolute()
    is_entry = place.parent.parent == home() and not place.name.startswith(".")
    return TABLE.get(place.parent.name) if is_entry else None

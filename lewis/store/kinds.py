"""The table of kinds of entries: where each kind is in the store, and how it is named, locked, checked and shared.

An entry is a file or a folder in `LEWIS_HOME/<kind>/`. It exists if its head does: the file itself, or the manifest of
a folder. The head has a checksum of its own, and lists the other files of the entry with theirs. The steps that make
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
        name: name of the kind, and of its folder in the store.
        pattern: names of entries in that folder, with an entry's digest in place of `*`.
        locks: first part of the names of its locks; empty if entries are made without a lock.
        manifest: whether an entry is a folder with a manifest.
        beside: suffix of an entry's second file, whose name is else the entry's; empty: there is no second file.
        beside_in: key of the entry's JSON that has the size and SHA-256 of the second file.
        check: parses a head, and raises `DamagedError` if it is not what was written; None: heads have no checksum.
        shared: whether `LEWIS_STORE` keeps its entries; `merged`: only if `LEWIS_STORE_MERGED` is 1.
        removable: whether housekeeping removes entries that are no longer needed.
        notes_use: whether readers call `store.mark_used` on an entry. If not, an entry is as old as its newest file,
            and housekeeping removes none while a run goes on.
        writer: regular expression for the part of a file's name that names its writer (`store.writer`). Housekeeping
            leaves the file alone while the writer lives, since it may write nothing for days.
        refers_to: returns the files and folders that an entry refers to. The entry is in use when one of these is, and
            is worthless when one of these is gone.
        backed_up: whether backups include its entries, since they cannot be made again.
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
        """The lock to hold on this machine while an entry is looked for and made; `store.turn` takes it, too."""
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
        """The files of the entry at `path` other than its head, as the head lists them.

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
        DamagedError: if a name leads out of the entry's folder.
        KeyError, TypeError, ValueError: if a description has another form.
    """
    found = {str(name): (int(each["size"]), str(each["sha256"])) for name, each in files.items()}
    if outside := next(filter(leads_out, found), None):
        raise DamagedError(f"{outside!r}: expected the name of a file in the folder")
    return found


def check_png(data: bytes) -> None:
    """Check a PNG file, by the checksum that each of its chunks carries.

    Raises:
        DamagedError: if bytes are missing or changed.
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
REHEARSALS = Kind("rehearsals", shared="always")  # what libraries say to configs, adapters and tasks
GGUF = Kind("gguf", "*", "gguf-", manifest=True)  # a link to a GGUF file, its config, tokenizer, names
SCORES = Kind("scores", locks="scores-", shared="always")  # results of lm-eval for one model
ANSWERS = Kind("answers", "*.jsonl", check=None)  # finished batches of unfinished evaluations
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
        *(MERGED, IMPORTANCE, GRAMS, ALLOCATIONS, CALIBRATIONS, INSPECTIONS, REHEARSALS, GGUF, SCORES),
        *(ANSWERS, DIGESTS, PICTURES, REPORTS, RUN_REPORTS, LOGS, SEARCHES, OUTBOX, SERVED, QUARANTINE),
    )
}
"""Name -> kind. Kinds whose entries refer to entries of other kinds come last."""
FOREIGN = ("mlflow", "prefect")
"""Folders of the store that other programs write to."""


def add(kind: Kind) -> Kind:
    """Add a kind to the table, whose entries a package that uses this library makes; return it."""
    TABLE[kind.name] = kind
    return kind


def kind_of(path: Path) -> Kind | None:
    """The kind of the entry at `path`, whether or not it exists; None if no entry of the store has such a path."""
    place = path.absolute()
    is_entry = place.parent.parent == home() and not place.name.startswith(".")
    return TABLE.get(place.parent.name) if is_entry else None

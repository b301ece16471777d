"""The kinds of entries in the store: where each kind is, how its entries are named and locked, what belongs to one.

The steps that make entries and the housekeeping that removes them both read this table.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lewis.store import entries, files, lease, remote
from lewis.store.folders import home


@dataclass(frozen=True)
class Kind:
    """One kind of entries.

    Attributes:
        name: of the kind, and of its folder in the store.
        pattern: of its entries in that folder, with the entry's digest in place of `*`.
        locks: first part of the names of its locks; empty if entries are made without a lock.
        beside: ending of a second file that belongs to an entry and has the same name otherwise; empty if none does.
        notes_use: whether readers call `store.mark_used` on an entry.
    """

    name: str
    pattern: str = "*.json"
    locks: str = ""
    beside: str = ""
    notes_use: bool = True

    @property
    def folder(self) -> Path:
        """The folder of all entries of this kind."""
        return home() / self.name

    def path(self, digest: str) -> Path:
        """Where the entry of a digest is, whether or not it exists."""
        return self.folder / self.pattern.replace("*", digest)

    def lock(self, digest: str) -> FileLock:
        """The lock to hold while one looks for an entry and makes it."""
        return files.lock(self.locks + digest)

    @contextmanager
    def turn(self, digest: str) -> Iterator[None]:
        """`lock`, and with `LEWIS_STORE` a lease, while one looks for an entry that is shared, and makes it.

        An entry that another machine has made meanwhile is fetched. No lease is taken for one that is there already.
        """
        path = self.path(digest)
        with self.lock(digest):
            absent = remote.shares(path) and not path.exists() and not remote.fetch(path)
            with lease.Lease(self.locks + digest).held() if absent else nullcontext():
                yield

    def beside_of(self, path: Path) -> Path:
        """The second file of the entry at `path`."""
        return path.with_suffix(self.beside)

    def files_of(self, path: Path) -> list[Path]:
        """The file or folder of an entry, then its second file if it has one."""
        second = self.beside_of(path) if self.beside else None
        return [path, second] if second and second.is_file() else [path]

    def entries(self) -> list[Path]:
        """All entries on disk, sorted, without those being written."""
        return sorted(path for path in self.folder.glob(self.pattern) if not path.name.startswith("."))


MERGED = Kind("merged", "*", "merged-")  # merged checkpoints, folders with a manifest
IMPORTANCE = Kind("importance", locks="importance-", beside=".safetensors")  # norms; second moments beside them
GRAMS = Kind("grams", "*", "grams-")  # second-order statistics of a model's inputs, folders with a manifest
ALLOCATIONS = Kind("allocations", locks="allocation-")  # densities
CALIBRATIONS = Kind("calibrations")  # token ids of calibration sets
INSPECTIONS = Kind("inspections", locks="inspection-")  # how the weights of base and experts differ
GGUF = Kind("gguf", "*", "gguf-")  # config, tokenizer and names of GGUF files, folders with a link to the file
SCORES = Kind("scores", locks="scores-")  # what lm-eval said of one model
DIGESTS = Kind("digests")  # remembered checksums and other facts
PICTURES = Kind("pictures", "*.png")
LOGS = Kind("logs", "*.log")  # of the servers, named <server>-<`store.writer`>
RESULTS = Kind("results", "*")  # Prefect's records of finished tasks
SEARCHES = Kind("search", "*.log")  # Optuna's journals, which housekeeping leaves alone
QUARANTINE = Kind(entries.QUARANTINE, "*", notes_use=False)  # damaged entries that were set aside
SHARED = {
    kind.name: kind for kind in (IMPORTANCE, ALLOCATIONS, CALIBRATIONS, INSPECTIONS, SCORES, PICTURES, GRAMS, MERGED)
}
"""The kinds that `LEWIS_STORE` keeps, by name."""
REMOVABLE = (
    *(MERGED, IMPORTANCE, GRAMS, ALLOCATIONS, CALIBRATIONS, INSPECTIONS, GGUF, SCORES),
    *(DIGESTS, PICTURES, LOGS, QUARANTINE),
)

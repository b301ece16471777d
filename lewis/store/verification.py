"""Check everything in the store anew, whatever is remembered of it.

Nothing is moved: the next run that needs a damaged entry sets it aside and makes it again.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from lewis.store import kinds, manifest, png, sealed_json
from lewis.store.files import MANIFEST
from lewis.store.kinds import Kind


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        kind: the name of its kind in the store, or `version` for a version of a registered model.
        entry: the path of the entry, or `models:/name/version`.
        why: the file, and what is wrong with it.
    """

    kind: str
    entry: str
    why: str


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        checked: how many entries and versions.
        damaged: what is wrong.
    """

    checked: int
    damaged: list[Damage]

    def to_text(self) -> str:
        """How many are damaged, which is the first, and what to do."""
        if not self.damaged:
            return f"{self.checked} entries and versions, none is damaged"
        first = self.damaged[0]
        return (
            f"{len(self.damaged)} of {self.checked} entries and versions are damaged; the first: {first.entry}: "
            f"{first.why}; run their recipes again (`lewis run`), which makes them anew"
        )


def verify() -> Verified:
    """Read and check every entry of the store that has checksums. An entry that a step works on is left out."""
    count, damaged = 0, []
    for kind, check in _CHECKS.items():
        for path in kind.entries():
            if check is _check_folder and not (path / MANIFEST).is_file():
                continue  # LEWIS did not write it
            why = _problem(kind, path, check)
            count += why is not None
            if why:
                damaged.append(Damage(kind.name, str(path), why))
    return Verified(count, damaged)


def _problem(kind: Kind, path: Path, check: Callable[[Path], None]) -> str | None:
    """What is wrong with an entry; empty if nothing is, None if it was not checked."""
    try:
        with kind.lock(path.stem).acquire(timeout=0) if kind.locks else nullcontext():
            check(path)
    except Timeout:
        return None
    except (OSError, ValueError) as error:
        return (str(error) or "it cannot be read") if path.exists() else None
    return ""


def _check_folder(folder: Path) -> None:
    manifest.check(folder, anew=True)


def _check_entry(path: Path) -> None:
    sealed_json.loads(path.read_bytes())


def _check_importance(path: Path) -> None:
    expected, beside = sealed_json.loads(path.read_bytes())["moments"], kinds.IMPORTANCE.beside_of(path)
    manifest.check_files(beside.parent, {beside.name: (expected["size"], expected["sha256"])}, anew=True)


def _check_picture(path: Path) -> None:
    if not png.is_whole(path.read_bytes()):
        raise ValueError("its checksums do not fit")


def _check_record(path: Path) -> None:
    sealed_json.loads(json.loads(path.read_bytes())["result"].encode())


def _check_journal(path: Path) -> None:
    sealed_json.check_lines(path.read_bytes())


_CHECKS: dict[Kind, Callable[[Path], None]] = {
    kinds.MERGED: _check_folder,
    kinds.IMPORTANCE: _check_importance,
    kinds.GRAMS: _check_folder,
    kinds.ALLOCATIONS: _check_entry,
    kinds.CALIBRATIONS: _check_entry,
    kinds.INSPECTIONS: _check_entry,
    kinds.SCORES: _check_entry,
    kinds.DIGESTS: _check_entry,
    kinds.PICTURES: _check_picture,
    kinds.RESULTS: _check_record,
    kinds.SEARCHES: _check_journal,
}

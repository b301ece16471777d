"""A cheap entry of each kind that a remote half keeps, as the steps write it, and what a reader gets of it."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lewis import store
from lewis.importance.calibration import Calibration
from lewis.reports import charts
from lewis.store import kinds
from lewis.store.kinds import Kind
from tests.lewis.store.test_remote import grams, importance, scores, whole

ROWS = Calibration("sums", ((3, 4, 5), (6, 7)))
SHOWN = ["densities", "of an allocation"]


class Shared(NamedTuple):
    """An entry.

    Attributes:
        kind: of it.
        digest: its own.
        make: writes and pushes it in the store of `LEWIS_HOME`.
    """

    kind: Kind
    digest: str
    make: Callable[[], Path]

    @property
    def path(self) -> Path:
        """Where it is in the store of `LEWIS_HOME`."""
        return self.kind.path(self.digest)

    def read(self) -> object:
        """The bytes that a reader gets of it, by their names; None if there is no whole one."""
        path = self.path
        if not is_whole(path):
            return None
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else self.kind.files_of(path)
        return {each.name: each.read_bytes() for each in files}


def is_whole(path: Path) -> bool:
    """Whether a reader finds the entry at `path`, here or in the remote half."""
    if path.parent.name == "merged":
        return store.read_manifest(path) is not None
    if path.parent.name == "pictures":
        try:
            return bool(charts._kept(SHOWN, _not_drawn))
        except LookupError:
            return False
    return whole(path)


def _not_drawn() -> bytes:
    raise LookupError


def png_of(text: bytes) -> bytes:
    """The smallest PNG file that says something."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", text) + chunk(b"IEND", b"")


def _merged() -> Path:
    folder = kinds.MERGED.path("7f")
    with store.publish(folder, {"digest": "7f"}) as scratch:
        (scratch / "config.json").write_text("{}")
        (scratch / "model.safetensors").write_text("weights")
    return folder


def _picture() -> Path:
    charts._kept(SHOWN, lambda: png_of(b"a picture"))
    return kinds.PICTURES.path(store.digest([charts.SEMANTICS, *SHOWN]))


def _written(kind: Kind, content: dict[str, Any]) -> Callable[[], Path]:
    def make() -> Path:
        store.write_entry(kind.path("3d"), content)
        return kind.path("3d")

    return make


ENTRIES = {
    entry.kind.name: entry
    for entry in (
        Shared(kinds.SCORES, "5c", scores),
        Shared(kinds.GRAMS, "9a", grams),
        Shared(kinds.IMPORTANCE, "1b", importance),
        Shared(kinds.MERGED, "7f", _merged),
        Shared(kinds.ALLOCATIONS, "3d", _written(kinds.ALLOCATIONS, {"experts": {"a": 0.5}})),
        Shared(kinds.CALIBRATIONS, ROWS.digest, ROWS.save),
        Shared(kinds.INSPECTIONS, "3d", _written(kinds.INSPECTIONS, {"measures": {"a": 1.5}})),
        Shared(kinds.REHEARSALS, "3d", _written(kinds.REHEARSALS, {"answer": {"a": 1}})),
        Shared(kinds.PICTURES, store.digest([charts.SEMANTICS, *SHOWN]), _picture),
    )
}
"""Kind -> its entry. `LEWIS_STORE_MERGED` has to be 1 for merged models."""
assert ENTRIES.keys() == {kind.name for kind in kinds.TABLE.values() if kind.shared != "never"}

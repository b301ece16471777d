"""A store of an older version is read as it is or brought up to date; one of a newer version is left alone."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.errors import InputError
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.merging.step import MergedModel
from lewis.store import housekeeping, kinds, writable
from lewis.store.verification import verify

OLD = sorted(Path(__file__).parent.glob("store_*.tar.gz"))


@pytest.fixture(params=OLD, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict]]:
    """A store as `tests.support.old_store` left it; gives what Prefect remembers of its entries."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    return json.loads((tmp_path / "references.json").read_text().replace("HOME", str(tmp_path / "home")))


def test_every_entry_of_an_old_store_is_read(old: dict[str, list[dict]]) -> None:
    writable.check_store()
    for kind in (kinds.MERGED, kinds.IMPORTANCE, kinds.GRAMS, kinds.ALLOCATIONS, kinds.CALIBRATIONS, kinds.INSPECTIONS):
        assert kind.entries(), kind.name
    for content in old["CalibrationEntry"]:
        assert CalibrationEntry.model_validate(content).tokens > 0
    measured = [ImportanceEntry.model_validate(content) for content in old["ImportanceEntry"]]
    assert len(measured) >= 3 and all(min(each.norms.values()) > 0 for each in measured)
    folders = {each.statistics for each in measured if each.statistics}
    assert len(folders) == 2 and all(store.read_manifest(folder) for folder in folders)
    (allocated,) = [AllocationEntry.model_validate(content) for content in old["AllocationEntry"]]
    assert all(0 < mean < 1 for mean in allocated.means.values())
    assert {len(each.densities) for each in allocated.experts().values()} == {11}
    for merged in [MergedModel.model_validate(content) for content in old["MergedModel"]]:
        weights = load_file(merged.folder / "model.safetensors")
        assert len(weights) == 11 and all(tensor.isfinite().all() for tensor in weights.values())
    found = verify()
    assert not found.damaged and found.checked >= 10
    for path in store.home().rglob("*"):
        os.utime(path, (0, 0))
    unused = housekeeping.survey(14, needed={})
    assert {item.kind for item in unused} >= {"merged", "grams", "importance", "allocations", "inspections"}


def test_an_old_store_is_brought_up_to_date_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writable.check_format()
    assert store.read_json(home / "format") == 1
    (home / "format").unlink()  # as versions before the number left it
    done = list[str]()

    def second() -> None:
        done.append("2")
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(writable, "FORMAT", 3)
    monkeypatch.setattr(writable, "_MIGRATIONS", {1: second, 2: lambda: done.append("3")})
    store.write_json(home / "format", 1)
    with pytest.raises(KeyboardInterrupt):
        writable.check_format()
    assert store.read_json(home / "format") == 1
    for _ in range(2):
        writable.check_format()
    assert done == ["2", "2", "3"] and store.read_json(home / "format") == 3


def test_a_newer_store_is_refused(home: Path) -> None:
    home.mkdir(exist_ok=True)
    store.write_json(home / "format", writable.FORMAT + 1)
    with pytest.raises(InputError, match=r"LEWIS_HOME: .* has the format 2, this version of LEWIS knows 1"):
        writable.check_store()
    (home / "format").write_text("{damaged")
    writable.check_store()
    assert store.read_json(home / "format") == writable.FORMAT

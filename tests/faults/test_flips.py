"""One bit flipped anywhere in a Gram file, a search's journal, a killed merge's journal or an object of a bucket.

It is never believed: what it was in is measured, computed or fetched again as it was, or begins again.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lewis import store
from lewis.importance.calibration import Calibration
from lewis.importance.step import find_or_measure_grams
from lewis.search.study import Log, Objective
from lewis.store import kinds, remote, sealed_json
from tests.conftest import Family
from tests.faults.fuzz import DRAWS
from tests.lewis.merging.test_resume import KILLED, LIMIT, content, prepare, recipe_of
from tests.lewis.store.test_remote import MAKERS, whole
from tests.support import pipeline
from tests.support.models import parse
from tests.support.odd_bucket import OddBucket


def flipped(data: bytes, bit: int) -> bytes:
    found = bytearray(data)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


def bits(data: bytes, count: int) -> list[int]:
    """So many bits of these bytes, the same ones at each call; the first and the last are among them."""
    last = 8 * len(data) - 1
    return sorted({0, last, *random.Random(len(data)).sample(range(last), min(count, last))})


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_of_a_gram_file(home: Path, family: Family) -> None:
    data = {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}
    recipe = parse(
        {
            "merge_method": "ties",
            "base_model": str(family.base),
            "models": [{"model": str(family.math)}],
            "lewis": {"calibrations": data},
        }
    )
    source, _ = pipeline.pin_all(recipe)
    assert source is not None
    base = pipeline.download(source)
    calibration = Calibration.load(pipeline.prepare_calibration(recipe, "sums", base).path)
    folder = find_or_measure_grams(base.open(), calibration)
    right = content(shutil.copytree(folder, home.parent / "right"))
    for name, data in right.items():
        for number, bit in enumerate(bits(data, DRAWS // 10)):
            overwrite(folder / name, flipped(data, bit))
            if number == 1:
                assert find_or_measure_grams(base.open(), calibration) == folder and content(folder) == right
            else:
                assert store.read_manifest(folder) is None, (name, bit)
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(home.parent / "right", folder)


def test_of_a_searchs_journal(home: Path) -> None:
    space = {"parameters.lambda": {"min": 0.5, "max": 2.0}}
    recipe = parse(
        {
            "merge_method": "ties",
            "base_model": "org/base",
            "models": [{"model": "org/a"}],
            "evaluate": {"tasks": ["sums"]},
            "search": {"space": space},
        }
    )

    def opened() -> Log:
        return Log(recipe, [Objective("sums/acc,none", True)], {"org/base": "1"}, "tasks")

    log = opened()
    for score in (0.5, 0.6, 0.7):
        log.done(log.ask(), [score])
    right = log.trials
    (path,) = kinds.SEARCHES.entries()
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        with pytest.raises(ValueError):
            sealed_json.check_lines(flipped(data, bit))
    for bit in bits(data, DRAWS // 10):
        overwrite(path, flipped(data, bit))
        assert opened().trials == [], bit
        shutil.rmtree(home / "quarantine")
        overwrite(path, data)
        assert opened().trials == right


def test_of_a_killed_merges_journal(family: Family, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_of(family))
    place = tmp_path / "dead"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(place / "out"), str(LIMIT)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    (partial,) = place.iterdir()
    data = (partial / "journal.jsonl").read_bytes()
    assert data.count(b"\n") > 2
    merge = prepare(recipe_of(family))
    merge.run(tmp_path / "undisturbed", max_shard_size=LIMIT)
    for bit in bits(data, max(1, DRAWS // 300)):
        copy = shutil.copytree(place, tmp_path / str(bit))
        overwrite(copy / partial.name / "journal.jsonl", flipped(data, bit))
        merge.run(copy / "out", max_shard_size=LIMIT)
        assert content(copy / "out") == content(tmp_path / "undisturbed"), bit
        assert os.listdir(copy) == ["out"]


@pytest.mark.parametrize("make", MAKERS)
def test_of_an_object_of_a_bucket(make: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_STORE", "odd://bucket/prefix")
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "one"))
    monkeypatch.setattr(remote, "_asleep", {})
    OddBucket.clear(0)
    made = make()
    right, files = dict(OddBucket.objects), sorted(each for each in made.parent.rglob("*") if each.is_file())
    there = tmp_path / "two" / made.parent.name / made.name
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "two"))
    for name, data in right.items():
        for bit in bits(data, DRAWS):
            OddBucket.objects.update(right)
            OddBucket.objects[name] = flipped(data, bit)
            assert not whole(there) and not there.exists(), (name, bit)
    OddBucket.objects.update(right)
    assert whole(there)
    assert all((there.parent / each.relative_to(made.parent)).read_bytes() == each.read_bytes() for each in files)

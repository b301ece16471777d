"""One bit flipped anywhere in a Gram file, a search's journal, a killed merge's journal or an object of a bucket.

It is never believed: what it was in is measured, computed or fetched again as it was, or begins again.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lewis import store
from lewis.importance import gram_files
from lewis.importance.calibration import Calibration
from lewis.importance.step import find_or_measure_grams
from lewis.search.study import Log, Objective
from lewis.store import kinds, lease, remote, sealed_json
from lewis.store.lease import Lease
from tests.conftest import Family
from tests.faults.fuzz import DRAWS
from tests.lewis.merging.test_resume import KILLED, LIMIT, content, prepare, recipe_of
from tests.support import pipeline
from tests.support.models import parse
from tests.support.odd_bucket import OddBucket
from tests.support.shared_entries import ENTRIES
from tests.support.warm import WarmPython


def flipped(data: bytes, bit: int) -> bytes:
    found = bytearray(data)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


def bits(data: bytes, count: int) -> list[int]:
    """So many bits of these bytes, the same ones at each call; the first and the last are among them."""
    last = 8 * len(data) - 1
    return sorted({0, last, *random.Random(len(data)).sample(range(last), min(count, last))})


def overwrite(path: Path, data: bytes) -> None:
    if path.exists():
        path.chmod(0o600)
    path.write_bytes(data)


def gram_pass(family: Family) -> Callable[[], Path]:
    """A function that finds or measures the statistics of a model."""
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
    return lambda: find_or_measure_grams(base.open(), calibration)


def test_of_a_gram_file(home: Path, family: Family) -> None:
    measure = gram_pass(family)
    folder = measure()
    right = content(shutil.copytree(folder, home.parent / "right"))
    for name, data in right.items():
        for number, bit in enumerate(bits(data, DRAWS // 10)):
            overwrite(folder / name, flipped(data, bit))
            if number == 1:
                assert measure() == folder and content(folder) == right
            else:
                assert store.read_manifest(folder) is None, (name, bit)
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(home.parent / "right", folder)


class Killed(BaseException):
    """In place of a kill."""


def test_of_a_gram_file_of_a_pass_that_was_killed(home: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pass goes on from it, and does not seal it."""
    measure, write = gram_pass(family), gram_files.write
    right = content(folder := measure())
    shutil.rmtree(folder)

    def write_or_die(folder: Path, block: str, *rest: Any) -> dict[str, str]:
        if block.endswith(".1"):
            raise Killed
        return write(folder, block, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(gram_files, "write", write_or_die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill leaves nothing tidied up
        measure()
    [left] = kinds.GRAMS.folder.glob(".*.partial")
    files = content(left)
    assert len(files) > 1
    for name, data in files.items():
        for bit in bits(data, DRAWS // 300):
            store.discard(folder)
            left.mkdir(exist_ok=True)
            for each, kept in files.items():
                overwrite(left / each, flipped(kept, bit) if each == name else kept)
            assert measure() == folder and content(folder) == right, (name, bit)


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
    for bit in bits(data, 20 * DRAWS):
        with pytest.raises(ValueError):
            sealed_json.check_lines(flipped(data, bit))
    for bit in bits(data, DRAWS // 10):
        overwrite(path, flipped(data, bit))
        assert opened().trials == [], bit
        shutil.rmtree(home / "quarantine")
        overwrite(path, data)
        assert opened().trials == right


def test_of_a_killed_merges_journal(family: Family, tmp_path: Path, warm: WarmPython) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_of(family))
    place = tmp_path / "dead"
    assert warm.exit_code(KILLED, tmp_path / "recipe.yaml", place / "out", LIMIT) == -signal.SIGKILL
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


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> type[OddBucket]:
    monkeypatch.setenv("LEWIS_STORE", "odd://bucket/prefix")
    monkeypatch.setenv("LEWIS_STORE_MERGED", "1")
    monkeypatch.setattr(remote, "_asleep", {})
    OddBucket.clear(0)
    return OddBucket


@pytest.mark.parametrize("kind", ENTRIES)
def test_of_an_object_of_a_bucket(
    bucket: type[OddBucket], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ENTRIES[kind]
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "one"))
    entry.make()
    objects, right = dict(bucket.objects), entry.read()
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "two"))
    for name, data in objects.items():
        for bit in bits(data, DRAWS // 3):
            bucket.objects.update(objects)
            bucket.objects[name] = flipped(data, bit)
            assert entry.read() is None and not entry.path.exists(), (name, bit)
    bucket.objects.update(objects)
    assert right and entry.read() == right


@pytest.mark.parametrize("held", [True, False])
def test_of_the_object_of_a_lease(bucket: type[OddBucket], monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """Of a holder that was killed, or that gave it back: it holds up nobody for longer than a lease lives."""
    seconds, poll = 0.02, 0.001
    for name, value in {"SECONDS": seconds, "GRACE": seconds, "_POLL": poll, "_seen": {}}.items():
        monkeypatch.setattr(lease, name, value)
    mine = Lease("x")
    place = f"bucket/prefix/{mine._folder}/00000001"
    data = mine._content(time.time() + 60 if held else 0.0)
    for bit in bits(data, DRAWS // 3):
        bucket.clear(0)
        bucket.objects[place], bucket.modified_at[place] = flipped(data, bit), time.time()
        lease._seen.clear()
        taken, begun = Lease("x"), time.monotonic()
        with taken.acquire(timeout=60):
            assert [name.rpartition("/")[2] for name in bucket.objects] == ["00000002"], bit
        assert time.monotonic() - begun < 30, bit

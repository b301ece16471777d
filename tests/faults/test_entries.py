"""Every kind of entry cut, flipped and emptied: it is not believed, but set aside, told, and made again as it was."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lewis import store
from lewis.evaluation.harness import lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scores import Evaluated
from lewis.importance.calibration import Calibration
from lewis.importance.step import find_or_measure_grams
from lewis.inspection.step import InspectionInput, inspect
from lewis.recipe.recipe import Recipe
from lewis.reports import charts
from lewis.search.study import Log, Objective
from lewis.store import kinds, sealed_json
from lewis.store.manifest import remembered_sha256
from lewis_tasks.support.caching import RESULTS
from tests.conftest import Family, full
from tests.support import pipeline
from tests.support.damage import DAMAGES, damage
from tests.support.models import parse
from tests.support.shared_entries import png_of

DATA: dict[str, Any] = {
    "merge_method": "ties",
    "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}, "prune_by": "activation"},
    "evaluate": {"tasks": ["sums"]},
    "search": {"space": {"parameters.lambda": {"min": 0.5, "max": 2.0}}},
}


@dataclass
class Store:
    """A store with an entry of every kind, made by the steps that a run goes through."""

    recipe: Recipe

    def use(self) -> dict[str, Any]:
        """Find or make everything; gives what is in it."""
        source, sources = pipeline.pin_all(self.recipe)
        assert source is not None and self.recipe.evaluate is not None
        base, experts = pipeline.download(source), [pipeline.download(each) for each in sources]
        layers = pipeline.layers_of(base)
        measured, allocated = pipeline.guide(self.recipe, base, experts)
        assert allocated is not None
        sums = pipeline.prepare_calibration(self.recipe, "sums", base)
        grams = find_or_measure_grams(experts[0].open(), Calibration.load(sums.path))
        merged = pipeline.merge(self.recipe, base, experts, allocated)
        files = merged.files("merged")
        scores = pipeline.score(files, EvalSettings.of(self.recipe.evaluate, self.recipe.root))
        return {
            "layers": layers,
            "norms": [each.norms for each in measured],
            "moments": [{name: s.tolist() for name, s in each.moments.items()} for each in measured],
            "grams": {path.name: path.read_bytes() for path in grams.iterdir()},
            "inspected": inspect(InspectionInput(base, tuple(experts))).measures.to_json(),
            "densities": allocated.experts(),
            "tokens": Calibration.load(sums.path).samples,
            "merged": {path.name: path.read_bytes() for path in merged.folder.iterdir()},
            "scores": scores.scores,
            "picture": charts.densities(allocated),
        }


@pytest.fixture
def made(home: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> Store:
    def evaluate(folder: Path, *_: Any, **__: Any) -> Evaluated:
        results = {"sums": {"acc,none": 0.5, "sample_len": 10}}
        ends = {"empty": {}, "tried": 0, "ended": 0, "perplexity": None}
        kept = {"documents": {}, "samples": [], "groups": {}, "ends": ends}
        return Evaluated.of(str(folder), {"results": results, "higher_is_better": {"sums": {"acc": True}}, **kept})

    drawn = png_of(b"a picture")
    monkeypatch.setattr(charts, "density_heat_map", lambda *_: drawn)
    monkeypatch.setattr(lm_eval, "evaluate", evaluate)
    monkeypatch.setattr(lm_eval, "tasks_digest", lambda settings: "tasks")
    models = [{"model": str(path)} for path in family.experts]
    return Store(parse({**DATA, "base_model": str(family.base), "models": models}))


ENTRIES: dict[str, Callable[[], Path]] = {
    **{name: lambda name=name: next(kinds.MERGED.folder.glob(f"*/{name}")) for name in (  # type: ignore[misc]
        "model.safetensors", "config.json", "tokenizer.json", "lewis.json",
    )},
    "importance": lambda: kinds.IMPORTANCE.entries()[0],
    "moments": lambda: kinds.IMPORTANCE.beside_of(kinds.IMPORTANCE.entries()[0]),
    "grams": lambda: next(kinds.GRAMS.folder.glob("*/*.safetensors")),
    "grams' manifest": lambda: next(kinds.GRAMS.folder.glob("*/lewis.json")),
    "inspections": lambda: kinds.INSPECTIONS.entries()[0],
    "allocations": lambda: kinds.ALLOCATIONS.entries()[0],
    "calibrations": lambda: kinds.CALIBRATIONS.entries()[0],
    "scores": lambda: kinds.SCORES.entries()[0],
    "pictures": lambda: kinds.PICTURES.entries()[0],
}  # fmt: skip


ONE = [how if how == "flipped" else pytest.param(how, marks=full) for how in DAMAGES]


@pytest.mark.parametrize("how", ONE)
def test_every_kind_of_entry_is_made_again(made: Store, home: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    first = made.use()
    for name, find in ENTRIES.items():
        path = find()
        caplog.clear()
        damage(path, how)
        assert made.use() == first, name
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any(path.name in each and "set aside as" in each for each in told), (name, told)
        assert path.exists()
    quarantined = [path.name.split("-")[0] for path in (home / "quarantine").iterdir()]
    folders = {"merged": 4, "importance": 3, "grams": 2}
    single = ("inspections", "allocations", "calibrations", "scores", "pictures")
    assert Counter(quarantined) == {**folders, **dict.fromkeys(single, 1)}
    assert made.use() == first and len(list((home / "quarantine").iterdir())) == len(quarantined)


@pytest.mark.usefixtures("remembers_small_files")
@pytest.mark.parametrize("how", ONE)
def test_a_remembered_fact_is_found_out_again(made: Store, how: str, caplog: pytest.LogCaptureFixture) -> None:
    first = made.use()
    for path in (entries := kinds.DIGESTS.entries()):
        damage(path, how)
    assert len(entries) > 3 and made.use() == first
    assert caplog.text.count("is damaged and made again") == len(entries)


@pytest.mark.parametrize("how", ONE)
def test_prefect_does_not_believe_a_damaged_record_or_one_of_a_damaged_entry(made: Store, how: str) -> None:
    from prefect.filesystems import LocalFileSystem
    from prefect.results import ResultStore

    from lewis_tasks.support.caching import RecordSerializer

    made.use()
    source, sources = pipeline.pin_all(made.recipe)
    assert source is not None
    base, experts = pipeline.download(source), [pipeline.download(each) for each in sources]
    measured, allocated = pipeline.guide(made.recipe, base, experts)
    assert allocated is not None
    merged = pipeline.merge(made.recipe, base, experts, allocated)
    storage = LocalFileSystem(basepath=str(RESULTS.folder))
    records = ResultStore(result_storage=storage, serializer=RecordSerializer(), cache_result_in_memory=False)
    values = {"measured": measured, "allocated": allocated, "merged": merged, "base": base}
    for name, value in values.items():
        records.write(key=name, obj=value)
        assert records.exists(name) and records.read(name).result == value
    for name, path in {
        "measured": kinds.IMPORTANCE.beside_of(measured[0].path),
        "allocated": allocated.path,
        "merged": merged.folder / "config.json",
        "base": RESULTS.folder / "base",
    }.items():
        damage(path, how)
        assert not records.exists(name), name


@pytest.mark.parametrize("how", DAMAGES)
def test_a_search_begins_anew(home: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = parse({**DATA, "base_model": "org/base", "models": [{"model": "org/a"}]})
    opened = [Log(recipe, [Objective("sums/acc,none", True)], {"org/base": "1"}, "tasks")]
    for score in (0.5, 0.6):
        opened[0].done(opened[0].ask(), [score])
    trials = opened[0].trials
    (path,) = kinds.SEARCHES.entries()
    assert Log(recipe, opened[0].objectives, {"org/base": "1"}, "tasks").trials == trials
    damage(path, how)
    assert Log(recipe, opened[0].objectives, {"org/base": "1"}, "tasks").trials == []
    assert how == "emptied" or "set aside as" in caplog.text


def test_no_flipped_bit_of_an_entry_is_believed() -> None:
    whole = sealed_json.dumps({"norms": {"a": 1.5, "é": None}, "model": "x"}).encode()
    assert sealed_json.loads(whole) == {"norms": {"a": 1.5, "é": None}, "model": "x"}
    picture = png_of(b"x")
    for data, check in ((whole, sealed_json.loads), (picture, kinds.check_png)):
        assert _is_believed(check, data) and not _is_believed(check, data + b"\0")
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            assert not _is_believed(check, bytes(flipped)), (bit, bytes(flipped))
        assert not any(_is_believed(check, data[:stop]) for stop in range(len(data)))


def _is_believed(check: Callable[[bytes], Any], data: bytes) -> bool:
    try:
        check(data)
    except ValueError:
        return False
    return True


@pytest.mark.usefixtures("remembers_small_files")
def test_a_flip_that_leaves_size_and_times_is_found_by_verify(made: Store, home: Path) -> None:
    """What a disk does by itself: no stamp tells of it."""
    from lewis.store.verification import verify

    first = made.use()
    assert verify().damaged == [] and verify().checked > 10
    weights = next(kinds.MERGED.folder.glob("*/model.safetensors"))
    sha256 = store.file_sha256(weights)
    damage(weights, "flipped")
    stat = weights.stat()
    note = kinds.DIGESTS.path(store.digest(str(weights))[:40])
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    store.write_entry(note, {"stamp": stamp, "sha256": sha256})
    assert remembered_sha256(weights) == sha256 and store.read_manifest(weights.parent) is not None
    (found,) = verify().damaged
    assert (found.kind, found.entry) == (
        "merged",
        str(weights.parent),
    ) and "model.safetensors: expected SHA-256" in found.why
    assert store.read_manifest(weights.parent) is None  # what was remembered is replaced
    assert made.use() == first and verify().damaged == []


def test_lewis_verify_tells_and_fails(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from lewis_flows.cli.main import main

    made.use()
    assert main(["verify"]) == 0 and "0 damaged" in capsys.readouterr().out
    paths = [ENTRIES["scores"](), ENTRIES["config.json"](), ENTRIES["moments"](), ENTRIES["pictures"]()]
    for path in paths:
        damage(path, "flipped")
    assert main(["verify", "--json"]) == 1
    told = capsys.readouterr()
    damaged = json.loads(told.out)["damaged"]
    assert [each["kind"] for each in damaged] == ["merged", "importance", "scores", "pictures"]
    assert "config.json: expected SHA-256" in damaged[0]["why"] and "4 of " in told.err
    assert all(path.exists() for path in paths)  # a look moves nothing

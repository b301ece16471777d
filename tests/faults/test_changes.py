"""What a run reads changes under it: it uses what it began with, or says what changed; nothing wrong is kept."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lewis import library, store
from lewis.allocation import step as allocation
from lewis.errors import LewisError
from lewis.evaluation.harness import lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scores import Evaluated
from lewis.importance import calibration, grams, measure, step
from lewis.importance.calibration import Calibration
from lewis.importance.step import CalibrationEntry
from lewis.inspection import step as inspection
from lewis.inspection.step import InspectionInput
from lewis.merging.run import Merge
from lewis.recipe.recipe import Recipe
from lewis.search import trial
from lewis.steps.graph import graph
from lewis.store import kinds, manifest
from tests.conftest import Family, full
from tests.flows.conftest import TASK, write_words
from tests.support import pipeline
from tests.support.deployed import deploying
from tests.support.lineage import make_home
from tests.support.models import parse

DATA: dict[str, Any] = {
    "merge_method": "ties",
    "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
}


def put(path: Path, content: bytes) -> None:
    """Write other content of the same size into a file; its modification time stays."""
    before = path.stat()
    assert len(content) == before.st_size and content != path.read_bytes()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change(path: Path) -> None:
    """Flip a byte of the weights."""
    content = path.read_bytes()
    put(path, content[:-1] + bytes([content[-1] ^ 1]))


def swap(path: Path, old: str, new: str) -> None:
    """Put one word of a JSON file in the place of another of its length."""
    put(path, path.read_bytes().replace(old.encode(), new.encode()))


def first(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, changing: Callable[[], object]) -> None:
    """Call `changing` before each call of a module's function."""
    real = getattr(module, name)

    def both(*given: Any, **named: Any) -> Any:
        changing()
        return real(*given, **named)

    monkeypatch.setattr(module, name, both)


@pytest.fixture
def models(family: Family, tmp_path: Path) -> dict[str, Path]:
    """Base and experts that may be changed."""
    found = {name: tmp_path / name for name in ("base", "math", "code", "lora")}
    for name, path in found.items():
        shutil.copytree(getattr(family, name), path, copy_function=shutil.copyfile)
    time.sleep(1.2 * manifest._TIMESTAMP_TICK / 1e9)  # else no checksum is remembered, and each look reads the files
    return found


def recipe_of(models: dict[str, Path], *experts: str, **blocks: Any) -> Recipe:
    of = [{"model": str(models[name])} for name in experts or ("math", "code")]
    return parse({**DATA, "base_model": str(models["base"]), "models": of, **blocks}, models["base"].parent)


def merged(recipe: Recipe) -> bytes:
    source, sources = pipeline.pin_all(recipe)
    assert source is not None
    base, experts = pipeline.download(source), [pipeline.download(each) for each in sources]
    _, allocated = pipeline.guide(recipe, base, experts)
    return (pipeline.merge(recipe, base, experts, allocated).folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("base", "merge"), ("lora", "merge"), ("math", "importance")),
        *(pytest.param(name, "importance", marks=full) for name in ("base", "lora")),
        pytest.param("math", "merge", marks=full),
    ],
)
def test_a_model_that_changes_while_it_is_read(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    owner, called = (Merge, "_write") if step == "merge" else (measure, "measure_sets")
    real, weights = getattr(owner, called), models[name] / ("adapter_" * (name == "lora") + "model.safetensors")
    left, recipe = [weights], recipe_of(models, "lora" if name == "lora" else "math", "code")

    def changing(*given: Any, **named: Any) -> Any:
        while left:
            change(left.pop())
        return real(*given, **named)

    monkeypatch.setattr(owner, called, changing)
    with pytest.raises(LewisError, match=rf"{name}: .* changed while running: was sha256:.*; run again"):
        merged(recipe)
    assert not kinds.MERGED.entries()
    of_changed = merged(recipe)
    change(weights)  # as it was before
    again = merged(recipe)
    monkeypatch.setenv("LEWIS_HOME", str(home.parent / "another"))
    assert again == merged(recipe)
    assert name == "base" or again != of_changed


def test_densities_of_a_model_that_changes_while_it_is_looked_at_are_not_kept(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were found again once the model was as before."""
    first(monkeypatch, allocation, "_allocated", lambda: change(models["math"] / "model.safetensors"))
    with pytest.raises(LewisError, match=r"math: .* changed while running"):
        merged(recipe_of(models))
    assert not kinds.ALLOCATIONS.entries()


def test_rows_of_a_tokenizer_that_changes_while_it_is_used_are_not_kept(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(monkeypatch, calibration, "calibrate", lambda: swap(models["base"] / "tokenizer.json", "w59", "v59"))
    with pytest.raises(LewisError, match=r"base: .* changed while running"):
        merged(recipe_of(models))
    assert not kinds.CALIBRATIONS.entries()


def test_the_covered_layers_of_a_base_that_changes_while_they_are_found_are_not_kept(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pipeline.download(pipeline.pin(str(models["base"]), home))
    first(monkeypatch, step, "covered_tensors", lambda: swap(models["base"] / "config.json", "silu", "gelu"))
    with pytest.raises(LewisError, match=r"base: .* changed while running"):
        step.layers_of(base)
    assert not any("layers" in path.read_text() for path in kinds.DIGESTS.entries())


def test_the_inspection_of_a_model_that_changes_while_it_is_read_is_not_kept(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, math = (pipeline.download(pipeline.pin(str(models[name]), home)) for name in ("base", "math"))
    first(monkeypatch, inspection, "measure", lambda: change(models["math"] / "model.safetensors"))
    with pytest.raises(LewisError, match=r"math: .* changed while running"):
        inspection.inspect(InspectionInput(base, (math,)))
    assert not kinds.INSPECTIONS.entries()


def test_norms_of_a_model_that_changes_after_its_pass_are_not_kept(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pipeline.download(pipeline.pin(str(models["math"]), home))
    rows = Calibration("sums", ((3, 4, 5), (6, 7)))
    entry = CalibrationEntry(name="sums", digest=rows.digest, tokens=rows.tokens, path=rows.save())

    first(monkeypatch, grams, "measured_by", lambda: change(models["math"] / "model.safetensors"))
    with pytest.raises(LewisError, match=r"math: .* changed while running"):
        pipeline.measure(files, [entry], grams=True)
    assert not kinds.IMPORTANCE.entries()


def test_statistics_of_a_model_that_changes_while_a_fit_measures_it_are_not_kept(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later merge of the model as it was before took them, and gave other weights under its digest."""
    rows = {"sums": {"texts": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)], "samples": 8}}
    blocks = {"merge_method": "regmean", "parameters": {"ridge": "auto"}, "lewis": {"calibrations": rows}}
    recipe, left = recipe_of(models, **blocks), [models["math"] / "model.safetensors"]
    source, sources = pipeline.pin_all(recipe)
    assert source is not None
    base, experts = pipeline.download(source), [pipeline.download(each) for each in sources]
    pipeline.guide(recipe, base, experts)
    kept = kinds.GRAMS.entries()
    first(monkeypatch, grams, "measure_grams", lambda: left and change(left.pop()))
    with pytest.raises(LewisError, match=r"math: .* changed while running"):
        pipeline.merge(recipe, base, experts)
    assert len(kept) == 2 and kinds.GRAMS.entries() == kept
    assert not list(kinds.MERGED.folder.rglob("ridges.json"))  # losses of the changed model, for the next process


def test_a_trial_of_a_model_that_changes_while_it_is_merged_is_not_scored(
    models: dict[str, Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores would be kept as those of the models before the change."""
    write_words(tmp_path)
    (tmp_path / "words.yaml").write_text(TASK)
    recipe = recipe_of(models, "math", "lora", evaluate={"tasks": ["words.yaml"]})
    known = pipeline.known(recipe, *pipeline.fetch(recipe))
    monkeypatch.setattr(trial, "MEMORY", memory := tmp_path / "shm")
    memory.mkdir()
    first(monkeypatch, Merge, "run", lambda: change(models["lora"] / "adapter_model.safetensors"))
    monkeypatch.setattr(lm_eval, "evaluate", lambda *_, **__: pytest.fail("it was scored"))
    with pytest.raises(LewisError, match=r"lora: .* changed while running"):
        trial.score_trial(graph(recipe), "merged", known, pipeline.eval_settings(recipe))
    assert not kinds.SCORES.entries() and not kinds.ANSWERS.entries()
    assert not list(memory.rglob("*.safetensors")) and not list(home.glob("trials/**/*.safetensors"))


def test_a_recipe_that_is_edited_while_it_is_run(models: dict[str, Path], home: Path, tmp_path: Path) -> None:
    data = {"merge_method": "linear", "models": [{"model": str(models[each])} for each in ("math", "code")]}
    file = tmp_path / "edited.yaml"
    file.write_text(yaml.safe_dump(data))
    expected = library.merge(file, tmp_path / "undisturbed")

    def edit(*_: object) -> None:
        file.write_text("merge_method: [")

    found = library.merge(file, tmp_path / "out", report=edit)
    assert file.read_text() == "merge_method: [" and found.digest == expected.digest
    for name in ("model.safetensors", "lewis.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@full
@pytest.mark.parametrize("when", ["works", "waits", "deployed"])
def test_a_recipe_that_is_edited_while_its_flow_run(
    models: dict[str, Path],
    empty_database: Path,
    tmp_path: Path,
    prefect_url: str,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """A run that waits merges what the file says when it begins; one that works goes on with that, and the next run
    merges the edit. The file in MLflow is the text that was merged.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from lewis.registry import tracking
    from lewis_flows import merge as flows
    from lewis_tasks.support import patience

    make_home(tmp_path / "home", empty_database, monkeypatch)
    monkeypatch.setattr(patience, "begin", lambda **_: None)  # it is for a process that ends with its run
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    monkeypatch.setenv("LEWIS_RECIPES", str(recipes))

    def text(weight: float) -> str:
        experts = [{"model": str(models[each]), "parameters": {"weight": weight}} for each in ("math", "code")]
        method = {"merge_method": "task_arithmetic", "base_model": str(models["base"])}
        return yaml.safe_dump({**method, "models": experts, "register": {"name": "edited"}})

    file, (old, new) = recipes / "edited.yaml", (text(0.5), text(0.25))
    digests = []
    for each in (old, new):
        file.write_text(each)
        digests.append(library.merge(file, tmp_path / str(len(digests))).digest)
    file.write_text(old)
    owner, name = (flows, "absorb") if when == "waits" else (Merge, "run")
    real, edited = getattr(owner, name), list[Callable[[], object]]()

    def editing(*given: Any, **named: Any) -> Any:
        file.write_text(new)
        for each in edited:
            each()
        return real(*given, **named)

    monkeypatch.setattr(owner, name, editing)
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        if when == "deployed":
            found = deployed_twice(prefect_url, edited)
        else:
            found = [flows.merge_flow(str(file)).digest for _ in range(2)]
    assert found == ([digests[1]] * 2 if when == "waits" else digests)
    with tracking.client("reading the recipes") as client:
        of_runs = {
            each.tags["lewis.digest"]: tracking.file_of(client, str(each.run_id), "recipe.yaml").decode()
            for each in client.search_model_versions("name='edited'")
        }
    assert of_runs == ({digests[1]: new} if when == "waits" else dict(zip(digests, (old, new), strict=True)))


def deployed_twice(url: str, edited: list[Callable[[], object]]) -> list[str]:
    """Run the deployment of a recipe, and then the run that its edit has started; gives the digests of the merges."""
    from prefect.flow_engine import run_flow
    from prefect.states import Scheduled

    from lewis_flows.merge import merge_flow
    from lewis_flows.service.deploy import Follower
    from lewis_tasks.support.flow_run import result_of_run

    said = list[str]()
    with deploying(url) as client:
        follower = Follower(said.append)
        follower.follow()
        edited.append(follower.follow)
        deployment = client.read_deployment_by_name("merge/edited").id

        def run(of: Any) -> str:
            """As a worker does."""
            return str(result_of_run(run_flow(merge_flow, flow_run=of, return_type="state")).digest)

        first = client.create_flow_run_from_deployment(deployment)
        found = [run(first)]
        assert "edited was edited: it is merged now" in said
        of_deployment = (each for each in client.read_flow_runs() if each.deployment_id == deployment)
        [second] = [each for each in of_deployment if "edited" in each.tags]
        client.set_flow_run_state(second.id, Scheduled(), force=True)  # now, not some seconds after the edit
        return [*found, run(client.read_flow_run(second.id))]


def test_a_task_that_is_edited_while_it_is_scored(
    models: dict[str, Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores would be kept as those of the file before the edit."""
    file = tmp_path / "words.yaml"
    write_words(tmp_path)
    file.write_text(TASK)
    edits = [file.read_text().replace("{{question}}", "{{question}} "), TASK]

    def evaluate(folder: Path, *_: Any, **__: Any) -> Evaluated:
        if edits:
            file.write_text(edits.pop(0))
        kept = {
            "documents": {},
            "samples": [],
            "groups": {},
            "ends": {"empty": {}, "tried": 0, "ended": 0, "perplexity": None},
        }
        results = {"words": {"acc,none": 0.5, "sample_len": 10}}
        return Evaluated.of(str(folder), {"results": results, "higher_is_better": {"words": {"acc": True}}, **kept})

    monkeypatch.setattr(lm_eval, "evaluate", evaluate)
    source, _ = pipeline.pin_all(recipe_of(models))
    assert source is not None
    files, settings = pipeline.download(source), EvalSettings(tasks=("words.yaml",), root=tmp_path)
    for _ in range(2):
        with pytest.raises(LewisError, match=r"evaluate: a file of words.yaml changed while running, .*; run again"):
            pipeline.score(files, settings)
        assert not kinds.SCORES.entries()
    assert pipeline.score(files, settings).scores


@full
def test_the_answers_of_a_model_that_changes_while_it_is_scored_are_not_kept(
    models: dict[str, Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be taken for answers of the model as it was, once it is that again."""
    write_words(tmp_path)
    (tmp_path / "words.yaml").write_text(TASK)
    weights, real = models["math"] / "model.safetensors", lm_eval.evaluate
    files = pipeline.download(pipeline.pin(str(models["math"]), home))
    settings = EvalSettings(tasks=("words.yaml",), root=tmp_path, limit=8)

    def changing(*given: Any, **named: Any) -> Any:
        put(weights, (models["code"] / "model.safetensors").read_bytes())
        return real(*given, **named)

    monkeypatch.setattr(lm_eval, "evaluate", changing)
    with pytest.raises(LewisError, match=r"math: .* changed while running"):
        pipeline.score(files, settings)
    assert not kinds.ANSWERS.entries() and not kinds.SCORES.entries()


@pytest.mark.parametrize("how", ["missing", "full", "no inode", "filled meanwhile", "less than a merge asks for"])
def test_a_trial_whose_memory_is_taken_is_written_to_the_disk(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    memory, written = tmp_path / "shm", list[Path]()
    monkeypatch.setattr(trial, "MEMORY", memory)
    if how != "missing":
        memory.mkdir()
    room = 0 if how == "full" else 1 << 40
    monkeypatch.setattr(trial.shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    real = os.mkdir

    def mkdir(path: Path, *given: Any, **named: Any) -> None:
        if how == "no inode" and Path(path).is_relative_to(memory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *given, **named)

    monkeypatch.setattr(os, "mkdir", mkdir)

    def run(folder: Path, **_: Any) -> None:
        written.append(folder)
        if folder.is_relative_to(memory) and how == "less than a merge asks for":
            store.check_space(folder, 1 << 50)
        if folder.is_relative_to(memory):
            raise LewisError(f"{folder}: cannot be written") from OSError(errno.ENOSPC, "No space left on device")
        folder.mkdir()

    answer = stub_trial(monkeypatch, run)
    assert answer() == "scores"
    tried = how in ("filled meanwhile", "less than a merge asks for")
    assert [each.is_relative_to(memory) for each in written] == ([True, False] if tried else [False])
    assert not any(each.exists() for each in written)


def stub_trial(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]) -> Callable[[], Any]:
    """A trial that finds no scores, merges by `run`, and scores what is there."""
    prepared = SimpleNamespace(digest="d" * 64, size=1, run=run, as_adapter=False)
    given = SimpleNamespace(base=None, check_unchanged=lambda: None)
    node = SimpleNamespace(needs=(), given=lambda _: given)
    monkeypatch.setattr(trial, "run", lambda *_, **__: {})
    monkeypatch.setattr(trial, "prepare_merge", lambda _: prepared)
    monkeypatch.setattr(trial, "find_scores", lambda *_: None)
    monkeypatch.setattr(trial, "score", lambda *_, **__: "scores")
    graph: Any = {"merge experts": node}
    settings: Any = None
    return lambda: trial.score_trial(graph, "x", {}, settings)

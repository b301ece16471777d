"""Training after a fit: what it brings, that it is judged, and that any number of threads gives the same bytes."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lewis.errors import InputError, RecipeError
from lewis.importance.calibration import Calibration
from lewis.importance.measure import network_of
from lewis.merging import forecast
from lewis.merging.fitting import held_back, length, refine
from lewis.merging.fitting.held_back import Verdict
from lewis.merging.forecast import Forecast
from lewis.merging.run import Merge, text_of_fit
from lewis.methods import Parameter
from lewis.models.checkpoint import Checkpoint
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Refine
from tests.conftest import Family
from tests.lewis.merging.fitting.test_fit import merge_of, prepare, recipe_of, texts
from tests.lewis.merging.fitting.test_held_back import held
from tests.lewis.merging.fitting.test_static_fit import mixture
from tests.lewis.models.test_module_tree import SAMPLES
from tests.support.distances import distance
from tests.support.models import write_expert, write_llama, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]


@pytest.fixture
def apart(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """Experts that moved so far that a fit leaves something; of a Llama unless a test names another architecture."""
    monkeypatch.setattr(held_back, "_distance", lambda *_: distance(0.1, 0.2))  # a fit to noise may not hold
    monkeypatch.setattr(length, "MOST", 0)
    base = tmp_path / "base"
    if getattr(request, "param", "llama") == "llama":
        write_llama(base)
    else:  # whose weights are transposed
        config = GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=2)
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(base)
        write_tokenizer(base)
    return Family(base, *(write_expert(base, tmp_path / n, seed=i, scale=0.2) for i, n in enumerate(("a", "bb"))), base)


def trained(family: Family, folder: Path | None = None, **keys: Any) -> Merge:
    return held(family, folder, {"epochs": 2, "rank": 4, "rate": 0.01, **keys})


def divergence(expert: Path, merged: Path, rows: Calibration) -> float:
    """KL divergence of whole distributions, the mean over the predicted tokens of a row, then over the rows."""
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (expert, merged)]
    found = []
    for ids, weights in zip(
        rows.samples, rows.of_answers.weights or [[1.0] * len(r) for r in rows.samples], strict=True
    ):
        with torch.no_grad():
            wanted, own = (model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in models)
        found.append((wanted.exp() * (wanted - own)).sum(-1)[torch.tensor(weights[1:]) > 0].mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(
    ("apart", "answers"),
    [
        ("gpt2", True),
        pytest.param("gpt2", False, marks=pytest.mark.long),
        pytest.param("llama", True, marks=pytest.mark.long),
        ("llama", False),
    ],
    indirect=["apart"],
)
def test_the_written_model_is_closer_to_the_experts(apart: Family, tmp_path: Path, answers: bool) -> None:
    merge = trained(apart, tmp_path if answers else None, epochs=4)
    written = merge.run(tmp_path / "trained")
    replace(merge, refine=None).run(tmp_path / "fit")
    verdict = Verdict.from_json(json.loads((tmp_path / "trained" / "lewis.json").read_text())["held_back"])
    assert verdict.refined and written.fit == verdict.to_text()
    assert verdict.taken == 0, "the fit without training is that of the first ridge"
    for name, stated in (("fit", verdict.refined.divergence[0]), ("trained", min(verdict.refined.divergence))):
        pairs = [(each.model.folder, each.held_back) for each in merge.experts]
        found = [divergence(expert, tmp_path / name, rows) for expert, rows in pairs if rows]
        assert stated == pytest.approx(sum(found) / 2, rel=1e-3)
    assert verdict.refined.taken and min(verdict.refined.divergence) < 0.97 * verdict.refined.divergence[0]
    passes = "1 pass" if verdict.refined.taken == 1 else f"{verdict.refined.taken} passes"
    text = f"trained for {passes} over the rows: divergence from the experts "
    assert text in text_of_fit(written.manifest)


@pytest.mark.parametrize("apart", ["llama", pytest.param("gpt2", marks=pytest.mark.long)], indirect=True)
def test_threads_change_no_byte_and_settings_change_the_digest(apart: Family, tmp_path: Path) -> None:
    merge = trained(apart)
    for threads in (1, 3):
        merge.run(tmp_path / f"out{threads}", threads=threads)
    first, second = (load_file(tmp_path / f"out{threads}" / "model.safetensors") for threads in (1, 3))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    others = [replace(merge, refine=None), *(trained(apart, **{key: 3}) for key in ("epochs", "rank"))]
    assert len({each.digest for each in (merge, *others, trained(apart, rate=0.02))}) == 5


def test_what_does_not_help_is_left_out(apart: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge, values = trained(apart), iter([0.1, math.inf])
    monkeypatch.setattr(refine.Student, "divergence", lambda *_: next(values))
    written = merge.run(tmp_path / "trained")
    assert "training after the fit is left out, since it did not help: divergence 0.1000, then inf" in written.fit
    assert Verdict.from_json(json.loads((tmp_path / "trained" / "lewis.json").read_text())["held_back"]).refined
    replace(merge, refine=None).run(tmp_path / "fit")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("trained", "fit"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_training_that_breaks_a_row_is_left_out(apart: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([distance(0.2, 0.5), distance(0.1, 0.5), distance(0.1, 1.5)])  # anchor, fit, trained
    monkeypatch.setattr(held_back, "_distance", lambda *_: next(values))
    monkeypatch.setattr(length, "MOST", 0)
    written = trained(apart).run(tmp_path / "out")
    verdict = Verdict.from_json(written.manifest["held_back"])
    assert verdict.refined and verdict.refined.taken == 0 and verdict.fits[0].worst == 0.5
    assert "since it did not hold on the held-back rows: divergence " in written.fit


def test_a_pass_that_brings_nothing_is_the_last(apart: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.3, 0.2, 0.1, 0.15])
    monkeypatch.setattr(refine.Student, "divergence", lambda *_: next(values))
    verdict = Verdict.from_json(trained(apart, epochs=5).run(tmp_path / "out").manifest["held_back"])
    assert verdict.refined and verdict.refined.divergence == (0.3, 0.2, 0.1, 0.15) and verdict.refined.taken == 2


def test_a_merge_without_held_back_rows_is_refused_before_it_runs(apart: Family) -> None:
    sets = {"a": {"texts": ["w1 w2", "w3 w4", "w5 w6"], "samples": 3}}
    models = [{"model": str(each), "calibration": "a"} for each in apart.experts]
    block = {"calibrations": sets, "hold_back": True, "refine": {}}
    with pytest.raises(InputError, match=r"lewis\.refine: held-back rows decide.*raise samples to 4 or more"):
        prepare(recipe_of(apart.base, [], models=models, lewis=block))
    models[1] |= {"calibration": "b", "parameters": {"weight": 0}}
    block["calibrations"] = sets | {"b": {"texts": texts(1, 9), "samples": 9}}
    with pytest.raises(InputError, match=r"no set has any .* of an expert whose weight is not 0"):
        prepare(recipe_of(apart.base, [], models=models, lewis=block))


def test_training_is_not_taken_that_is_worse_than_the_anchor(
    apart: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that breaks a row, as the anchor does, gave way to any training."""
    values = iter([distance(0.2, 2.0), distance(0.1, 1.5), distance(0.1, 1.5), distance(0.3, 1.2)])
    monkeypatch.setattr(held_back, "_distance", lambda *_: next(values))
    monkeypatch.setattr(length, "MOST", 0)
    verdict = Verdict.from_json(trained(apart, tmp_path).run(tmp_path / "out").manifest["held_back"])
    assert verdict.refined and verdict.refined.taken == 0 and verdict.taken == 0


@pytest.mark.parametrize(("weights", "counts"), [((3.0, 1.0), {1.5, 0.5}), ((1.0, 0.0), {2.0}), ((0.0, 0.0), set())])
def test_rows_count_as_their_expert_does(
    weights: tuple[float, float],
    counts: set[float],
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An expert of weight 0, which a fit ignores, was learned from; later, all of weight 0 were a division by zero."""
    monkeypatch.setattr(held_back, "_distance", lambda *_: distance(0.1, 0.2))
    monkeypatch.setattr(length, "MOST", 0)
    seen, learn, merge = list[refine.Row](), refine.Student.learn, trained(family, epochs=1)

    def noted(student: refine.Student, rows: Sequence[refine.Row]) -> None:
        seen.extend(rows)
        learn(student, rows)

    monkeypatch.setattr(refine.Student, "learn", noted)
    chosen, value = dict(zip([each.ref for each in merge.experts], weights, strict=True)), merge.settings.value

    def with_weights(parameter: Parameter, ref: str, *where: Any) -> Any:
        return chosen[ref] if parameter.name == "weight" else value(parameter, ref, *where)

    replace(merge, settings=replace(merge.settings, value=with_weights)).run(tmp_path / "out")
    assert {row.weight for row in seen} == counts
    known = [rows.samples for each in merge.experts[: len(counts)] if (rows := each.calibration)]
    assert {tuple(row.ids.tolist()) for row in seen} == {row for rows in known for row in rows}


def test_it_computes_on_the_gpu_that_the_step_was_given(apart: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lewis.devices.devices", lambda: ["cuda:0", "cuda:1"])
    merge = trained(apart)
    assert replace(merge, gpu="cuda:1").pass_device == "cuda:1"
    assert replace(merge, gpu="cuda:1").digest == merge.digest


def test_a_forecast_counts_it(apart: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = trained(apart)
    network = network_of(merge.base)
    short, long = (forecast._of_refining(trained(apart, epochs=n), network, 0.0).seconds for n in (1, 9))
    assert 0 < 2 * short < long
    monkeypatch.setattr(forecast, "_of_refining", lambda *_: Forecast(1e6, 10**12))
    found, without = forecast.forecast(merge), forecast.forecast(replace(merge, refine=None))
    assert found.seconds > 1e6 > without.seconds and found.memory == 10**12 > without.memory


@pytest.mark.parametrize(
    "method, block, problem",
    [
        ("ties", "refine: {}", "lewis.refine: only a fit in forward order is trained further; use regmean_forward"),
        ("regmean_forward", "refine: {}, hold_back: false", "lewis.refine: held-back rows decide when it ends"),
        ("regmean", "refine: {}, hold_back: true", "lewis.refine: only a fit in forward order is trained further"),
        ("ties", "hold_back: true", "lewis.hold_back: it judges a fit, and this method fits nothing; leave it out"),
        ("regmean_forward", "refine: {rank: 0}", "lewis.refine.rank"),
        ("regmean_forward", "refine: {steps: 3}", "lewis.refine.steps"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(method: str, block: str, problem: str, tmp_path: Path) -> None:
    recipe = {"merge_method": method, "base_model": "org/base", "models": [{"model": "org/a"}]}
    recipe["lewis"] = {"calibrations": {"c": {"texts": ["a b"]}}, **yaml.safe_load(f"{{{block}}}")}
    with pytest.raises(RecipeError, match=problem.replace(".", r"\.")):
        Recipe.parse(yaml.safe_dump(recipe), root=tmp_path)


@pytest.mark.long
def test_a_router_that_chooses_among_its_outputs_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4's gives a pair: it ended in a TypeError."""
    monkeypatch.setattr(held_back, "_distance", lambda *_: distance(0.1, 0.2))
    monkeypatch.setattr(length, "MOST", 0)
    merge = merge_of("llama4_text", tmp_path, 0.1, Calibration("a", SAMPLES))
    merge = replace(merge, refine=Refine(epochs=2, rank=2, rate=0.001))
    assert "trained for " in merge.run(tmp_path / "trained").fit
    replace(merge, refine=None).run(tmp_path / "fit")
    first, second = (Checkpoint(tmp_path / name, name) for name in ("trained", "fit"))
    changed = {name for name in merge.layout if not torch.equal(first.read(name), second.read(name))}
    assert any("q_proj" in name for name in changed) and not any("router" in name for name in changed)


@pytest.mark.parametrize("only", ["self_attn", "norm"])
def test_a_merge_that_cannot_be_trained_is_left_as_the_fit(
    only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a fit to stacked experts alone torch raised a ValueError; if no held-back row counts, it divided by 0."""
    monkeypatch.setattr(held_back, "_distance", lambda *_: distance(0.1, 0.2))
    monkeypatch.setattr(length, "MOST", 0)
    merge, _ = mixture(tmp_path, True, "regmean_forward")
    (first, second), value = merge.experts, merge.settings.value

    def only_of_norms(parameter: Parameter, ref: str, name: str, depth: float) -> Any:
        of_first = parameter.name == "weight" and ref == first.ref and only == "norm"
        return float(only in name) if of_first else value(parameter, ref, name, depth)

    settings = replace(merge.settings, value=only_of_norms)
    experts = (replace(first, held_back=first.calibration), second)
    excluded = frozenset(name for name in merge.layout if only == "self_attn" and only in name)
    merge = replace(merge, settings=settings, experts=experts, excluded=excluded, refine=Refine(epochs=1, rank=2))
    assert merge.run(tmp_path / "out").manifest["held_back"]["refined"] is None
    assert "lewis.refine: nothing is trained: expected a fitted projection" in caplog.text

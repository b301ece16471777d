"""Rows that are held back to judge a fit: which they are, and what is concluded from them."""

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from lewis.errors import InputError
from lewis.importance.calibration import Calibration
from lewis.importance.measure import network_of
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.merging.calibration_rows import RIDGES, hold_back
from lewis.merging.fitting import fit, head, held_back, length, ridge
from lewis.merging.fitting.held_back import Distance, Verdict
from lewis.merging.fitting.losses import Likely, RowLoss
from lewis.merging.run import Merge, text_of_fit
from lewis.models.network.module_tree import Network
from tests.conftest import Family
from tests.lewis.merging.fitting.test_fit import prepare, recipe_of, texts
from tests.support.distances import distance
from tests.support.models import edit_json, rewrite, write_expert, write_llama, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]


def test_every_fourth_row_is_held_back_but_not_many_and_none_of_a_few() -> None:
    rows = tuple((i, i) for i in range(90))
    fitted_to, held = hold_back(Calibration("a", rows, ((1.0, 1.0),) * 90))
    assert held is not None and held.samples == rows[3:64:4] and held.weights == ((1.0, 1.0),) * 16
    assert sorted(fitted_to.samples + held.samples) == list(rows)
    assert hold_back(Calibration("a", rows[:3])) == (Calibration("a", rows[:3]), None)
    short = Calibration("a", ((1, 2), (1, 4), (1, 5), (3,)))  # a row of one token predicts nothing
    assert hold_back(short) == (short, None)
    # Where prompts fill the held-back rows, they say nothing of answers; it ended in a division by zero.
    cut = Calibration("a", rows, tuple((0.1, 0.1) if i % 4 == 3 else (0.1, 1.0) for i in range(len(rows))))
    assert hold_back(cut) == (cut, None)
    # Where prompts weigh nothing and only held-back rows have answers, nothing is left to fit to.
    only = Calibration("a", rows, tuple((0.0, 0.0) if i % 4 < 3 or i > 63 else (1.0, 1.0) for i in range(len(rows))))
    assert hold_back(only) == (only, None)


def test_a_model_that_no_row_can_judge_is_fitted_to_all(tmp_path: Path) -> None:
    """A quarter of the rows was held back for nothing."""
    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    experts = [write_expert(tmp_path / "base", tmp_path / name, seed=1) for name in ("a", "bb")]
    family = Family(tmp_path / "base", *experts, lora=tmp_path)
    for own in held(family).experts:
        assert own.held_back is None and own.calibration is not None and len(own.calibration.samples) == 9
    with pytest.raises(InputError, match=r"lewis\.refine: .*base does not predict the next token; leave it out"):
        held(family, refine={})


def test_a_fit_is_not_judged_by_a_row_that_it_has_seen() -> None:
    fitted_to, held = hold_back(Calibration("a", ((1, 2), (3, 4), (5, 6), (7, 8), (7, 8), (1, 2))))
    assert held and held.samples == ((7, 8), (7, 8)) and fitted_to.samples == ((1, 2), (3, 4), (5, 6), (1, 2))
    same = Calibration("a", ((1, 2),) * 8)
    assert hold_back(same) == (same, None)


def test_experts_whose_rows_do_not_judge_are_named(family: Family, caplog: Any) -> None:
    sets = {"a": {"texts": texts(1, 3)}, "b": {"texts": texts(2, 16)}}
    models = [{"model": str(path), "calibration": name} for path, name in zip(family.experts, sets, strict=True)]
    block = {"calibrations": sets, "hold_back": True}
    merge = prepare(recipe_of(family.base, [], models=models, lewis=block, parameters={"bound": 0}))
    found = held_back.tightened(merge)
    [said] = [each for each in caplog.messages if "judge the fit" in each]
    assert said.startswith(f"{family.math}: 0 held-back rows judge the fit to it, expected at least 4")
    assert "lewis.calibrations.a, which has 3 different rows, to 16 or more" in said
    name = next(iter(merge.layout))
    assert (merge.parameters(name)["bound"], found.parameters(name)["bound"]) == (0, held_back.TIGHT)


def test_a_set_whose_held_back_rows_have_no_answer_is_named(family: Family, tmp_path: Path, caplog: Any) -> None:
    """It was fitted to, unjudged, without a word."""
    rows = [{"text": "" if i == int(np.random.default_rng(42).permutation(4)[3]) else f"w{i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"dataset": "json", "data_files": str(tmp_path / "rows.jsonl"), "prompt": "w1 w2 ", "answer": "{text}"}
    block = {"calibrations": {"a": given}, "hold_back": True}
    merge = prepare(recipe_of(family.base, [], models=[{"model": str(family.math)}], lewis=block))
    held_back.tightened(merge)
    assert any("0 held-back rows judge the fit" in each and "4 different rows" in each for each in caplog.messages)
    assert any("1 of 4 rows have no token of an answer left" in each for each in caplog.messages)


def test_the_numbers_of_an_adapter_are_said_to_be_of_the_fit(family: Family, tmp_path: Path) -> None:
    block = {"calibrations": {"a": {"texts": texts(1, 8), "samples": 8}}, "hold_back": True}
    models = [{"model": str(each), "calibration": "a"} for each in family.experts]
    output = {"kind": "lora", "rank": 2}
    written = prepare(recipe_of(family.base, [], models=models, lewis=block, output=output, exclude=["norm"])).run(
        tmp_path / "out"
    )
    assert written.fit.endswith("These numbers are of the fit itself, before it is reduced to the rank of the adapter")


def test_rows_that_continue_too_few_prompts_do_not_judge(family: Family, caplog: Any) -> None:
    """Other rows of the same prompts judged the fit to these, without a word."""
    models = [{"model": str(family.math)}]
    block = {"calibrations": {"a": {"texts": texts(1, 3), "continue": 4}}, "hold_back": True}
    held_back.tightened(prepare(recipe_of(family.base, [], models=models, lewis=block)))
    [said] = [each for each in caplog.messages if "judge the fit" in each]
    assert "0 held-back rows" in said and "lewis.calibrations.a, which has 3 prompts, to 16 or more" in said


def held(
    family: Family, folder: Path | None = None, refine: Any = None, method: str = "regmean_forward", **parameters: Any
) -> Merge:
    """A merge that is judged by rows whose answers are known if they come from a folder."""
    sets = {f"s{path.name}": {"texts": texts(len(path.name), 9), "samples": 9} for path in family.experts}
    for name, each in sets.items() if folder else ():
        rows = [{"text": text} for text in each.pop("texts")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        each |= {"dataset": "json", "data_files": str(folder / f"{name}.jsonl"), "prompt": "w1 w2 ", "answer": "{text}"}
    block = {"calibrations": sets, "hold_back": True, "refine": refine}
    return prepare(recipe_of(family.base, family.experts, method, lewis=block, parameters={"ridge": 0.1, **parameters}))


def test_the_numbers_are_those_of_the_written_model_and_the_experts(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    experts = [write_expert(base, tmp_path / name, seed=i, scale=0.1) for i, name in enumerate(("a", "bb"))]
    merge = held(Family(base, *experts, lora=base))
    steps: list[float] = []
    written = merge.run(tmp_path / "out", threads=1, progress=lambda _, done, total: steps.append(done / total))
    parts = [
        0.5 * part / (5 + held_back.FIT + length.MOST) for part in (0, 1, 2, 3, 3 + held_back.FIT, 4 + held_back.FIT)
    ]
    assert all(any(low < step <= high for step in steps) for low, high in itertools.pairwise(parts))
    verdict = Verdict.from_json(json.loads((tmp_path / "out" / "lewis.json").read_text())["held_back"])
    assert written.fit == verdict.to_text() and verdict.rows == 4

    def losses(folder: Path, rows: Calibration) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            each = [model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows.samples]
        return torch.stack(each)

    means, rows, gains = [], [], {}
    for expert in merge.experts:
        assert expert.held_back and len(expert.held_back.samples) == 2 and len(expert.calibration.samples) == 7
        own, there = losses(expert.model.folder, expert.held_back), losses(tmp_path / "out", expert.held_back)
        counts = torch.tensor([len(row) - 1 for row in expert.held_back.samples])
        means.append(float(((there - own) * counts).sum() / counts.sum()))
        rows += (there - own).tolist()
        gains[expert.ref] = float(((losses(base, expert.held_back) - own) * counts).sum() / counts.sum())
    taken = verdict.anchor if verdict.taken is None else verdict.fits[verdict.taken]
    assert taken.mean == pytest.approx(sum(means) / 2, abs=1e-5)
    assert list(taken.experts) == [expert.ref for expert in merge.experts]
    assert list(taken.experts.values()) == pytest.approx(means, abs=1e-5)
    assert taken.worst == pytest.approx(max(rows), abs=1e-5)
    assert verdict.gains == pytest.approx(gains, abs=1e-5)
    assert all(f"{ref} {taken.experts[ref]:+.4f} ({gain:.2f})" in written.fit for ref, gain in gains.items())


def test_an_expert_that_answers_no_better_than_the_base_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_llama(tmp_path / "base")
    experts = [write_expert(base, tmp_path / name, seed=i, scale=0.1) for i, name in enumerate(("a", "bb"))]
    merge = held(Family(base, *experts, lora=base), tmp_path)
    gains = Verdict.from_json(merge.run(tmp_path / "out").manifest["held_back"]).gains
    useless = {expert.ref for expert in merge.experts if gains[expert.ref] <= 0}  # which is random: noise
    named = {ref for ref in gains if f"{ref}: on its held-back rows it is no better than the base" in caplog.text}
    assert named == useless and useless


@pytest.mark.parametrize(
    "seen, taken",
    [
        ([(0.2, 0.9), (0.1, 0.5)], 0),
        ([(0.2, 0.9), (0.1, 1.5), (0.15, 0.8)], 1),  # a row is broken
        pytest.param([(0.2, 0.9), (0.3, 0.5), (0.1, 0.5)], 1, marks=pytest.mark.long),  # worse than the anchor
        ([(0.2, 0.9), (0.3, 0.5), (0.1, 1.5)], None),
        # Broken, but the anchor is more so.
        pytest.param([(0.2, 2.0), (0.1, 1.5), (0.15, 1.4)], 0, marks=pytest.mark.long),
        pytest.param([(0.2, 0.9), (float("inf"), float("inf")), (0.1, 0.5)], 1, marks=pytest.mark.long),
    ],
)
def test_a_fit_that_does_not_hold_is_repeated_and_then_left_out(
    seen: list[tuple[float, float]],
    taken: int | None,
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    merge, distances = held(family, tmp_path, prior=0.5), [distance(*each) for each in seen]
    monkeypatch.setattr(held_back, "_distance", lambda *_: distances.pop(0))
    monkeypatch.setattr(length, "MOST", 0)
    steps: list[int] = []
    with caplog.at_level(logging.INFO):
        written = merge.run(tmp_path / "out", progress=lambda _, done, total: steps.append(done))
    assert steps == sorted(steps)
    verdict = Verdict.from_json(written.manifest["held_back"])
    assert verdict.taken == taken and len(verdict.fits) == len(seen) - 1 and not distances
    assert written.fit == text_of_fit(written.manifest) and written.fit in caplog.text
    assert ("the anchor is taken" in written.fit) == (taken is None)
    plain = tmp_path / "plain"
    if taken is None:
        expected = {name: merge.tensor(name) for name in merge.layout}
    else:
        sets = [expert.calibration for expert in merge.experts]
        values = (
            {"ridge": 0.1, "prior": 0.5, "bound": 2.0} if taken == 0 else {"ridge": 1.0, "prior": 3.0, "bound": 2.0}
        )
        again = prepare(recipe_of(family.base, family.experts, parameters=values))
        experts = tuple(replace(e, calibration=rows) for e, rows in zip(again.experts, sets, strict=True))
        replace(again, experts=experts).run(plain)
        expected = load_file(plain / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("seen, taken", [([(0.2, 0.9), (0.1, 0.5)], 0), ([(0.2, 0.9), (0.3, 0.5), (0.1, 1.5)], None)])
def test_a_fit_to_statistics_is_judged_if_the_recipe_asks_for_it(
    seen: list[tuple[float, float]], taken: int | None, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, distances = held(family, tmp_path, method="regmean"), [distance(*each) for each in seen]
    monkeypatch.setattr(held_back, "_distance", lambda *_: distances.pop(0))
    monkeypatch.setattr(length, "MOST", 0)
    written = merge.run(tmp_path / "out")
    assert Verdict.from_json(written.manifest["held_back"]).taken == taken and not distances
    plain = prepare(recipe_of(family.base, family.experts, "regmean", parameters={"ridge": 0.1, "bound": 2.0}))
    experts = [replace(e, calibration=own.calibration) for e, own in zip(plain.experts, merge.experts, strict=True)]
    assert all(own.held_back and not each.held_back for own, each in zip(merge.experts, plain.experts, strict=True))
    replace(plain, experts=tuple(experts)).run(tmp_path / "plain")
    found, fitted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    expected = fitted if taken == 0 else {name: merge.tensor(name) for name in merge.layout}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_whole_texts_are_judged_by_the_divergence_from_the_experts(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of the task vectors of the demo predicts prompts better than its experts, and answers far worse."""
    distances = [distance(0.1, 0.7, divergence=0.3), distance(0.2, 0.3, divergence=0.1)]
    monkeypatch.setattr(held_back, "_distance", lambda *_: distances.pop(0))
    monkeypatch.setattr(length, "MOST", 0)
    written = held(family).run(tmp_path / "out")
    assert written.manifest["held_back"]["taken"] == 0 and "nats per token" in written.fit


def test_moves_are_made_longer_for_as_long_as_the_experts_come_closer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_llama(tmp_path / "base")
    experts = [write_expert(base, tmp_path / name, seed=i, scale=0.1) for i, name in enumerate(("a", "bb"))]
    merge, seen = held(Family(base, *experts, lora=base)), iter([0.9, 0.3, 0.2, 0.1, 0.15])  # the anchor's, the fit's
    with monkeypatch.context() as patch:
        patch.setattr(held_back, "mean_divergence", lambda _: next(seen))
        written = merge.run(tmp_path / "out")
    verdict = Verdict.from_json(written.manifest["held_back"])
    assert verdict.length == length.Length((0.3, 0.2, 0.1, 0.15), 2)
    assert "the moves of the fit are 1.04 times as long: divergence from the experts 0.3, then 0.1" in written.fit
    monkeypatch.setattr(length, "MOST", 0)
    short = merge.run(tmp_path / "short").manifest["held_back"]
    assert verdict.fits[0] != Distance.from_json(short["fits"][0])
    folders = base, tmp_path / "short", tmp_path / "out"
    begin, shorter, longer = (load_file(folder / "model.safetensors") for folder in folders)
    for name, value in begin.items():
        c = 1.04 if "proj" in name else 1.0
        torch.testing.assert_close(longer[name], value + c * (shorter[name] - value), atol=1e-6, rtol=1e-5)


def test_longer_moves_are_measured_before_they_are_rounded(tmp_path: Path) -> None:
    """In bf16 a move of a few steps of its grid, made 1.02 times as long, would be rounded back to what it was."""
    small = write_llama(tmp_path / "small")
    base = rewrite(small, tmp_path / "base", lambda name, each: each.to(torch.bfloat16))
    experts = [write_expert(base, tmp_path / name, seed=i, scale=0.1) for i, name in enumerate(("a", "bb"))]
    merge = held(Family(base, *experts, lora=base))
    fitted = fit.fit(merge, tmp_path / "fit")
    name = "model.layers.0.mlp.up_proj.weight"
    plain, longer = fitted.read(name), fitted.longer(merge.base, {name}, 1.02).read(name)
    assert plain.dtype == longer.dtype == torch.bfloat16
    start = merge.base.read(name).float()
    [exact] = [load_file(path)[name] for path in (tmp_path / "fit").glob("*.safetensors") if name in load_file(path)]
    assert exact.dtype == torch.float32 and torch.equal(exact.bfloat16(), plain)
    assert torch.equal(longer, (start + 1.02 * (exact - start)).bfloat16()) and not torch.equal(longer, plain)


def test_a_divergence_is_that_of_whole_distributions_and_0_from_itself() -> None:
    logits, other = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    logs, others = logits.log_softmax(-1), other.log_softmax(-1)
    expected = (logs.exp() * (logs - others)).sum(-1)
    torch.testing.assert_close(Likely.of(logits).divergence(other), expected, atol=1e-5, rtol=1e-4)
    assert float(Likely.of(logits).divergence(logits).abs().max()) < 1e-6


def test_moves_between_adapters_stay_as_long_as_they_are(family: Family) -> None:
    full = held(family)
    assert full.may_lengthen
    adapters = [{"model": f"{family.lora}", "calibration": "a"}]
    block = {"calibrations": {"a": {"texts": texts(1, 9)}}, "hold_back": True}
    assert not prepare(recipe_of(family.base, [], models=adapters, lewis=block)).may_lengthen


def test_an_expert_of_weight_0_judges_nothing(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The merge is not to do what it does: its rows were broken, and the fit to the others was left out."""
    merge, judging = held(family), []
    by_weight = merge.with_parameters(lambda parameter, value: 0.0 if parameter.name == "weight" else value)
    assert by_weight.judging == merge.judging == merge.experts  # nothing is fitted to either
    models = [{"model": str(family.math), "calibration": "a"}, {"model": str(family.code), "calibration": "b"}]
    models[1]["parameters"] = {"weight": 0}
    block = {"calibrations": {"a": {"texts": texts(1, 8)}, "b": {"texts": texts(2, 3)}}, "hold_back": True}
    merge = prepare(recipe_of(family.base, [], models=models, lewis=block, parameters={"ridge": "auto"}))
    found = ridge.row_losses
    monkeypatch.setattr(ridge, "row_losses", lambda model, sets, *each: judging.append(sets) or found(model, sets))
    verdict = Verdict.from_json(merge.run(tmp_path / "out").manifest["held_back"])
    assert list(verdict.anchor.experts) == list(verdict.gains) == [str(family.math)] and verdict.rows == 2
    assert [len(sets) for sets in judging] == [1] * len(RIDGES)
    assert f"{family.code}: 0 held-back rows judge the fit" not in caplog.text


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_loss_that_is_no_number_is_the_worst(broken: int) -> None:
    """The largest of 0.1 and NaN is 0.1 for Python: a fit that overflows on one row held."""
    rows = [RowLoss(float("nan") if i == broken else 1.0, 10) for i in range(3)]
    found = held_back._distance({"a": rows}, {"a": [RowLoss(1.0, 10)] * 3})
    assert found.worst == found.mean == float("inf")


def test_the_interval_of_the_distance_holds_the_truth() -> None:
    """Two experts, 8 rows of 5 to 40 tokens each, which lose 0.01 and 0.03 nats per token in the mean."""
    draw, inside = np.random.default_rng(0), 0
    for _ in range(400):
        rows = {ref: draw.integers(5, 40, 8) for ref in ("a", "b")}
        experts = {ref: [RowLoss(1.0 * n, n) for n in counts] for ref, counts in rows.items()}
        lost = {ref: draw.normal(mean, 0.2 / np.sqrt(rows[ref])) for ref, mean in (("a", 0.01), ("b", 0.03))}
        merged = {ref: [RowLoss((1 + d) * n, n) for d, n in zip(lost[ref], rows[ref], strict=True)] for ref in rows}
        found = held_back._distance(merged, experts)
        inside += abs(found.mean - 0.02) <= found.margin
    assert 0.91 < inside / 400 < 0.99
    assert held_back._distance({"a": [RowLoss(2.0, 1)]}, {"a": [RowLoss(1.0, 1)]}).margin == float("inf")


def test_a_fit_that_short_rows_broke_is_refused_by_the_few_rows_that_show_it() -> None:
    """SQL and numbers in words, 32 plain texts each, no bound: unseen rows lose 0.79, eight of each lose 0.02."""
    of_sql = [0.23, 0.06, 0.05, 0.03, 0.02, 0.01, 0.01, 0.0]
    experts = {"sql": [RowLoss(50.0, 50)] * 8, "words": [RowLoss(20.0, 20)] * 8}
    merged = {"sql": [RowLoss((1 + d) * 50, 50) for d in of_sql], "words": [RowLoss(19.9, 20)] * 8}
    found = held_back._distance(merged, experts)
    assert found.mean == pytest.approx(0.0231, abs=1e-3) and found.worst == pytest.approx(0.23)
    assert found.strain > held_back.STRAIN


def test_a_verdict_is_json_that_every_program_reads() -> None:
    nothing = Distance(float("inf"), float("inf"), {"a": float("inf"), "b": 0.1})
    some = Distance(0.1, 0.2, {"a": 0.1, "b": 0.1}, margin=0.05, strain=0.4)
    verdict = Verdict(3, nothing, (nothing, some), 1, gains={"b": 0.2})
    assert "+0.1000 ±0.0500, the worst row +0.20; without the fit +inf, the worst row +inf" in verdict.to_text()
    verdict = replace(verdict, length=length.Length((0.2, 0.1, float("inf")), 1))
    data = replace(verdict, gains={"a": float("nan"), "b": 0.2}).to_json()
    assert Verdict.from_json(json.loads(json.dumps(data, allow_nan=False))) == verdict


def test_answers_alone_are_judged() -> None:
    """Not the last token of a prompt, which an expert that was trained on answers alone need not predict."""
    rows = Calibration("a", ((1, 2, 3, 4), (4, 5)), ((0.1, 1.0, 1.0, 1.0), (1.0, 1.0)))
    assert rows.of_answers == Calibration("a", rows.samples, ((0.0, 0.0, 1.0, 1.0), (0.0, 1.0)))
    assert rows.part([0]).of_answers.factors == [[0.0, 0.0, 2.0, 2.0]]
    plain = Calibration("a", rows.samples)
    assert plain.of_answers is plain


def test_nothing_is_judged_where_nothing_can_be(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "held_back" not in prepare(recipe_of(family.base, family.experts)).run(tmp_path / "off").manifest
    assert held(family).digest != prepare(recipe_of(family.base, family.experts, parameters={"ridge": 0.1})).digest
    monkeypatch.setattr(Network, "looks_ahead", True)
    assert not any(expert.held_back for expert in held(family).experts)


@pytest.mark.long
def test_no_model_that_judged_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kept its embedding and its head, in fp32: 17 GB for two adapters on a vocabulary of 128,256."""
    monkeypatch.setattr(head, "PART", 1 << 20)  # so that the fit of the head takes a small part of it at a time
    small, padded = (
        write_llama(tmp_path / "small", tied=False, hidden=128),
        ("model.embed_tokens.weight", "lm_head.weight"),
    )
    base = rewrite(
        small,
        tmp_path / "base",
        lambda name, each: (each.repeat(1600, 1)[:100_000] if name in padded else each).to(torch.bfloat16),
    )
    edit_json(base / "config.json", vocab_size=100_000)
    weight = 4 * 128 * 100_000  # bytes of one of them in fp32
    merge = held(Family(base, *(write_expert(base, tmp_path / name, seed=1) for name in ("a", "bb")), lora=base))
    network_of(merge.base)  # loads transformers
    before = anonymous_bytes()
    with PeakMemory() as memory:
        assert merge.run(tmp_path / "out").fit
    assert memory.peak - before < 8 * weight  # usually 3.5; each of four models would keep two more

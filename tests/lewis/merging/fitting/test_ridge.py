"""`ridge: auto`: what is held out, what is chosen by it, and that nothing else depends on it."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lewis.errors import InputError, LewisError
from lewis.importance.calibration import Calibration
from lewis.merging import prepared
from lewis.merging.calibration_rows import RIDGES, check_split, split
from lewis.merging.fitting import fit as forward_order
from lewis.merging.fitting import ridge
from lewis.merging.fitting.fitted import Unwritten
from lewis.merging.fitting.losses import mean_loss, row_losses
from lewis.merging.fitting.ridge import Choice, choose, with_ridge
from lewis.merging.run import Merge
from lewis.models.network.module_tree import Network
from tests.conftest import Family
from tests.lewis.merging.fitting.test_fit import prepare, recipe_of
from tests.support.models import write_expert, write_llama

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_fourth_row_is_held_out() -> None:
    rows = tuple((i, i) for i in range(9))
    fitted_to, held = split(Calibration("a", rows))
    assert held.samples == (rows[3], rows[7]) and len(fitted_to.samples) == 7
    assert [part.samples for part in split(Calibration("a", rows[:2]))] == [rows[:1], rows[1:2]]


def test_what_was_chosen_by_other_rows_has_another_key(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one prompt, and equal ones, were on both sides; a merge whose ridge was chosen so must not be found."""
    merge = prepare(recipe_of(family.base, family.experts, "regmean", parameters={"ridge": "auto"}))
    rows = [each.calibration for each in merge.experts if each.calibration]

    def fitted_to(found: list[Calibration]) -> Merge:
        pairs = zip(merge.experts, found, strict=True)
        return replace(merge, experts=tuple(replace(expert, calibration=each) for expert, each in pairs))

    written = fitted_to([replace(each, prompts=(0, 1, 2, 3, 3, 3)) for each in rows])
    assert written.digest != merge.digest
    assert with_ridge(written, 0.1).digest == with_ridge(merge, 0.1).digest
    twice = [replace(each, samples=(*each.samples[:5], each.samples[0])) for each in rows]
    before = [fitted_to(twice).digest, with_ridge(fitted_to(twice), 0.1).digest, fitted_to(rows).digest]
    monkeypatch.setattr(prepared, "by_prompt", lambda rows: [[row] for row in range(len(rows.samples))])
    now = [fitted_to(twice).digest, with_ridge(fitted_to(twice), 0.1).digest, fitted_to(rows).digest]
    assert [one == other for one, other in zip(before, now, strict=True)] == [False, True, True]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_loss_is_that_of_the_written_model(tied: bool, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=tied)
    experts = [write_expert(base, tmp_path / name, seed=i, scale=0.1) for i, name in enumerate(("a", "bb"))]
    merge = prepare(recipe_of(base, experts))
    merge.run(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    sets, means = [expert.calibration for expert in merge.experts if expert.calibration], []
    for each in sets:
        with torch.no_grad():
            logits = [model(torch.tensor([sample])).logits[0, :-1] for sample in each.samples]
        wanted = torch.cat([torch.tensor(sample[1:]) for sample in each.samples])
        means.append(float(torch.nn.functional.cross_entropy(torch.cat(logits), wanted)))
    fitted = forward_order.fit(merge, tmp_path / "fitted")
    found = [mean_loss(row_losses(Unwritten(merge, fitted), sets, threads)) for threads in (1, 3)]
    assert found[0] == pytest.approx(sum(means) / len(means), rel=1e-5) and found[0] == found[1]


@pytest.mark.parametrize("method", [pytest.param("regmean", marks=pytest.mark.long), "regmean_forward"])
@pytest.mark.long
def test_gives_the_bytes_of_the_number_that_it_chose_for_any_number_of_threads(
    method: str, family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge = prepare(recipe_of(family.base, family.experts, method, parameters={"ridge": "auto"}))
    steps: list[int] = []
    with caplog.at_level(logging.INFO):
        written = merge.run(tmp_path / "one", threads=1, progress=lambda name, done, total: steps.append(done))
    merge.run(tmp_path / "two", threads=3)
    told = [json.loads((tmp_path / name / "lewis.json").read_text())["ridge"] for name in ("one", "two")]
    assert told[0] == told[1] and [row[0] for row in told[0]["losses"]] == list(RIDGES)
    assert told[0]["ridge"] == min(told[0]["losses"], key=lambda row: row[1])[0]
    assert written.fit.startswith("ridge: auto chose") and written.fit in caplog.text
    number = prepare(recipe_of(family.base, family.experts, method, parameters={"ridge": told[0]["ridge"]}))
    assert number.digest != merge.digest and not number.run(tmp_path / "number").fit
    expected = weights(tmp_path / "number")
    for name in ("one", "two"):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / name).items())
    assert steps == sorted(steps) and steps[-1] == merge.steps == merge.elements * (2 + len(RIDGES))


class TestChoice:
    """With a fit that does nothing, and losses from a table."""

    LOSSES = (2.0, 1.5, 1.5, 3.0)  # in the order of RIDGES

    @pytest.fixture
    def tried(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        found: list[float] = []

        def loss(merge: Any, *_: Any) -> float:
            number = merge.parameters("model.layers.0.mlp.up_proj.weight")["ridge"]
            found.append(number)
            return self.LOSSES[RIDGES.index(number)]

        monkeypatch.setattr(ridge, "Unwritten", lambda merge, fitted: merge)
        monkeypatch.setattr(ridge, "row_losses", loss)
        monkeypatch.setattr(ridge, "mean_loss", lambda found: found)
        return found

    def chosen(self, family: Family, folder: Path, **fit: Any) -> Choice:
        merge = prepare(recipe_of(family.base, family.experts, parameters={"ridge": "auto"}))
        return choose(merge, folder, fit.get("fit", lambda *given: None))

    def test_of_equal_ridges_the_largest(self, tried: list[float], family: Family, tmp_path: Path) -> None:
        assert self.chosen(family, tmp_path) == Choice(0.1, dict(zip(RIDGES, self.LOSSES, strict=True)))
        assert tried == list(RIDGES)

    def test_goes_on_after_a_kill(self, tried: list[float], family: Family, tmp_path: Path) -> None:
        def fit(merge: Any, folder: Path, *_: Any) -> Any:
            folder.mkdir()
            if len(tried) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.chosen(family, tmp_path, fit=fit)
        assert tried == list(RIDGES[:2])
        assert [path.name for path in tmp_path.glob("ridge-*")] == ["ridge-0.01"]  # what it had fitted is found again
        assert self.chosen(family, tmp_path).ridge == 0.1
        assert tried == list(RIDGES) and not list(tmp_path.glob("ridge-*"))

    def test_fits_to_the_rows_that_are_not_held_out(self, tried: list[float], family: Family, tmp_path: Path) -> None:
        seen = []
        self.chosen(family, tmp_path, fit=lambda merge, *_: seen.append([e.calibration for e in merge.experts]))
        sets = [e.calibration for e in prepare(recipe_of(family.base, family.experts)).experts if e.calibration]
        assert seen == [[split(each)[0] for each in sets]] * len(RIDGES)

    def test_no_finite_loss_is_an_error(self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ridge, "Unwritten", lambda *_: None)
        monkeypatch.setattr(ridge, "row_losses", lambda *_: [])
        monkeypatch.setattr(ridge, "mean_loss", lambda *_: float("nan"))
        with pytest.raises(LewisError, match="auto found no finite loss"):
            self.chosen(family, tmp_path)


def test_a_choice_is_told_and_read_again() -> None:
    found = Choice(0.1, {1.0: float("inf"), 0.1: 1.25})
    assert Choice.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.to_text().endswith("(nats per token): inf with 1, 1.2500 with 0.1")


def test_a_guided_anchor_scales_what_is_chosen(family: Family) -> None:
    from tests.lewis.merging.fitting.test_anchor import guided
    from tests.lewis.merging.fitting.test_anchor import prepare as prepare_guided

    name = "model.layers.0.mlp.up_proj.weight"
    merge = prepare_guided(guided(family.base, family.experts, parameters={"ridge": "auto"}))
    number = prepare_guided(guided(family.base, family.experts, parameters={"ridge": 0.1}))
    assert merge.parameters(name)["ridge"] == "auto"
    assert with_ridge(merge, 0.1).parameters(name) == number.parameters(name)


def test_a_set_of_one_row_is_refused_before_any_work(family: Family) -> None:
    sets = {"s": {"texts": ["w1 w2"], "samples": 1}}
    models = [{"model": str(path)} for path in family.experts]
    recipe = recipe_of(
        family.base, family.experts, models=models, parameters={"ridge": "auto"}, lewis={"calibrations": sets}
    )
    with pytest.raises(InputError, match=r"parameters\.ridge: auto holds out every fourth row .* has 1 rows"):
        prepare(recipe)


@pytest.mark.parametrize("weights", [((1.0, 1.0), (0.1, 0.1)), ((0.0, 0.0), (1.0, 1.0))])
def test_rows_without_an_answer_to_judge_by_or_to_fit_to_are_refused(weights: Any) -> None:
    """It ended in a division by zero, in the middle of the merge."""
    with pytest.raises(InputError, match=r"has 2 rows: expected rows to fit to, and answers to predict in those"):
        check_split("a", Calibration("s", ((1, 2), (1, 2)), weights))


def test_a_model_that_does_not_predict_the_next_token_is_refused_before_it_is_fitted(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "looks_ahead", True)
    merge = prepare(recipe_of(family.base, family.experts, parameters={"ridge": "auto"}))
    with pytest.raises(InputError, match=r"parameters\.ridge: auto goes by the loss of the next token"):
        choose(merge, tmp_path / "fitted", lambda *given: pytest.fail("it was fitted"))

"""The fit to statistics that the importance step has left: by hand, of a mixture, after a kill, and what it tells."""

import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lewis import store
from lewis.errors import InputError
from lewis.importance import grams as measuring
from lewis.importance import step
from lewis.importance.calibration import Calibration
from lewis.merging.fitting import static_fit
from lewis.merging.run import Merge
from lewis.merging.settings import Expert, resolve
from lewis.methods.arithmetic.regression import Inputs
from lewis.methods.arithmetic.tokens import Gram, Rows
from lewis.models.checkpoint import Checkpoint
from tests.conftest import Family
from tests.lewis.merging.fitting.test_fit import KILLED, RIDGE, prepare, recipe_of, run
from tests.lewis.models.test_module_tree import MOES, SAMPLES, expert_inputs, write
from tests.support import pipeline
from tests.support.models import write_tensors
from tests.support.warm import WarmPython

pytestmark = pytest.mark.usefixtures("home")


def test_a_2_by_3_layer_by_hand() -> None:
    """The means of x x^T in place of the rows, c = 1 and 3, r = 0.

    Expert 1 sees (1, 0, 0) and (0, 1, 0), expert 2 (0, 1, 0) and (0, 0, 2). So S = diag(1/2, 1/2 + 3/2, 6), and the
    columns of W are w1, (w1 + 3 w2) / 4 and w2.
    """
    first = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    second = torch.tensor([[5.0, 6.0, 7.0], [8.0, 9.0, 0.0]])
    one, two = (
        Gram(torch.diag(torch.tensor([0.5, 0.5, 0.0])), 2, 1.0),
        Gram(torch.diag(torch.tensor([0, 0.5, 2.0])), 2, 3.0),
    )
    found = Inputs([one, two], 0.0).solve(torch.zeros(2, 3), [first, second])
    assert torch.allclose(found, torch.tensor([[1.0, 5.0, 7.0], [4.0, 8.0, 0.0]]), atol=1e-5)


def test_products_rows_and_nothing_may_be_mixed() -> None:
    noise = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 6, generator=noise) for n in (40, 2))
    anchor, *weights = (torch.randn(4, 6, generator=noise) for _ in range(4))
    rows, nothing = Rows([y], [y], 2.0), Rows([y[:0]], [y[:0]])
    found = Inputs([Gram(x.T @ x / 40, 40), rows, nothing], 0.1).solve(anchor, weights)
    expected = Inputs([Rows([x], [x]), rows], 0.1).solve(anchor, weights[:2])
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_singular_matrix_without_ridge_is_finite() -> None:
    x = torch.ones(8, 1)
    found = Inputs([Gram(x @ x.T, 100)], 0.0).solve(torch.zeros(2, 8), [torch.ones(2, 8)])
    assert bool(found.isfinite().all()) and torch.allclose(found.sum(dim=1), torch.full((2,), 8.0), rtol=1e-3)


@pytest.mark.slow
def test_one_moved_expert_alone_is_measured_again(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, measure = [], measuring.measure_grams
    monkeypatch.setattr(
        measuring, "measure_grams", lambda model, *a, **k: passes.append(model.key) or measure(model, *a, **k)
    )
    run(recipe_of(family.base, family.experts, "regmean"), tmp_path / "one")
    assert len(passes) == len(set(passes)) == 2
    run(recipe_of(family.base, family.experts, "regmean", parameters={"ridge": 1.0}), tmp_path / "two")
    assert len(passes) == 2
    moved = recipe_of(family.base, [family.math, family.lora], "regmean")
    run(moved, tmp_path / "three")
    assert len(passes) == 3


@pytest.mark.slow
def test_what_the_importance_step_has_left_is_found(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(family.base, family.experts, "regmean")
    base, experts = pipeline.fetch(recipe)
    assert base is not None
    measured, allocated = pipeline.guide(recipe, base, experts)
    assert allocated is None and len(measured) == 2 and all(each.norms and each.statistics for each in measured)
    monkeypatch.setattr(measuring, "measure_grams", None)
    assert run(recipe, tmp_path / "out")


@pytest.mark.slow
def test_same_bytes_and_digest_for_any_order_threads_and_shards(family: Family, tmp_path: Path) -> None:
    recipe = recipe_of(family.base, [*family.experts, family.lora], "regmean")
    first = run(recipe, tmp_path / "one", threads=1)
    for entry in (store.home() / "grams").iterdir():
        store.discard(entry)
    other = recipe_of(family.base, [family.lora, *reversed(family.experts)], "regmean")
    again = run(other, tmp_path / "two", threads=3, max_shard_size=6000)
    assert prepare(recipe).digest == prepare(other).digest
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
def test_layers_side_by_side_or_by_all_threads_have_the_same_bytes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(family.base, family.experts, "regmean")
    first = run(recipe, tmp_path / "one", threads=2)
    monkeypatch.setattr(static_fit, "_ROOM", 0)
    again = run(recipe, tmp_path / "two", threads=2)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_one_expert_comes_out_as_it_is(family: Family, tmp_path: Path) -> None:
    found = run(recipe_of(family.base, [family.math], "regmean"), tmp_path / "out")
    expert = load_file(family.math / "model.safetensors")
    assert all(torch.equal(tensor, expert[name]) for name, tensor in found.items())


def test_goes_on_after_a_kill_with_the_same_bytes(
    family: Family, tmp_path: Path, warm: WarmPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two blocks was fitted by the killed process, and is not fitted again."""
    recipe = recipe_of(family.base, family.experts, "regmean")
    (tmp_path / "recipe.yaml").write_text(recipe.text)
    killed = warm.exit_code(KILLED, tmp_path / "recipe.yaml", tmp_path / "out" / "model", 0.25)
    assert killed == -signal.SIGKILL
    solve, solved = Inputs.solve, []
    monkeypatch.setattr(Inputs, "solve", lambda *given, **named: solved.append(1) or solve(*given, **named))
    found = run(recipe, tmp_path / "out" / "model")
    assert len(solved) == 7
    expected = run(recipe, tmp_path / "undisturbed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def mixture(folder: Path, stacked: bool, method: str = "regmean") -> tuple[Merge, list[Any]]:
    """Two experts of a tiny mixture that moved away from their base; and they as transformers loads them."""
    name, sizes, *_ = MOES["qwen3-moe"]
    loaded = []
    for seed in range(3):
        model = write(folder / f"model{seed}", name, sizes)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * seed * torch.randn(parameter.shape, generator=noise))
        model.save_pretrained(folder / f"model{seed}")
        if stacked:
            content = load_file(folder / f"model{seed}" / "model.safetensors")
            tensors = {n: t for n, t in content.items() if ".experts." not in n}
            tensors |= {n: p.detach().clone() for n, p in model.state_dict().items() if ".experts." in n}
            shutil.copy(folder / f"model{seed}" / "config.json", folder / "config.json")
            write_tensors(folder / f"model{seed}", tensors)
            shutil.copy(folder / "config.json", folder / f"model{seed}" / "config.json")
        loaded.append(model)
    folders = [folder / f"model{seed}" for seed in range(3)]
    opened = [Checkpoint(each, each.name) for each in folders]
    models = [{"model": str(each)} for each in folders[1:]]
    block = {"calibrations": {"a": {"texts": ["x"], "samples": 1}}}
    parameters = {"ridge": RIDGE, "prior": 0}
    settings = resolve(recipe_of(folders[0], folders[1:], method, lewis=block, models=models, parameters=parameters))
    sets = [Calibration("a", SAMPLES), Calibration("b", SAMPLES[::-1])]
    experts = [
        Expert(str(each), model, calibration=own)
        for each, model, own in zip(folders[1:], opened[1:], sets, strict=True)
    ]
    return Merge.of(settings, opened[0], experts), loaded


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_every_expert_of_a_mixture_is_fitted(stacked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The definition, for each expert by the tokens that its router sent there; nothing reached: the sum."""
    merge, (_, *models) = mixture(tmp_path, stacked)
    anchor = {name: merge.tensor(name) for name in merge.layout}
    merge.run(tmp_path / "out")
    found, fitted, left = Checkpoint(tmp_path / "out", "out"), 0, 0
    seen = [expert_inputs(model.double()) for model in models]
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        for expert in range(4):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                name, rows = f"{module}.{expert}.{leaf}.weight", slice(None)
                if stacked:
                    name = f"{module}.down_proj" if leaf == "down_proj" else f"{module}.gate_up_proj"
                    rows = {"gate_proj": slice(12), "up_proj": slice(12, 24)}.get(leaf, rows)
                value, start = (
                    (tensor[expert][rows] if stacked else tensor).double()
                    for tensor in (found.read(name), anchor[name])
                )
                left_side, right_side = torch.zeros(start.shape[1], start.shape[1]).double(), torch.zeros_like(start)
                for each, inputs in zip(merge.experts, seen, strict=True):
                    if expert not in inputs[module]:
                        continue
                    x = inputs[module][expert][leaf == "down_proj"]
                    weight = each.model.read(name).double()
                    weight = weight[expert][rows] if stacked else weight
                    left_side += x.T @ x / len(x)
                    right_side += (weight - start) @ x.T @ x / len(x)
                if not left_side.any():
                    left += 1
                    assert torch.equal(value, start)
                    continue
                fitted += 1
                left_side += RIDGE * left_side.diagonal().mean() * torch.eye(len(left_side)).double()
                expected = start + right_side @ torch.linalg.inv(left_side)
                torch.testing.assert_close(value, expected, rtol=5e-3, atol=2e-3)
    assert fitted > 12
    assert "projections saw fewer tokens of its calibration set than they have inputs, such as" in caplog.text
    if left:
        assert "no token of its calibration set reached" in caplog.text


def test_an_expert_that_saw_no_token_is_the_sum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    merge, _ = mixture(tmp_path, stacked=True)
    one = Calibration("one", ((5,),))  # two experts a token
    for expert in merge.experts:
        object.__setattr__(expert, "calibration", one)
    anchor = {name: merge.tensor(name) for name in merge.layout}
    merge.run(tmp_path / "out")
    found = Checkpoint(tmp_path / "out", "out")
    name = "model.layers.0.mlp.experts.down_proj"
    unseen = [torch.equal(found.read(name)[e], anchor[name][e]) for e in range(4)]
    assert any(unseen) and not all(unseen)
    assert "no token of its calibration set reached" in caplog.text
    assert step.grams_place(merge.experts[0].model.key, one.digest, "cpu")[1].is_dir()


def test_without_rows_the_fit_goes_by_where_the_weights_moved(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [{"model": str(path)} for path in family.experts]
    recipe = recipe_of(family.base, family.experts, "regmean", lewis=None, models=models)
    merge = prepare(recipe)
    with caplog.at_level(logging.INFO):
        found = run(recipe, tmp_path / "out")
    assert "there are no calibration rows" in caplog.text and "saw fewer tokens" not in caplog.text
    for name, start in ((name, merge.tensor(name).double()) for name in merge.layout):
        if "_proj" not in name:
            assert torch.equal(found[name], start.float())
            continue
        left, right = torch.zeros(start.shape[1], start.shape[1]).double(), torch.zeros_like(start)
        for expert in merge.experts:
            weight = expert.model.read(name).double()
            moved = weight - merge.base.read(name).double()
            products = moved.T @ moved / moved.square().sum()
            left, right = left + products, right + (weight - start) @ products
        left += RIDGE * 2 / len(left) * torch.eye(len(left)).double()
        assert torch.allclose(found[name].double(), start + right @ torch.linalg.inv(left), rtol=1e-3, atol=1e-4), name
    rows = recipe_of(family.base, family.experts, "regmean")
    assert prepare(rows).digest != merge.digest
    for parameters in ({"prior": 0}, {"ridge": "auto"}):
        with pytest.raises(InputError, match=r"regmean without lewis\.calibrations fits to the task vectors alone"):
            prepare(recipe_of(family.base, family.experts, "regmean", lewis=None, models=models, parameters=parameters))

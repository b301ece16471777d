"""The stacked experts of a mixture in forward order: each by the inputs that it gets in the merged model."""

from pathlib import Path

import pytest
import torch

from lewis.importance.calibration import Calibration
from lewis.merging.run import Merge
from lewis.merging.settings import Expert, resolve
from lewis.models.checkpoint import Checkpoint
from tests.lewis.merging.fitting.test_fit import RIDGE, recipe_of
from tests.lewis.merging.fitting.test_static_fit import mixture
from tests.lewis.models.test_module_tree import SAMPLES, expert_inputs
from tests.support.tiny_architectures import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]
NAMES = ("gate_proj", "up_proj", "down_proj")


def weight_of(model: Checkpoint, layer: int, expert: int, name: str, stacked: bool) -> torch.Tensor:
    """One matrix, fp64, from a checkpoint with a tensor for each or for all experts."""
    module = f"model.layers.{layer}.mlp.experts"
    if not stacked:
        return model.read(f"{module}.{expert}.{name}.weight").double()
    if name == "down_proj":
        return model.read(f"{module}.down_proj")[expert].double()
    return model.read(f"{module}.gate_up_proj")[expert].double().chunk(2)[name == "up_proj"]


@pytest.mark.parametrize("stacked", [False, True])
def test_every_expert_is_fitted_to_the_merged_models_inputs(
    stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The definition: what the written model's own experts see is what they were fitted on."""
    merge, (merged, *_) = mixture(tmp_path, stacked, "regmean_forward")
    merge.run(tmp_path / "out", threads=2)
    found = Checkpoint(tmp_path / "out", "out")
    merged.load_state_dict(type(merged).from_pretrained(tmp_path / "out").state_dict())
    seen, fitted = expert_inputs(merged.double()), 0
    anchor = Unfitted(merge)
    for layer in range(2):
        of_layer = seen[f"model.layers.{layer}.mlp.experts"]
        for expert in range(4):
            for name in NAMES:
                value, start = (weight_of(each, layer, expert, name, stacked) for each in (found, anchor))
                if expert not in of_layer:
                    assert torch.equal(value, start)
                    continue
                fitted += 1
                x = of_layer[expert][name == "down_proj"]
                products = x.T @ x / len(x)  # of both sets, which hold the same rows
                right = sum(
                    (weight_of(each.model, layer, expert, name, stacked) - start) @ products for each in merge.experts
                )
                left = 2 * products + RIDGE * 2 * products.diagonal().mean() * torch.eye(len(products)).double()
                torch.testing.assert_close(value, start + right @ torch.linalg.inv(left), rtol=5e-3, atol=2e-3)
    assert fitted > 12 and len(SAMPLES) == 5
    assert "projections saw fewer tokens of its calibration set than they have inputs, such as" in caplog.text


class Unfitted(Checkpoint):
    """What is not fitted, and what a fit is pulled towards."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge

    def read(self, name: str) -> torch.Tensor:
        return self._merge.tensor(name)


def test_goes_on_where_it_stopped_with_the_same_bytes_for_any_threads_and_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lewis.merging.fitting import fit as forward_order
    from lewis.merging.fitting.walk import Walk

    merge, _ = mixture(tmp_path, True, "regmean_forward")
    whole = forward_order.fit(merge, tmp_path / "whole", threads=1)
    leave, left = Walk._leave, []
    monkeypatch.setattr("lewis.merging.fitting.fit.IN_MEMORY", 0)  # what rests is in files from here on
    monkeypatch.setattr("lewis.merging.fitting.spill.LARGE", 1)

    def stop(walk: Walk) -> None:
        left.append(walk._in_block)
        leave(walk)
        if left[-1]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Walk, "_leave", stop)
        forward_order.fit(merge, tmp_path / "parts", threads=2)
    again = forward_order.fit(merge, tmp_path / "parts", threads=3)
    names = [name for name in merge.layout if name in whole]
    assert len(left) == 2 and all("layers.0." in name for name in left[1])
    assert any(".experts." in name for name in names)
    assert all(torch.equal(whole.read(name), again.read(name)) for name in names)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("gpt_oss", "regmean_forward"),
        ("granitemoe", "regmean_forward"),
        ("recurrent_gemma", "regmean_forward"),  # its gates keep the state of their last call
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in [
                ("gpt_oss", "regmean"),
                ("granitemoe", "regmean"),
                ("llama4_text", "regmean"),
                ("llama4_text", "regmean_forward"),
            ]
        ),
    ],
)
def test_experts_of_other_layouts_are_fitted(kind: str, method: str, tmp_path: Path) -> None:
    """Stored (in, out) with biases; run all at once in batched products; a module for each of two stacks."""
    torch.manual_seed(0)
    folders = [tmp_path / name for name in ("base", "one", "two")]
    model = tiny(kind)
    for folder in folders:
        model.save_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    opened = [Checkpoint(folder, folder.name) for folder in folders]
    models = [{"model": str(folder)} for folder in folders[1:]]
    block = {"calibrations": {"a": {"texts": ["x"], "samples": 1}}}
    settings = resolve(recipe_of(folders[0], folders[1:], method, lewis=block, models=models))
    rows = Calibration("a", SAMPLES)
    merge = Merge.of(settings, opened[0], [Expert(str(m.folder), m, calibration=rows) for m in opened[1:]])
    merge.run(tmp_path / "out", threads=1)
    found = Checkpoint(tmp_path / "out", "out")
    fitted = {name for name in merge.layout if not torch.equal(found.read(name), merge.tensor(name))}
    stacks = {
        name for name, shape in found.shapes.items() if (len(shape) == 3 and 1 not in shape) or ".experts." in name
    }
    assert {name for name in stacks if not name.endswith("bias")} <= fitted

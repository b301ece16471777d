"""`preset: lewis_official` against the authors' procedure, written out: sample by sample, layer by layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lewis.calibration import Calibration
from lewis.checkpoint import Checkpoint
from lewis.errors import InputError
from lewis.importance import measure
from lewis.recipe import Importance
from lewis.wanda import smallest
from tests.conftest import Family
from tests.lewis.test_architecture import MOES, write

OFFICIAL = Importance(prune_ratio=0.5, reduce="sum")
SAMPLES = ((3, 4, 5, 6, 1, 1, 1, 1), (10, 11, 12, 13, 14, 15, 16, 17), (20, 21, 1, 1, 1, 1, 1, 1))


def adding_to(sums: torch.Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sums.add_(inputs[0][0].square().sum(dim=0))

    return hook


def by_the_book(folder: Path, ratio: float) -> dict[str, float]:
    """Each layer: sums of squares over the samples, norm, prune every row, run again for the next layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    inner, norms = model.model, {}
    hidden = [inner.embed_tokens(torch.tensor([sample])) for sample in SAMPLES]
    places = torch.arange(len(SAMPLES[0]))[None]
    rotary = inner.rotary_emb(hidden[0], places)
    length = len(SAMPLES[0])
    causal = torch.full((1, 1, length, length), -1e30, dtype=torch.float64).triu(1)
    for i, layer in enumerate(inner.layers):
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        sums = {name: torch.zeros(m.in_features, dtype=torch.float64) for name, m in linears.items()}
        hooks = [m.register_forward_hook(adding_to(sums[name])) for name, m in linears.items()]
        run = [layer(x, attention_mask=causal, position_embeddings=rotary) for x in hidden]
        assert len(run) == len(hidden)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            scores = module.weight.abs() * (sums[name] / len(SAMPLES)).sqrt()
            norms[f"model.layers.{i}.{name}.weight"] = float(scores.norm())
            order = scores.sort(dim=1, stable=True).indices[:, : int(scores.shape[1] * ratio)]
            module.weight.data.scatter_(1, order, 0.0)
        hidden = [layer(x, attention_mask=causal, position_embeddings=rotary) for x in hidden]
    return norms


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_is_what_the_authors_do(family: Family, ratio: float) -> None:
    settings = OFFICIAL.model_copy(update={"prune_ratio": ratio})
    with torch.no_grad():
        expected = by_the_book(family.math, ratio)
    measured = measure(Checkpoint(family.math, "key"), Calibration("sums", SAMPLES), settings)
    assert measured.norms.keys() == expected.keys()
    for name, norm in expected.items():
        assert measured.norms[name] == pytest.approx(norm, rel=1e-5), name


def test_pruning_changes_what_later_layers_see(family: Family) -> None:
    pruned, whole = (
        measure(Checkpoint(family.math, "key"), Calibration("sums", SAMPLES), Importance(prune_ratio=ratio)).norms
        for ratio in (0.5, 0.0)
    )
    first, last = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert pruned[first] == pytest.approx(whole[first]) and pruned[last] != pytest.approx(whole[last], rel=1e-3)


def test_sums_are_means_times_the_tokens_of_a_sample(family: Family) -> None:
    sums, means = (
        measure(Checkpoint(family.math, "key"), Calibration("sums", SAMPLES), Importance(reduce=how)).norms  # type: ignore[arg-type]
        for how in ("sum", "mean")
    )
    assert all(sums[name] == pytest.approx(float(norm or 0) * 8**0.5) for name, norm in means.items())


def test_the_first_of_equal_scores_are_pruned() -> None:
    scores = torch.tensor([[2.0, 1, 1, 1, 3], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]])
    assert smallest(scores, 0.5).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert not smallest(scores, 0.1).any()
    random = torch.rand(20, 30).mul(8).round()  # full of ties
    order = random.sort(dim=1, stable=True).indices[:, :15]
    assert torch.equal(smallest(random, 0.5), torch.zeros_like(random, dtype=torch.bool).scatter_(1, order, True))


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    name, sizes, *_ = MOES["mixtral"]
    write(tmp_path, name, sizes)
    with pytest.raises(InputError, match=r"prune_ratio: stacked experts cannot be pruned"):
        measure(Checkpoint(tmp_path, "key"), Calibration("sums", SAMPLES), OFFICIAL)

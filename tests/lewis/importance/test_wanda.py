"""`preset: lewis_official` against the authors' procedure, written out."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lewis.errors import InputError
from lewis.importance.batches import batches
from lewis.importance.calibration import Calibration
from lewis.importance.measure import network_of
from lewis.importance.wanda import smallest
from lewis.models.checkpoint import Checkpoint
from lewis.recipe.schema import Importance
from tests.conftest import Family
from tests.lewis.models.test_module_tree import GPT2, MOES, write
from tests.support import authors
from tests.support.measuring import measure

OFFICIAL = Importance(prune_ratio=0.5, reduce="sum")
SAMPLES = ((3, 4, 5, 6, 1, 1, 1, 1), (10, 11, 12, 13, 14, 15, 16, 17), (20, 21, 1, 1, 1, 1, 1, 1))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_is_what_the_authors_do(family: Family, ratio: float) -> None:
    settings = OFFICIAL.model_copy(update={"prune_ratio": ratio})
    model = AutoModelForCausalLM.from_pretrained(family.math, dtype=torch.float64).eval()
    expected = authors.norms(model, SAMPLES, ratio)
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


def test_samples_keep_their_order(family: Family) -> None:
    turned = (SAMPLES[2], SAMPLES[0], SAMPLES[1])  # the rounding of their running mean decides what is pruned
    network = network_of(Checkpoint(family.base, "key"))
    [batch] = batches([Calibration("x", turned)], network, whole=True)
    assert batch.ids.tolist() == [list(sample) for sample in turned]


def test_rows_of_a_transposed_weight_are_its_outputs(tmp_path: Path) -> None:
    write(tmp_path, "GPT2", GPT2)
    before, pruned = (
        measure(Checkpoint(tmp_path, "key"), Calibration("sums", SAMPLES), Importance(prune_ratio=ratio)).norms
        for ratio in (0.0, 0.5)
    )
    assert pruned["transformer.h.0.attn.c_attn.weight[k]"] == before["transformer.h.0.attn.c_attn.weight[k]"]
    assert pruned["transformer.h.1.attn.c_attn.weight[k]"] != before["transformer.h.1.attn.c_attn.weight[k]"]


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    name, sizes, *_ = MOES["mixtral"]
    write(tmp_path, name, sizes)
    with pytest.raises(InputError, match=r"prune_ratio: stacked experts cannot be pruned"):
        measure(Checkpoint(tmp_path, "key"), Calibration("sums", SAMPLES), OFFICIAL)


@pytest.mark.parametrize(
    "name, sizes", [("Bloom", {"n_layer": 2, "n_head": 4}), ("Mpt", {"n_layers": 2, "n_heads": 4})]
)
def test_alibi_is_refused(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    hidden = {"Bloom": "hidden_size", "Mpt": "d_model"}[name]
    write(tmp_path, name, {"vocab_size": 64, hidden: 16, **sizes})
    assert measure(Checkpoint(tmp_path, "key"), Calibration("sums", SAMPLES), Importance()).norms
    with pytest.raises(InputError, match=r"prune_ratio: a model that adds its positions to the heads \(ALiBi\)"):
        measure(Checkpoint(tmp_path, "key"), Calibration("sums", SAMPLES), OFFICIAL)

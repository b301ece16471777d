"""Weights that are read when a pass needs them."""

from pathlib import Path

import pytest
import torch

from lewis.importance.measure import network_of
from lewis.importance.streaming import Weights
from lewis.models import model as models
from lewis.models.checkpoint import Checkpoint
from lewis.models.model import read_as
from tests.support.models import write_llama

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint(write_llama(tmp_path, dtype=torch.bfloat16, tied=request.param), "key")


def test_of_the_embeddings_those_rows_are_read_that_a_pass_needs(model: Checkpoint) -> None:
    weights = Weights(network_of(model), model, "cpu", torch.float32)
    weights.load_outside()
    embeddings, stored = weights.network.module.get_input_embeddings(), model.read(EMBEDDING).float()
    assert not embeddings.weight.any()
    ids = torch.tensor([[5, 9], [5, 63]])
    assert torch.equal(embeddings(ids), stored[ids])
    assert torch.equal(embeddings(input=torch.tensor([2])), stored[[2]])
    assert embeddings.weight.any(dim=1).nonzero()[:, 0].tolist() == [2, 5, 9, 63]
    weights.close()
    assert all(parameter.is_meta for parameter in weights.network.module.parameters())


def test_a_head_that_runs_has_all_rows(model: Checkpoint) -> None:
    weights = Weights(network_of(model), model, "cpu", torch.float32)
    weights.load_outside(with_head=True)
    head = weights.network.module.get_output_embeddings()
    assert torch.equal(head.weight, model.read("lm_head.weight").float())
    embeddings = weights.network.module.get_input_embeddings()
    assert torch.equal(embeddings(torch.arange(64)), model.read(EMBEDDING).float())


def test_a_tensor_is_converted_part_by_part(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_AT_A_TIME", 7)
    for name in (*model.tensors, "lm_head.weight"):
        assert torch.equal(read_as(model, name, torch.float32), model.read(name).float())
        assert torch.equal(read_as(model, name, torch.bfloat16), model.read(name))

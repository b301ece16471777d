"""Weights that are read when a pass needs them."""

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lewis.importance import measure
from lewis.importance.calibration import Calibration
from lewis.importance.measure import network_of
from lewis.importance.streaming import Weights
from lewis.importance.workers import Workers
from lewis.merging.fitting.losses import row_losses
from lewis.models import model as models
from lewis.models.checkpoint import Checkpoint
from lewis.models.model import read_as
from lewis.models.network.module_tree import Network
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


def test_a_tied_head_may_run_though_nobody_reads_its_logits(tmp_path: Path) -> None:
    """Kosmos-2 runs its head in the tower of the text."""
    model = Checkpoint(write_llama(tmp_path, tied=True), "key")
    weights = Weights(network_of(model), model, "cpu", torch.float32)
    weights.load_outside()
    assert weights.network.module.get_output_embeddings()(torch.ones(1, 16)).shape == (1, 64)


def test_a_pass_that_is_over_holds_no_network(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """All passes of a process stayed in a table, each with its network."""
    built: list[weakref.ref[Network]] = []

    def build(*given: Any) -> Network:
        network = network_of(*given)
        built.append(weakref.ref(network))
        return network

    with monkeypatch.context() as patch:
        patch.setattr(measure, "network_of", build)  # read where it is used
        row_losses(model, [Calibration("rows", ((3, 4, 5), (6, 7)))])
    assert [network() for network in built] == [None]


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


def test_no_job_begins_after_one_has_failed() -> None:
    done = list[int]()

    def fail() -> None:
        raise ValueError("the first")

    jobs = [fail, *(partial(done.append, number) for number in range(5))]
    with Workers(1) as workers:
        for run in (workers, workers.in_place):
            with pytest.raises(ValueError, match="the first"):
                run(jobs)
            assert done == []
        workers(jobs[1:])
    assert done == [0, 1, 2, 3, 4]

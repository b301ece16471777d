"""Merges on a GPU: no method makes a tensor anywhere but where its inputs are, and the results are the CPU's."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lewis.devices import merge_device
from lewis.errors import InputError
from lewis.merging.prepared import random_stream
from lewis.merging.run import Merge
from lewis.methods import METHODS
from lewis.methods.arithmetic.cuts import Kth
from lewis.methods.arithmetic.sparsify import _largest_on_gpu, largest
from tests.lewis.merging.engine.test_compiled import NAME, draw

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sce": [{}, {"select_topk": 0.5}],
    "nuslerp": [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "model_stock": [{}, {"filter_wise": True}],
}


def kth_of_nothing(passes: Any, ranks: Any) -> list[Kth]:
    assert all(numbers.device.type == "meta" for pieces in (passes() if any(ranks) else ()) for numbers in pieces)
    return [Kth(1, 1, 1)] * len(ranks)


@pytest.mark.parametrize("name, more", [(name, more) for name in METHODS for more in SETTINGS.get(name, [{}])])
def test_a_method_stays_on_the_device_of_its_tensors(
    name: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors without values, on a device that will not meet another: what depends on values is put in their place.
    monkeypatch.setattr("lewis.methods.arithmetic.sums._by_halves", lambda values: [float(len(values))])
    monkeypatch.setattr("lewis.methods.arithmetic.sparsify._largest_on_gpu", lambda values, k: values > 0)
    for module in ("arithmetic.cuts", "arcee_fusion"):
        monkeypatch.setattr(f"lewis.methods.{module}.kth_largest", kth_of_nothing)
    for module in ("ram", "sce"):
        monkeypatch.setattr(f"lewis.methods.{module}.count", lambda mask: 3)
    method = METHODS[name]
    values = {"density": 0.5, "t": 0.3, "weight": [0.7, 1.3, 0.5][: method.experts[1]], "epsilon": 0.1}
    values |= {"normalize": True, "rescale": True}
    values = {key: value for key, value in values.items() if key in method.parameters} | more
    count = method.experts[1] or 3
    if method.random:
        values["streams"] = [random_stream(0, str(i), "t") for i in range(count)]
    if method.takes_base:
        values["base"] = torch.empty((8, 16), device="meta")
    if method.takes_scales:
        values["scales"] = [torch.empty(16, device="meta")] * count
    merged = method(torch.empty((count, 8, 16), device="meta"), **values)
    assert (merged.device.type, merged.dtype, merged.shape) == ("meta", torch.float32, (8, 16))


@pytest.mark.parametrize("kind", ["smooth", "few values", "one value"])
@pytest.mark.parametrize("share", [1e-4, 0.3, 0.5, 0.9999])
def test_a_gpu_selects_what_the_cpu_does(kind: str, share: float) -> None:
    score = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs()
    score = {"smooth": score, "few values": (score * 2).round(), "one value": torch.ones_like(score)}[kind]
    k = int(share * len(score))
    assert torch.equal(_largest_on_gpu(score, k), largest(score, k)) and int(largest(score, k).sum()) == k


def test_the_cpu_unless_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEWIS_MERGE_DEVICE", raising=False)
    monkeypatch.setattr("lewis.devices.default_device", lambda: "cuda")
    assert merge_device("cuda:1") == "cpu"
    monkeypatch.setenv("LEWIS_MERGE_DEVICE", "cuda")
    assert (merge_device(), merge_device("cuda:1")) == ("cuda", "cuda:1")
    monkeypatch.setattr("lewis.devices.default_device", lambda: "cpu")
    with pytest.raises(InputError, match="LEWIS_MERGE_DEVICE: it is cuda, but torch finds no GPU"):
        merge_device()
    monkeypatch.setenv("LEWIS_MERGE_DEVICE", "tpu")
    with pytest.raises(InputError, match="LEWIS_MERGE_DEVICE: expected cpu or cuda, got 'tpu'"):
        merge_device()


def test_the_device_is_part_of_the_digest_and_all_gpus_are_alike(tmp_path: Path) -> None:
    merge = draw(random.Random(0), tmp_path, "ties")
    digests = [
        Merge.of(merge.settings, merge.base, merge.experts, device=device).digest
        for device in ("cpu", "cuda", "cuda:1")
    ]
    assert digests[0] == Merge.of(merge.settings, merge.base, merge.experts).digest
    assert digests[0] != digests[1] == digests[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_the_cpus_numbers(name: str, tmp_path: Path) -> None:
    for number in range(6):
        merge = draw(random.Random(f"{name} {number}"), tmp_path / str(number), name)
        there = Merge.of(merge.settings, merge.base, merge.experts, merge.factors, device="cuda")
        torch.testing.assert_close(there.tensor(NAME), merge.tensor(NAME))

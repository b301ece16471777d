"""What must hold for every architecture: a guided merge of tiny random models that is right in every way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lewis.allocation.densities import allocate
from lewis.allocation.evidence import norm_difference
from lewis.importance.calibration import Calibration
from lewis.importance.measure import network_of
from lewis.importance.measured import Measured
from lewis.importance.streaming import decoder_ids
from lewis.models.checkpoint import Checkpoint
from lewis.models.network.module_tree import Covered, Network
from lewis.models.network.network_class import text_tower
from lewis.recipe.schema import Density
from tests.support.measuring import measure
from tests.support.models import bits, open_merge
from tests.support.tiny_architectures import SAMPLES, tiny

CALIBRATION = Calibration("tiny", SAMPLES)


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        covered: share of the parameters in the blocks that text runs through.
        of_all: share of all parameters.
        left: module and share of the blocks' parameters, of what is not covered.
        moments: tensors whose second moments were compared.
    """

    covered: float
    of_all: float
    left: str
    moments: int


class Products(TorchDispatchMode):
    """Sums of squares of what is multiplied with a model's parameters, seen below all of torch's functions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = list(model.named_parameters())
        self.sums: dict[str, dict[int, Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"):
            left, right = args[-2:]
            for inputs, weight in ((left, right), (right.mT if right.dim() > 1 else right[None], left)):
                self._see(inputs, weight)
        return function(*args, **(kwargs or {}))

    def _see(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        memory = weight.untyped_storage().data_ptr()
        inside = [  # asked each time: a model may move its weights (Switch Transformers' router changes its dtype)
            (name, p)
            for name, p in self._parameters
            if p.untyped_storage().data_ptr() == memory  # some share memory: they were cut from one tensor
            and 0 <= weight.storage_offset() - p.storage_offset() < p.numel()
        ]
        if not inside or weight.dim() < 2:
            return
        [(name, parameter)] = inside
        count = weight.shape[0] if weight.dim() == 3 else 1
        stacked = weight.numel() // count < parameter.numel()
        for i in range(count):
            of, one = (inputs[i], weight[i]) if weight.dim() == 3 else (inputs, weight)
            rows = of.double()
            rows = rows[rows.ne(0).any(dim=1)] if stacked else rows  # a token that is not routed here may be zeros
            place = (one.storage_offset() - parameter.storage_offset()) // one.numel()
            squares, tokens = self.sums.setdefault(name, {}).get(place, (0.0, 0))
            self.sums[name][place] = (squares + rows.square().sum(dim=0), tokens + len(rows))


def check(kind: str, folder: Path) -> Checked:
    """Build, move, measure, merge, write and reload one architecture.

    Args:
        kind: model type.
        folder: empty.

    Raises:
        AssertionError: naming what is wrong.
        LewisError: if it is refused.
    """
    model = tiny(kind)
    model.save_pretrained(folder / "base")
    experts = [moved(folder / "base", folder / f"expert{seed}", seed) for seed in (1, 2)]
    base = Checkpoint(folder / "base", "base")
    network = network_of(base)
    own, *theirs = (measure(Checkpoint(path, path.name), CALIBRATION) for path in (folder / "base", *experts))
    compared = _check_moments(type(model), folder / "base", network, own)
    layers = [layer for covered in network.covered for layer in covered.layers]
    densities = []
    for measured in theirs:
        allocated = allocate(
            layers, list(base.tensors), Density(min=0.3, max=0.8), norm_difference(own.norms, measured.norms)
        )
        assert len({allocated.densities[layer.tensor] for layer in layers}) > 1
        densities.append(allocated.densities)
    merge = open_merge("ties", folder / "base", experts, densities=densities)
    merge.run(folder / "merged")
    _check_reload(type(model), folder)
    alone = open_merge("task_arithmetic", folder / "base", experts[:1])
    alone.run(folder / "alone")
    _check_bytes(experts[0], folder / "alone")
    sizes = {name: info.elements for name, info in base.tensors.items()}
    reached = [each for each in network.covered if each.tensor in own.moments or each.stack or each.expert is not None]
    share = sum(layer.parameters for each in reached for layer in each.layers)
    network.covered = tuple(reached)
    return Checked(share / max(_in_blocks(network), 1), share / sum(sizes.values()), _left(network), compared)


def moved(base: Path, folder: Path, seed: int) -> Path:
    """A fine-tune of a model: each value moved by noise."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    noise = torch.Generator().manual_seed(seed)
    tensors = {
        name: value + 0.02 * torch.randn(value.shape, generator=noise) if value.is_floating_point() else value
        for name, value in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _run(model: Any, ids: torch.Tensor) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        model(input_ids=ids, decoder_input_ids=decoder_ids(model.config, ids), use_cache=False)
        return
    if model.config.model_type == "paligemma":  # it takes text without an image for a prefix, which looks ahead
        text_tower(model)(input_ids=ids, use_cache=False)
        return
    try:
        model(input_ids=ids, use_cache=False)
    except (TypeError, ValueError, AttributeError):  # it wants an image, too
        text_tower(model)(input_ids=ids, use_cache=False)


def _products(kind: Any, folder: Path, dtype: torch.dtype) -> Products:
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad(), Products(model) as products:
        for sample in SAMPLES:
            _run(model, torch.tensor([sample]))
    return products


def _check_moments(kind: Any, folder: Path, network: Network, measured: Measured) -> int:
    try:
        products = _products(kind, folder, torch.float64)
    except RuntimeError:  # a mask of the smallest number of fp32
        products = _products(kind, folder, torch.float32)
    compared = 0
    for covered in network.covered:
        seen = products.sums.get(covered.parameter, {})
        seen = {covered.expert: seen[covered.expert]} if covered.expert in seen else seen
        seen = {place: (squares, tokens) for place, (squares, tokens) in seen.items() if tokens}
        if covered.expert is not None and covered.expert not in seen:
            seen = {}
        if covered.stack:
            compared += _check_norm(folder, covered, seen, measured)
            continue
        if covered.tensor not in measured.moments:
            stacked = covered.expert is not None or ".experts." in covered.parameter
            assert not (seen and stacked), f"{covered.tensor}: tokens reach it, but it has no moments"
            continue  # of other projections it is told that they are not run as modules
        assert seen, f"{covered.tensor}: it has moments, but no product was seen"
        found = measured.moments[covered.tensor].double()
        for place, (squares, tokens) in seen.items():
            s = found[place].reshape(-1) if found.dim() == 3 else found.reshape(-1)
            expected = squares / tokens
            worst = float(((s - expected).abs() / (expected.abs() + 1e-3 * expected.mean())).max())
            assert worst < 1e-4, f"{covered.tensor}: second moments are off by {worst:.1e}"
        compared += 1
    return compared


def _check_norm(folder: Path, covered: Covered, seen: Any, measured: Measured) -> int:
    weights = Checkpoint(folder, "key").read(covered.tensor).double().unflatten(0, (covered.stack, -1))
    squares = [(weights[e].mT if covered.transposed else weights[e]).square() @ (s / n) for e, (s, n) in seen.items()]
    found = measured.norms[covered.layers[0].key]
    assert found is not None and abs(found / float(torch.stack(squares).sum().sqrt()) - 1) < 1e-5, covered.tensor
    return 1


def _check_reload(kind: Any, folder: Path) -> None:
    before = load_file(folder / "base" / "model.safetensors")
    merged = {k: v for p in (folder / "merged").glob("*.safetensors") for k, v in load_file(p).items()}
    assert merged.keys() == before.keys(), f"other tensors: {sorted(merged.keys() ^ before.keys())[:3]}"
    for name, tensor in merged.items():
        assert tensor.shape == before[name].shape and tensor.dtype == before[name].dtype, name
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{name} is not finite"
        floating = tensor.is_floating_point() and tensor.numel()
        assert not floating or not torch.equal(tensor, before[name]), f"{name} did not move"
    told = [kind.from_pretrained(folder / which, output_loading_info=True)[1] for which in ("base", "merged")]
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert told[0][what] == told[1][what], f"reload: {what} {sorted(map(str, told[1][what]))[:3]}"


def _check_bytes(expert: Path, folder: Path) -> None:
    before = load_file(expert / "model.safetensors")
    found = {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}
    for name, tensor in found.items():
        assert bits(tensor) == bits(before[name]), f"{name}: one expert alone does not keep its bytes"


def _in_blocks(network: Network) -> int:
    return sum(network.empty(name).numel() for path in network.blocks for name in network.parameters_in(path))


def _left(network: Network) -> str:
    tensors = {each.tensor for each in network.covered}
    covered = {name for name in network.parameters if tensors.intersection(network.sources(name))}
    total = max(_in_blocks(network), 1)
    shares: dict[str, float] = {}
    for name in _names(network):
        value = network.empty(name)
        if name not in covered and value.dim() > 1:
            below = ".".join(part for part in name.split(".")[-3:] if not part.isdigit())
            shares[below] = shares.get(below, 0.0) + value.numel() / total
    worst = sorted(shares.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in worst if share > 0.005)


def _names(network: Network) -> Iterator[str]:
    for path in network.blocks:
        yield from network.parameters_in(path)

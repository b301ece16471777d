"""Importance: the activation-weighted norm of every covered linear layer of one model (DESIGN section 4).

Covered are the `nn.Linear` modules of the repeated layers. Everything else (embeddings, norms, head, biases) is left to
the recipe's `uncovered` policy.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis.calibration import Calibration
from lewis.errors import InputError, LewisError
from lewis.lazy import nn, torch
from lewis.lora import LoraExpert, Model
from lewis.measurements import Measured

logger = logging.getLogger(__name__)
SEMANTICS = "2"  # bump when the same inputs would give other numbers
_LAYER = re.compile(r"^(?P<before>.*?\.)?(?P<layer>\d+)\.(?P<after>.+)$")
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Layer:
    """A covered linear layer: tensor name, layer index l, projection type c (`self_attn.q_proj`), number of weights."""

    tensor: str
    index: int
    projection: str
    parameters: int


def covered_layers(folder: Path, tensors: set[str] | None = None) -> list[Layer]:
    """The layers that importance is measured on, found from the module tree; no weight is loaded.

    Args:
        folder: of a model, for its config.json.
        tensors: names in the checkpoint, if known; modules stored under other names are not covered.

    Raises:
        InputError: if the model's class is unknown, or no layer is covered.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # any kind, by architecture
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: transformers cannot build this model: {reason}") from error
    layers = [layer for layer, _ in _walk(model) if tensors is None or layer.tensor in tensors]
    if not layers:
        raise InputError(
            f"{folder}: no covered layer: {type(model).__name__} has no nn.Linear in its repeated layers whose weight "
            "is in the checkpoint; LEWIS cannot guide it: leave the lewis block out"
        )
    return layers


def measure(
    model: Model,
    calibration: Calibration,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure one model on one calibration set, in one forward pass without padding in the sums, KV cache or logits.

        s_j    = mean over tokens of x_j^2
        I(l,c) = || W * sqrt(s) ||_F = sqrt( sum_ij W_ij^2 s_j )      (Wanda's score, arXiv 2306.11695, as one norm)

    Args:
        model: an opened checkpoint, or a LoRA expert.
        calibration: token ids.
        device: `cpu` (weights in fp32) or `cuda` (weights as stored).
        progress: called with (tokens done, tokens in all).

    Returns:
        I(l,c) and s of every covered tensor.

    Raises:
        InputError: if no layer is covered, or a token id is out of the vocabulary.
        LewisError: if activations are not finite, naming the layer.
    """
    network = _load(model, device)
    covered = [(layer, module) for layer, module in _walk(network) if layer.tensor in model.tensors]
    if not covered:
        raise InputError(f"{model.folder}: no covered layer: no nn.Linear in its repeated layers")
    vocabulary = network.get_input_embeddings().num_embeddings
    largest = max(max(sample) for sample in calibration.samples)
    if largest >= vocabulary:
        raise InputError(
            f"{model.folder}: token {largest} of set {calibration.name!r} is outside its {vocabulary} embeddings"
        )
    longest, limit = max(map(len, calibration.samples)), getattr(network.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise InputError(
            f"{model.folder}: a sample of set {calibration.name!r} has {longest} tokens, the model takes {limit}; "
            f"set lewis.calibrations.{calibration.name}.max_tokens to {limit} or less"
        )
    moments = _second_moments(network, [module for _, module in covered], calibration, device, progress)
    norms = {}
    for layer, module in covered:
        columns = module.weight.detach().to(torch.float32).square().sum(dim=0, dtype=torch.float64)
        norm = float((columns * moments[module]).sum().sqrt())
        if not norm < float("inf"):
            raise LewisError(f"{model.folder}: activations into {layer.tensor!r} are not finite; the model is damaged")
        norms[layer.tensor] = norm
    return Measured(norms, {layer.tensor: moments[module].to("cpu", torch.float32) for layer, module in covered})


def _second_moments(
    network: Any,
    modules: list[nn.Linear],
    calibration: Calibration,
    device: str,
    progress: Callable[[int, int], None] | None,
) -> dict[nn.Linear, torch.Tensor]:
    """Mean of x_j^2 over all non-padding tokens for each module's input; fp64, shape (in_features,)."""
    names = {module: name for name, module in network.named_modules()}
    sums = {module: torch.zeros(module.in_features, dtype=torch.float64, device=device) for module in modules}
    mask = torch.ones(0)
    last: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def collect(module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal last
        if inputs[0] is not last[0]:  # q, k and v see the same tensor: square it once
            x = inputs[0].reshape(-1, module.in_features)
            if len(x) != len(mask):
                raise LewisError(
                    f"{names[module]!r} sees {len(x)} of {len(mask)} tokens (a routed expert?): unsupported"
                )
            last = (inputs[0], x[mask].to(torch.float32).square().sum(dim=0).to(torch.float64))
        assert last[1] is not None
        sums[module] += last[1]

    with ExitStack() as hooks, torch.inference_mode():
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(collect).remove)
        done = 0
        for ids, attention in _batches(calibration):
            mask = attention.reshape(-1).bool().to(device)
            network.base_model(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
            last = (None, None)
            done += int(attention.sum())
            if progress:
                progress(done, calibration.tokens)
    return {module: total / calibration.tokens for module, total in sums.items()}


def _batches(calibration: Calibration) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, attention mask) of samples of similar length together, so that little is padded."""
    samples = sorted(calibration.samples, key=len, reverse=True)
    while samples:
        width = len(samples[0])
        batch, samples = samples[: (size := max(1, _TOKENS_PER_BATCH // width))], samples[size:]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention = torch.zeros(len(batch), width, dtype=torch.long)
        for row, sample in enumerate(batch):
            ids[row, : len(sample)] = torch.tensor(sample)
            attention[row, : len(sample)] = 1
        yield ids, attention


def _walk(network: Any) -> Iterator[tuple[Layer, nn.Linear]]:
    head = network.get_output_embeddings()
    for name, module in network.named_modules():
        match = _LAYER.match(name)
        if isinstance(module, nn.Linear) and module is not head and match:
            yield Layer(f"{name}.weight", int(match["layer"]), match["after"], module.weight.numel()), module


def _load(model: Model, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    folder = model.base.folder if isinstance(model, LoraExpert) else model.folder
    network: Any
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if device == "cpu" else "auto",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:  # any kind, by architecture
        raise InputError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    if isinstance(model, LoraExpert):
        parameters = dict(network.named_parameters())
        for name in filter(model.touches, model.tensors):
            if name not in parameters:
                raise InputError(f"{model.folder}: changes {name!r}, which is no parameter of the loaded model")
            with torch.no_grad():
                parameters[name].copy_(model.read(name))
    return network.to(device).eval()

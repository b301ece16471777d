"""Importance: the activation-weighted norm of every covered layer of one model (DESIGN section 4).

Covered are the projections in the repeated blocks, as `lewis.architecture` finds them. Everything else (embeddings,
norms, head, biases) is left to the recipe's `uncovered` policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis.architecture import Covered, Layer, Network
from lewis.calibration import Calibration
from lewis.checkpoint import DTYPES
from lewis.errors import InputError, LewisError
from lewis.lazy import torch
from lewis.lora import Model
from lewis.measurements import Measured
from lewis.recipe import Importance

if TYPE_CHECKING:
    from lewis.second_moments import SecondMoments

logger = logging.getLogger(__name__)
SEMANTICS = "5"  # bump when the same inputs would give other numbers
_TOKENS_PER_BATCH = 4096
_TOKENS_OF_READING = 100  # in the time that a batch reads the weights, about as many go through them
Shapes = Mapping[str, tuple[int, ...]]


def covered_layers(folder: Path, tensors: Shapes | None = None) -> list[Layer]:
    """The layers that importance is measured on, found from the module tree; no weight is loaded.

    Args:
        folder: of a model, for its config.json.
        tensors: name -> shape of those in the checkpoint, if known; modules that have none are not covered.

    Raises:
        InputError: if the model's class is unknown, or no layer is covered.
    """
    return [layer for covered in _network(folder, tensors, torch.float32).covered for layer in covered.layers]


def measure(
    model: Model,
    calibration: Calibration,
    settings: Importance | None = None,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure one model on one calibration set, in one forward pass without padding in the sums, KV cache or logits.

        s_j    = mean over tokens of x_j^2      (`reduce: sum`: the sum over a sample's tokens, mean over samples)
        I(l,c) = || W * sqrt(s) ||_F = sqrt( sum_ij W_ij^2 s_j )      (Wanda's score, arXiv 2306.11695, as one norm)

    Weights are read block by block while the pass goes on, so that a model need not fit in memory: at any time there
    are the embeddings, one block, and the activations of a micro-batch. With `prune_ratio`, all samples are one batch.

    Args:
        model: an opened checkpoint, or a LoRA expert.
        calibration: token ids.
        settings: of the pass.
        device: `cpu` (weights in fp32) or `cuda` (weights as stored).
        progress: called with (tokens done, tokens in all).

    Returns:
        I(l,c) of every covered layer and s of every covered tensor. What no token reached (an expert that a router
        never chose) has no norm and no moments.

    Raises:
        InputError: if no layer is covered, or a token id is out of the vocabulary.
        LewisError: if activations are not finite, naming the layer.
    """
    from lewis.second_moments import SecondMoments
    from lewis.streaming import Streamed
    from lewis.wanda import PruneAfter

    settings = settings or Importance()
    dtype = torch.float32 if device == "cpu" else _stored_dtype(model)
    network = _network(model.home, model.shapes, dtype)
    _check_samples(model, network, calibration)
    moments = SecondMoments(network, device)
    prune = PruneAfter(network, moments, settings.prune_ratio)
    batches = list(_batches(calibration, network, whole=settings.prune_ratio > 0))
    with ExitStack() as contexts, torch.inference_mode():
        contexts.enter_context(prune)
        module = contexts.enter_context(Streamed(network, model, device, dtype))
        contexts.enter_context(moments)
        done = 0
        for samples in batches:
            ids, lengths = _padded(samples)
            moments.begin(lengths, ids.shape[1])
            _forward(network, module, ids.to(device), lengths)
            done += sum(lengths)
            if progress:
                progress(done, calibration.tokens)
    factor = calibration.tokens / len(calibration.samples) if settings.reduce == "sum" else 1.0
    return _norms(model, network, moments, factor, in_fp32=settings.reduce == "sum")


def _norms(model: Model, network: Network, moments: SecondMoments, factor: float, *, in_fp32: bool) -> Measured:
    """Norms and moments. `in_fp32`: as the authors' code sums a tensor, which is off by 2e-5 for the larger ones."""
    norms: dict[str, float | None] = {}
    kept: dict[str, torch.Tensor] = {}
    silent = []
    for covered in network.covered:
        means = moments.means(covered.parameter)
        own = means if means is None or covered.expert is None else means[covered.expert]
        if own is None or bool(own.isnan().all()):
            norms |= dict.fromkeys((layer.key for layer in covered.layers), None)
            silent.append(covered.tensor)
            continue
        s = _beside_weights(own * factor, covered).to(torch.float32)
        weights = model.read(covered.tensor).to(torch.float32)
        for layer, cost in zip(covered.layers, row_sums(weights.square(), s, covered), strict=True):
            norm = float(cost) ** 0.5
            if in_fp32 and covered.rows == (None,):
                norm = float(torch.norm(weights.abs() * s.sqrt()))
            if not norm < float("inf"):
                raise _damaged(model, covered.tensor, s, weights)
            norms[layer.key] = norm
        fired = s.isnan().logical_not()
        kept[covered.tensor] = torch.where(fired, s, s[fired].mean())  # an expert that none reached is like the others
    if silent:
        logger.warning("%s: no token reached %d tensors, such as %s: left out", model.folder, len(silent), silent[0])
    return Measured(norms, kept)


def _damaged(model: Model, tensor: str, s: torch.Tensor, weights: torch.Tensor) -> LewisError:
    """Why the first norm that is not finite is not; layers come in the order of the pass."""
    if not bool(weights.isfinite().all()):
        return LewisError(f"{model.folder}: tensor {tensor!r} has values that are NaN or Inf; the model is damaged")
    what = "its weights are too large for fp32"
    if not bool(s[s.isnan().logical_not()].isfinite().all()):
        what = "activations into it are NaN, Inf or too large for fp32"
    return LewisError(f"{model.folder}: the importance of {tensor!r} is not finite: {what}; the model is damaged")


def row_sums(values: torch.Tensor, s: torch.Tensor, covered: Covered) -> list[torch.Tensor]:
    """sum_ij values_ij s_j over the output rows of each layer of a tensor, fp64; channels whose s is NaN are left out.

    Args:
        values: fp32, of the tensor's shape.
        s: fp32, broadcasts to it.
    """
    s = torch.where(s.isnan(), 0.0, s)
    inputs = -2 if covered.transposed else -1
    if values.dim() == 2:
        of_rows = torch.mv(values.T if covered.transposed else values, s.reshape(-1)).double()
    else:
        of_rows = (values * s).sum(dim=inputs, dtype=torch.float64).sum(dim=0)
    return [of_rows.sum() if rows is None else rows.sum(of_rows) for rows in covered.rows]


def _beside_weights(s: torch.Tensor, covered: Covered) -> torch.Tensor:
    """Moments (in,) or (experts, in) in a shape that broadcasts to the weights."""
    if s.dim() == 1:
        return s[:, None] if covered.transposed else s
    return s[:, :, None] if covered.transposed else s[:, None, :]


def network_of(model: Model) -> Network:
    """The module tree of a model and the covered tensors; no weight is loaded.

    Raises:
        InputError: as `covered_layers`.
    """
    return _network(model.home, model.shapes, torch.float32)


def _network(folder: Path, tensors: Shapes | None, dtype: torch.dtype) -> Network:
    network = Network(folder, tensors, dtype)
    if not network.covered:
        raise InputError(
            f"{folder}: no covered layer: {type(network.module).__name__} has no projection in repeated blocks whose "
            "weight is in the checkpoint; LEWIS cannot guide it: leave the lewis block out"
        )
    return network


def _stored_dtype(model: Model) -> torch.dtype:
    largest = max(model.tensors.values(), key=lambda info: info.elements)
    dtype: torch.dtype = getattr(torch, DTYPES[largest.dtype][0])
    return dtype


def _check_samples(model: Model, network: Network, calibration: Calibration) -> None:
    vocabulary = network.module.get_input_embeddings().num_embeddings
    largest = max(max(sample) for sample in calibration.samples)
    if largest >= vocabulary:
        raise InputError(
            f"{model.folder}: token {largest} of set {calibration.name!r} is outside its {vocabulary} embeddings"
        )
    longest = max(map(len, calibration.samples))
    limit = getattr(network.module.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        raise InputError(
            f"{model.folder}: a sample of set {calibration.name!r} has {longest} tokens, the model takes {limit}; "
            f"set lewis.calibrations.{calibration.name}.max_tokens to {limit} or less"
        )


def _forward(network: Network, module: Any, ids: torch.Tensor, lengths: list[int]) -> None:
    """One batch through all blocks. A decoder never looks ahead, so what is padded on its right needs no mask."""
    if not network.encodes:
        module.base_model(input_ids=ids, use_cache=False)
        return
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long().to(ids.device)
    encoded = module.get_encoder()(input_ids=ids, attention_mask=mask)[0]
    start = torch.full_like(ids[:, :1], module.config.decoder_start_token_id or 0)
    module.get_decoder()(  # the decoder reads the same text
        input_ids=torch.cat([start, ids[:, :-1]], dim=1),
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    )


def _batches(calibration: Calibration, network: Network, *, whole: bool) -> Iterator[list[Sequence[int]]]:
    """Samples of similar length together, so that padding and reading the weights again cost least in sum.

    With `whole`, all in one batch in their own order, on which depends how the means that prune a model are rounded.
    """
    if whole:
        yield list(calibration.samples)
        return
    samples: list[Sequence[int]] = sorted(calibration.samples, key=lambda sample: (-len(sample), sample))
    equal = any(".experts." in each.parameter for each in network.covered)
    ends = _ends([len(sample) for sample in samples], equal)
    for start, end in zip([0, *ends], ends, strict=False):
        yield samples[start:end]


def _ends(lengths: Sequence[int], equal: bool) -> list[int]:
    """Where batches end: those of the least cost, found from the last one back.

    Args:
        lengths: of the samples, longest first.
        equal: only samples of one length go together, where a router hides which tokens are padding.
    """
    costs, nexts = [0] * (len(lengths) + 1), [0] * len(lengths)
    for start in reversed(range(len(lengths))):
        width, best = lengths[start], None
        for end in range(start + 1, len(lengths) + 1):
            tokens = (end - start) * width
            if end > start + 1 and (tokens > _TOKENS_PER_BATCH or (equal and lengths[end - 1] != width)):
                break
            if best is None or tokens + _TOKENS_OF_READING + costs[end] < best:
                best, nexts[start] = tokens + _TOKENS_OF_READING + costs[end], end
        costs[start] = best or 0
    ends = [0]
    while ends[-1] < len(lengths):
        ends.append(nexts[ends[-1]])
    return ends[1:]


def _padded(samples: list[Sequence[int]]) -> tuple[torch.Tensor, list[int]]:
    """Token ids, padded on the right with 0, and the length of each sample."""
    ids = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
    return ids, [len(sample) for sample in samples]

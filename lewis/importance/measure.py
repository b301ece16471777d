"""Importance: the activation-weighted norm of every covered layer of one model.

Covered are the projections in the repeated blocks, as `lewis.models.network.module_tree` finds them. Everything else
(embeddings, norms, head, biases) is left to the recipe's `uncovered` policy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis.devices import one_thread
from lewis.errors import InputError, LewisError
from lewis.importance.calibration import Calibration
from lewis.importance.measured import Measured
from lewis.lazy_torch import torch
from lewis.models.broken import damaged
from lewis.models.dtypes import torch_dtype
from lewis.models.model import Model
from lewis.models.network.module_tree import Covered, Network
from lewis.models.network.network_class import input_embeddings
from lewis.progress import Report, silent
from lewis.recipe.schema import Importance
from lewis.threads import cores

if TYPE_CHECKING:
    from lewis.importance.batches import Batch
    from lewis.importance.second_moments import SecondMoments

logger = logging.getLogger(__name__)
SEMANTICS = "8"  # bump when the same inputs would give other numbers
_VALUES_AT_ONCE = 1 << 25  # elements of weights whose norms are computed together
Shapes = Mapping[str, tuple[int, ...]]
Means = Callable[[str, int], "torch.Tensor | None"]
"""(parameter, number of the set) -> mean of x_j^2, as `SecondMoments.means` gives it."""


def measure_sets(
    model: Model,
    calibrations: Sequence[Calibration],
    settings: Importance | None = None,
    *,
    device: str = "cpu",
    progress: Report = silent,
) -> list[Measured]:
    """Measure the importance of a model's layers on several calibration sets, in one pass without KV cache or logits.

        s_j    = mean over tokens of x_j^2      (`reduce: sum`: the sum over a sample's tokens, mean over samples)
        I(l,c) = || W * sqrt(s) ||_F = sqrt( sum_ij W_ij^2 s_j )      (Wanda's score, arXiv 2306.11695, as one norm)

    A block's weights are read when the pass reaches it, and dropped when the micro-batches of all sets have been
    through it, so that a model need not fit in memory: at any time, memory holds the embeddings, a block, the
    activations of one micro-batch, and the hidden states of those that wait. The latter take no more than the largest
    block's weights, or 64 MiB: further batches follow in another round, which reads the model again. With
    `prune_ratio`, each set is one batch in a round of its own. Padding is left out of all sums.

    Args:
        model: an opened checkpoint, or a LoRA expert.
        calibrations: token ids. The numbers of each, bit by bit, do not depend on the others.
        settings: of the pass.
        device: `cpu` (weights in fp32) or `cuda` (weights as stored).
        progress: called with ("measure", tokens done, tokens in all); a token half-way through the
            blocks counts as half done.

    Returns:
        For each set, I(l,c) of every covered layer and s of every covered tensor. A layer that no token reached (an
        expert that a router never chose) has no norm and no moments.

    Raises:
        InputError: if no layer is covered, or a token id is out of the vocabulary.
        LewisError: if activations are not finite, naming the layer.
    """
    from lewis.importance.second_moments import HiddenPaddingError

    given = (model, calibrations, settings or Importance(), device, progress)
    try:
        return _measure_sets(*given)
    except HiddenPaddingError as error:  # of models that add tokens of their own (LED), or route them (BLT)
        logger.info("%s: samples of different length go one after another: %s", model.folder, error)
        return _measure_sets(*given, equal=True)


def _measure_sets(
    model: Model,
    calibrations: Sequence[Calibration],
    settings: Importance,
    device: str,
    progress: Report,
    *,
    equal: bool = False,
) -> list[Measured]:
    """Do the work of `measure_sets`; with `equal`, no batch has padding."""
    from lewis.importance.batches import batches, groups
    from lewis.importance.second_moments import SecondMoments
    from lewis.importance.streaming import Streamed, forward
    from lewis.importance.wanda import PruneAfter

    dtype = torch.float32 if device == "cpu" else stored_dtype(model)
    network = network_of(model, dtype)
    for calibration in calibrations:
        check_samples(model, network, calibration)
    moments = SecondMoments(network, device, len(calibrations))
    pruned = settings.prune_ratio > 0
    made = batches(calibrations, network, whole=pruned, equal=equal)
    # A forward pass that waits holds two tensors of this width per token: the hidden states and the embeddings.
    per_token = 2 * input_embeddings(network.module).embedding_dim * dtype.itemsize
    done, total = 0, sum(calibration.tokens for calibration in calibrations)
    with ExitStack() as contexts, torch.inference_mode():
        contexts.enter_context(PruneAfter(network, moments, settings.prune_ratio))
        streamed = contexts.enter_context(Streamed(network, model, device, dtype, keep=not pruned))
        contexts.enter_context(moments)
        for group in groups(made, per_token, 0 if pruned else streamed.room):
            forwards = [partial(forward, network, batch.ids.to(device), batch.lengths) for batch in group]
            tokens = sum(batch.tokens for batch in group)
            for share in streamed.lock_step(forwards, partial(_begin, moments, group)):
                progress("measure", done + int(share * tokens), total)
            done += tokens
            progress("measure", done, total)
    return norms(model, network, moments.means, calibrations, settings.reduce)


def norms(
    model: Model, network: Network, means: Means, calibrations: Sequence[Calibration], reduce: str
) -> list[Measured]:
    """Compute the norms of a model's covered layers and their moments on each set, from measured means of x_j^2.

    With `reduce: sum` a norm is summed in fp32, as in the authors' code, which is off by 2e-5 for larger tensors.

    Args:
        model: the model whose weights are read.
        network: its modules.
        means: the means that were measured.
        calibrations: the sets.
        reduce: as in `Importance`.
    """
    found = [Measured({}, {}) for _ in calibrations]
    largest = max(sum(layer.parameters for layer in covered.layers) for covered in network.covered)
    lanes = min(cores(), max(1, _VALUES_AT_ONCE // largest))
    with ThreadPoolExecutor(lanes) as pool:
        of_each = pool.map(partial(_norms_of, model, means, calibrations, reduce), network.covered)
        for covered, of_sets in zip(network.covered, of_each, strict=True):
            for measured, (own, moments) in zip(found, of_sets, strict=True):
                measured.norms.update(own)
                if moments is not None:
                    measured.moments[covered.tensor] = moments
    for calibration, measured in zip(calibrations, found, strict=True):
        _warn_of_silent(model, network, calibration, measured)
    return found


def _norms_of(
    model: Model, means: Means, calibrations: Sequence[Calibration], reduce: str, covered: Covered
) -> list[tuple[dict[str, float | None], torch.Tensor | None]]:
    """Norms of the layers of a tensor, and its moments if it has some, for each set."""
    found, weights = list[tuple[dict[str, float | None], "torch.Tensor | None"]](), None
    with one_thread(), torch.inference_mode():
        for of, calibration in enumerate(calibrations):
            found_means = means(covered.parameter, of)
            own = found_means if found_means is None or covered.expert is None else found_means[covered.expert]
            if own is None or bool(own.isnan().all()):
                found.append((dict.fromkeys((layer.key for layer in covered.layers), None), None))
                continue
            factor = calibration.tokens / len(calibration.samples) if reduce == "sum" else 1.0
            s = _as_weights(own * factor, covered).to(torch.float32)
            weights = _read(model, covered) if weights is None else weights
            norms = dict[str, float | None]()
            for layer, cost in zip(covered.layers, row_sums(weights.square(), s, covered), strict=True):
                norm = float(cost) ** 0.5
                if reduce == "sum" and covered.rows == (None,) and not covered.stack:
                    norm = float(torch.norm(weights.abs() * s.sqrt()))
                if not norm < float("inf"):
                    raise _damaged(model, covered.tensor, s, weights)
                norms[layer.key] = norm
            fired = s.isnan().logical_not()  # a stacked expert that no token reached gets the mean of the others
            # Moments of matrices that lie in one tensor's rows would be as large as the weights: only norms are kept.
            found.append((norms, None if covered.stack else torch.where(fired, s, s[fired].mean())))
    model.done_with(covered.tensor)
    return found


def _read(model: Model, covered: Covered) -> torch.Tensor:
    """A tensor in fp32; matrices that lie one after another in its rows are stacked."""
    value = model.read(covered.tensor).to(torch.float32)
    return value.unflatten(0, (covered.stack, -1)) if covered.stack else value


def _warn_of_silent(model: Model, network: Network, calibration: Calibration, measured: Measured) -> None:
    """Log what has no moments: experts that got no token, and projections whose modules were never run."""
    silent = [each for each in network.covered if all(measured.norms[layer.key] is None for layer in each.layers)]
    experts = [each.tensor for each in silent if each.expert is not None or ".experts." in each.parameter]
    others = [each.tensor for each in silent if each.tensor not in experts]
    if experts:
        facts = (model.folder, calibration.name, len(experts), experts[0])
        logger.warning("%s on %s: no token was seen to reach %d tensors, such as %s: left out", *facts)
    if others:
        share = sum(layer.parameters for each in silent if each.tensor in others for layer in each.layers)
        logger.warning(
            "%s on %s: %d projections, such as %s, %.1f %% of the parameters, are not run as modules (the model uses "
            "their weights otherwise, or text does not go through them): they are left out, and follow `uncovered`",
            *(model.folder, calibration.name, len(others), others[0]),
            100 * share / max(sum(info.elements for info in model.tensors.values()), 1),
        )


def _damaged(model: Model, tensor: str, s: torch.Tensor, weights: torch.Tensor) -> LewisError:
    """The error for the first layer whose norm is not finite: are its weights or its activations the cause?"""
    if not bool(weights.isfinite().all()):
        return damaged(model, f"tensor {tensor!r} has values that are NaN or Inf")
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


def _as_weights(s: torch.Tensor, covered: Covered) -> torch.Tensor:
    """Moments (in,) or (experts, in) in a shape that broadcasts to the weights."""
    if s.dim() == 1:
        return s[:, None] if covered.transposed else s
    return s[:, :, None] if covered.transposed else s[:, None, :]


def network_of(model: Model, dtype: torch.dtype | None = None) -> Network:
    """The module tree of a model and the covered tensors; no weight is loaded.

    Args:
        model: an opened model.
        dtype: what it computes in; by default fp32.

    Raises:
        InputError: as `network_in`.
    """
    return network_in(model.home, model.shapes, dtype)


def network_in(folder: Path, tensors: Shapes | None = None, dtype: torch.dtype | None = None) -> Network:
    """`network_of` for a model that is not opened.

    Args:
        folder: of a model, for its config.json.
        tensors: name -> shape of those in the checkpoint, if known; modules that have none are not covered.
        dtype: what it computes in; by default fp32.

    Raises:
        InputError: if the model's class is unknown, or no layer is covered.
    """
    network = Network(folder, tensors, dtype or torch.float32)
    if not network.covered:
        raise InputError(
            f"{folder}: no covered layer: {type(network.module).__name__} has no projection in repeated blocks whose "
            "weight is in the checkpoint; LEWIS cannot guide it: leave the lewis block out"
        )
    return network


def stored_dtype(model: Model) -> torch.dtype:
    """The dtype of a model's largest tensor."""
    largest = max(model.tensors.values(), key=lambda info: info.elements)
    return torch_dtype(largest.dtype)


def check_samples(model: Model, network: Network, calibration: Calibration) -> None:
    """Raise InputError unless the model takes all tokens and samples of a set."""
    check_tokens(model, network, calibration)
    check_lengths(model, network, calibration)


def check_tokens(model: Model, network: Network, calibration: Calibration) -> None:
    """Raise InputError if a token of a set has no embedding in the model."""
    vocabulary = input_embeddings(network.module).num_embeddings
    largest = max(map(max, calibration.samples), default=0)
    if largest >= vocabulary:
        raise InputError(
            f"{model.folder}: token {largest} of set {calibration.name!r} is outside its {vocabulary} embeddings: the "
            "tokenizer of the base has more tokens than this model; resize its embeddings, or give texts without them"
        )


def check_lengths(model: Model, network: Network, calibration: Calibration) -> None:
    """Raise InputError if a sample of a set has more tokens than the model takes."""
    longest, limit = max(map(len, calibration.samples), default=0), context_length(network.module)
    if limit < longest:
        raise InputError(
            f"{model.folder}: a sample of set {calibration.name!r} has {longest} tokens, the model takes {limit}; "
            f"set lewis.calibrations.{calibration.name}.max_tokens to {limit} or less"
        )


def context_length(module: Any) -> float:
    """How many tokens of one text a network takes; infinity if its config sets no limit."""
    limit = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else math.inf


def _begin(moments: SecondMoments, group: Sequence[Batch], i: int) -> None:
    batch = group[i]
    moments.select(batch.of)
    moments.begin(batch.lengths, batch.ids.shape[1], batch.weights)

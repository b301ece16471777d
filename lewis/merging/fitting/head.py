"""Fit the head, which makes logits of the last hidden states, where an expert has other weights there than the base.

It has to give what each expert's head gives for the expert's own last hidden states on its calibration rows (RegMean,
arXiv 2212.09849, equation 3, with the ridge and prior of `lewis.methods.arithmetic.regression`). Often the head is the
input embedding, too. So it is fitted before the blocks: these are fitted to the inputs that the new embedding gives,
and bring the last hidden states close to the experts'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lewis.errors import InputError
from lewis.importance.workers import Workers
from lewis.lazy_torch import nn, torch
from lewis.merging.fitting.fitted import Fitted, Unwritten, rounded
from lewis.merging.fitting.losses import run_batches
from lewis.merging.fitting.passes import Pass
from lewis.merging.fitting.solver import damage
from lewis.merging.prepared import Prepared
from lewis.merging.settings import Expert
from lewis.methods.arithmetic.prior import prior_rows
from lewis.methods.arithmetic.regression import DUAL_ABOVE, Inputs
from lewis.methods.arithmetic.sums import slices
from lewis.methods.arithmetic.tokens import Rows
from lewis.models.dtypes import as_tensor
from lewis.models.network.module_tree import Network
from lewis.progress import Report

if TYPE_CHECKING:
    from lewis.importance.batches import Batch
    from lewis.models.model import Model

logger = logging.getLogger(__name__)
PART = 1 << 26  # elements of the head that are solved for at a time: 256 MiB in fp32


def fit_head(
    merge: Prepared, network: Network, fitted: Fitted, workers: Workers, tokens: int, progress: Report
) -> None:
    """Fit the head, unless it is fitted already, no expert has moved it, or the model does not run on text alone.

    In memory are the head of the output, the last hidden states of all rows, and a part of the head of each model.

    Args:
        merge: a merge that is fitted in forward order.
        network: of its base.
        fitted: takes the fitted tensor.
        workers: run the passes and the regression.
        tokens: of a batch, at most.
        progress: called with (losses, blocks done, blocks in all) for each expert.

    Raises:
        LewisError: naming the tensor, if hidden states or the result are not finite.
    """
    path, tensor = head_of(network, merge)
    if not tensor or tensor in fitted or not any(_moved(merge, expert, tensor) for expert in merge.experts):
        return
    logger.info("fitting %s, which makes the logits", tensor)
    try:
        hidden = [_hidden_states(expert, path, workers, tokens, progress) for expert in merge.experts]
    except InputError as error:  # BLIP-2, whose blocks run on text alone, but not its head
        logger.warning("%s is not fitted: %s", tensor, error)
        return
    fitted.add("head", {tensor: _solve(merge, tensor, hidden, workers)})


def head_of(network: Network, merge: Prepared) -> tuple[str, str]:
    """Return the path of the head's module and the name of its tensor; empty if it cannot be fitted."""
    head = network.module.get_output_embeddings()
    path = next((path for path, module in network.module.named_modules() if module is head), "")
    if type(head) is not nn.Linear or head.in_features > DUAL_ABOVE or not network.predicts_next_token:
        return "", ""
    names = network.same(f"{path}.weight")
    tensor = next((tensor for tensor, parameter in network.unconverted.items() if parameter in names), "")
    return (path, tensor) if tensor and merge.merges(tensor) else ("", "")


def _moved(merge: Prepared, expert: Expert, tensor: str) -> bool:
    (dtype, bits), (of_base, own) = merge.base.raw(tensor), expert.model.raw(tensor)
    found = dtype != of_base or not np.array_equal(bits, own)
    _unmap((merge.base, expert.model), tensor)
    return found


def _unmap(models: Iterable[Model], tensor: str) -> None:
    for model in models:
        model.done_with(tensor)


class _Reached(Exception):
    """A pass has come to the head."""


def _hidden_states(expert: Expert, path: str, workers: Workers, tokens: int, progress: Report) -> list[torch.Tensor]:
    """Run an expert on its rows up to the head; return what comes there, fp32 (tokens, hidden), weighed by token."""
    from lewis.importance.batches import batches
    from lewis.importance.measure import network_of
    from lewis.importance.streaming import blaming_the_model

    network = network_of(expert.model)
    found: dict[Batch, torch.Tensor] = {}

    def reach(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        run = Pass.current()
        assert run is not None
        rows = run.batch.rows_of(inputs[0], path)
        found[run.batch] = run.batch.weighted(rows, path).clone()
        raise _Reached

    def run(batch: Batch) -> None:
        with suppress(_Reached), blaming_the_model(network, "its blocks are fitted"):
            network.module(input_ids=batch.ids, use_cache=False)

    made = batches([expert.calibration] if expert.calibration else [], network, tokens=tokens)
    hook = network.module.get_submodule(path).register_forward_pre_hook(reach)
    try:
        run_batches(network, expert.model, made, run, workers, with_head=False, progress=progress)
    finally:
        hook.remove()
    return [found[batch] for batch in made]


def _rows_of(model: Model, tensor: str, width: int) -> Callable[[slice], torch.Tensor]:
    """Return a function that reads some rows of a tensor, in the dtype that it is stored in."""
    dtype, bits = model.raw(tensor)
    return lambda part: as_tensor(dtype, bits[part.start * width : part.stop * width].copy()).reshape(-1, width)


def _solve(merge: Prepared, tensor: str, hidden: Sequence[list[torch.Tensor]], workers: Workers) -> torch.Tensor:
    values = merge.parameters(tensor)
    anchor = Unwritten(merge).read(tensor)
    base, *weights = (_rows_of(model, tensor, anchor.shape[1]) for model in merge.models)
    parts = slices(len(anchor), max(1, PART // anchor.shape[1]))
    nothing = [torch.empty(0, anchor.shape[1])]
    experts = [
        Rows(rows or nothing, rows or nothing, weight) for rows, weight in zip(hidden, values["weight"], strict=True)
    ]

    def factor(i: int) -> torch.Tensor:
        """Return F with F^T F = D^T D of an expert's task vector D, fp32 (in, in)."""
        products = torch.zeros(anchor.shape[1], anchor.shape[1], dtype=torch.float64)
        for part in parts:
            moved = weights[i](part).float() - base(part).float()
            products += moved.T @ moved
            _unmap((merge.models[0], merge.models[i + 1]), tensor)
        sizes, directions = torch.linalg.eigh(products)
        return (directions * sizes.clamp_min(0).sqrt()).T.float().contiguous()

    solver = Inputs(experts, values["ridge"], workers, values["alpha"], bound=values["bound"])
    try:
        if values["prior"]:
            factors = workers([partial(factor, i) for i in range(len(weights))])
            solver.prior = prior_rows(experts, factors, values["prior"])
        for part in parts:
            known = [weight(part) for weight in weights]
            anchor[part] = rounded(merge.layout, tensor, solver.solve(anchor[part].float(), known))
            _unmap(merge.models, tensor)
    except ValueError as error:
        raise damage(merge, tensor, (weight(slice(0, len(anchor))) for weight in weights), hidden, error) from error
    return anchor

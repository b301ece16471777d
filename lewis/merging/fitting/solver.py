"""Fit one projection to the outputs of the experts, once the passes of all experts wait in front of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from lewis.errors import LewisError
from lewis.lazy_torch import torch
from lewis.merging.fitting.fitted import Unwritten
from lewis.merging.fitting.passes import Pair, Pass, Shared
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.bound import distance
from lewis.methods.arithmetic.prior import prior_rows
from lewis.methods.arithmetic.regression import DUAL_ABOVE, DUAL_TOKENS, Inputs
from lewis.methods.arithmetic.tokens import Rows
from lewis.models.lora.expert import LoraExpert
from lewis.models.names import feeds_other_tokens
from lewis.models.network.module_tree import Covered

logger = logging.getLogger(__name__)


class Solver:
    """Fits the projection that all passes wait for; what is computed from inputs is kept for those that share them."""

    def __init__(self, shared: Shared, places: Mapping[str, Covered], streams: Mapping[str, str]) -> None:
        """
        Args:
            shared: the merge, its models and the passes.
            places: path of a module that is fitted -> its tensor.
            streams: path of a module that writes into the residual stream -> of one whose input is the stream before.
        """
        self._shared, self._places, self._streams = shared, places, streams
        self._reach: dict[str, float] = {}  # of the last block
        self._held = self._solved = 0
        self._inputs: tuple[Any, Inputs] | None = None

    def forget(self) -> None:
        """Drop what was computed from the last inputs."""
        self._inputs = None

    def solve(
        self, place: str, covered: Covered, weights: Sequence[torch.Tensor], anchor: torch.Tensor
    ) -> torch.Tensor:
        """Fit the weight of the projection that the passes wait for.

        Args:
            place: path of the module.
            covered: its tensor.
            weights: the tensor in each expert, fp32.
            anchor: the tensor that the fit is pulled towards, fp32; overwritten.

        Returns:
            The fitted tensor, fp32.

        Raises:
            LewisError: naming the tensor, if inputs or the result are not finite.
        """
        name = covered.tensor
        values = self._shared.merge.parameters(name)
        setting = (values["alpha"], tuple(values["weight"]), feeds_other_tokens(place))
        moved = any(each.is_new for pairs in self._shared.pairs for pair in pairs for each in (pair.own, pair.merged))
        if self._inputs is None or self._inputs[0] != setting or moved:
            rows = self._rows(place, values["weight"])
            self._inputs = setting, Inputs(rows, values["ridge"], self._shared.workers, values["alpha"])
        self._inputs[1].ridge, self._inputs[1].bound = values["ridge"], values["bound"]
        if covered.transposed:
            anchor, weights = anchor.T.contiguous(), [weight.T.contiguous() for weight in weights]
        try:
            with torch.inference_mode():
                self._inputs[1].prior = self._prior(covered, values["prior"], weights)
                residual = values.get("residual", 0.0)
                whole = bool(residual) and place in self._streams and self._inputs[1].takes_outputs
                additions = self._additions(place, residual, whole)
                reach = partial(self._reach_of, place)
                value = self._inputs[1].solve(anchor, weights, additions, out=anchor, whole=whole, reach=reach)
        except ValueError as error:
            own = [[pair.own.rows for pair in pairs if pair.own.rows is not None] for pairs in self._shared.pairs]
            raise damage(self._shared.merge, name, weights, own, error) from error
        self._solved, self._held = self._solved + 1, self._held + self._inputs[1].held
        self._inputs[1].held = 0
        return value.T.contiguous() if covered.transposed else value

    def report(self) -> None:
        """Log how many fits the bound has held back."""
        if self._held:
            logger.info("parameters.bound holds back %d of %d fitted projections", self._held, self._solved)

    def _reach_of(self, place: str) -> float:
        """How far an expert is from the anchor in the block of a projection: the largest share of a tensor's norm."""
        block = next(path for path in self._shared.merged.network.blocks if place.startswith(f"{path}."))
        if block not in self._reach:
            merge, jobs, found = self._shared.merge, self._shared.workers, [0.0]
            for tensor in (each.tensor for path, each in self._places.items() if path.startswith(f"{block}.")):
                anchor = Unwritten(merge).read(tensor).float()
                size = distance(anchor, torch.zeros(1).expand_as(anchor), jobs)
                found += [distance(each.model.read(tensor), anchor, jobs) / size for each in merge.experts if size]
            self._reach = {block: max(found)}
        return self._reach[block]

    def _prior(self, covered: Covered, strength: float, weights: Sequence[torch.Tensor]) -> list[Rows]:
        if not strength or self._inputs is None:
            return []
        base = self._shared.spill.keep(self._shared.merge.base.read(covered.tensor), torch.float32)
        moved = moved_rows(self._shared.merge, covered.tensor, weights, base.T if covered.transposed else base)
        return prior_rows(self._inputs[1].experts, moved, strength)

    def _additions(self, place: str, residual: float, whole: bool) -> Sequence[list[torch.Tensor] | None]:
        """Return B_t (`regression`) of each expert: what the merged residual stream lacks, and the biases' difference.

        With `whole`, return Y_t: B_t and the expert's output, which its passes compute here and not a second time.
        """
        nothing = [None] * len(self._shared.experts)
        stream = self._streams.get(place) if residual else None
        bias = self._shared.merged.network.module.get_submodule(place).bias
        if stream is None and bias is None:
            return nothing
        found = [[torch.empty(0)] * len(pairs) for pairs in self._shared.pairs]

        def compare(expert: int, i: int, pair: Pair) -> None:
            missing = torch.zeros(1)
            if stream:
                own, merged = (
                    each.streams[stream] if each.taken is None else each.streams[stream][each.taken] for each in pair
                )
                missing = residual * (own - merged)
            module = self._shared.experts[expert].network.module.get_submodule(place)
            if whole:
                missing = missing + pair.own.run_ahead(module)
            if bias is not None:
                missing = missing + (-bias if whole else module.bias - bias)
            assert pair.own.rows is not None
            if pair.own.batch.weighs(place):
                missing = pair.own.batch.weighted(missing.expand(len(pair.own.rows), -1), place, pair.own.taken)
            found[expert][i] = self._shared.spill.keep(missing).expand(len(pair.own.rows), -1)

        self._shared.workers(
            [
                partial(compare, expert, i, pair)
                for expert, pairs in enumerate(self._shared.pairs)
                for i, pair in enumerate(pairs)
            ]
        )
        return found

    def _rows(self, place: str, weights: Sequence[float]) -> list[Rows]:
        """Return the projection's inputs for each expert's tokens, scaled by the weights of its calibration set."""

        def rows_of(each: Pass) -> torch.Tensor:
            assert each.rows is not None
            return self._shared.spill.keep(each.batch.weighted(each.rows, place, each.taken))

        found = []
        for pairs, weight in zip(self._shared.pairs, weights, strict=True):
            own, merged = ([rows_of(each) for each in passes] for passes in zip(*pairs, strict=True))
            found.append(Rows(merged, own, weight))
        return found


def moved_rows(
    merge: Prepared, tensor: str, weights: Sequence[torch.Tensor], base: torch.Tensor, *, part: bool = False
) -> list[torch.Tensor]:
    """Return each expert's rows F for the prior, F^T F = D^T D of its task vector D: an adapter's factor, or D itself.

    Args:
        merge: the merge of the experts.
        tensor: name of the tensor.
        weights: the tensor in each expert, fp32 (out, in).
        base: the tensor in the base, fp32 (out, in).
        part: whether `weights` and `base` are only a part of the tensor.

    Returns:
        fp32 (rows, in); of a very wide layer an even share of the rows.
    """
    found, most = [], DUAL_TOKENS // len(merge.experts)
    for expert, weight in zip(merge.experts, weights, strict=True):
        rows = None
        if not part and isinstance(expert.model, LoraExpert) and expert.model.base.key == merge.base.key:
            rows = expert.model.factor(tensor)
        rows = weight - base if rows is None else rows
        if base.shape[1] > DUAL_ABOVE and len(rows) > most:
            rows = rows[torch.arange(most) * len(rows) // most]
        found.append(rows)
    return found


def damage(
    merge: Prepared,
    tensor: str,
    weights: Iterable[torch.Tensor],
    rows: Iterable[Sequence[torch.Tensor]],
    error: ValueError,
) -> LewisError:
    """The error of a fit that met numbers that are not finite when squared: it names the first expert that has some.

    Args:
        merge: the merge.
        tensor: name of the tensor.
        weights: the tensor in each expert.
        rows: its inputs in each expert.
        error: what the regression raised.
    """
    for expert, weight, own in zip(merge.experts, weights, rows, strict=True):
        for what, tensors in (("its weights", [weight]), ("activations into it", own)):
            if not all(bool(each.float().square().sum().isfinite()) for each in tensors):
                return LewisError(
                    f"{tensor}: {what} in {expert.ref} are NaN, Inf or too large for fp32; that model is damaged"
                )
    return LewisError(f"{tensor}: {error}; a model is damaged")

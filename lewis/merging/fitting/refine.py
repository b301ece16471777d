"""Train what a fit leaves: the merged model learns what each expert predicts on that expert's own calibration rows.

A fit makes each projection alone give what the experts give. What it leaves, above all where task vectors are large,
is in how projections act together. So low-rank updates of the fitted projections are trained, all at once (LoRA, Hu et
al. 2021, arXiv 2106.09685, section 4.1): on a row, the merged model is to predict each answer token as the row's expert
does. The loss is the KL divergence from the expert's distribution to the merged model's (Hinton et al. 2015, arXiv
1503.02531, section 2, at temperature 1); labels are not used. Of each expert's distribution, the `TOP` most likely
tokens are kept, and the others count as one.

After each pass over the rows, the divergence on held-back rows decides: the best state is kept, which may be the fit
itself, and the first pass that brings nothing is the last.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, TypeVar

from lewis.devices import one_thread
from lewis.importance.calibration import Calibration
from lewis.importance.workers import Workers
from lewis.lazy_torch import nn, torch
from lewis.merging.fitting.fit import in_order
from lewis.merging.fitting.fitted import Fitted, Unwritten
from lewis.merging.fitting.losses import Course, Likely, Place, each_row
from lewis.merging.prepared import Prepared
from lewis.merging.settings import Expert
from lewis.progress import Report

logger = logging.getLogger(__name__)

T = TypeVar("T")
EACH = 2  # rows of each expert in a step
WARM_UP = 5  # steps in which the learning rate rises


class Row(NamedTuple):
    """A row, and what its expert predicts.

    Attributes:
        ids: token ids, int64 (tokens,).
        positions: the positions whose next token is predicted, int64 (predicted,).
        likely: the tokens that are most likely there.
        weight: how much the row counts, as its expert does.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    likely: Likely
    weight: float

    def copy(self) -> Row:
        """The same row in tensors of its own."""
        return Row(
            self.ids.clone(), self.positions.clone(), Likely(*(each.clone() for each in self.likely)), self.weight
        )


class Refined(Course):
    """What training brought, with a pass over the rows as a step.

    Divergences are means over the rows of each expert, and then over the experts by their weights.
    """

    def to_text(self) -> str:
        """What training brought, in a clause."""
        before, *after = (f"{each:.4f}" for each in self.divergence)
        if not self.taken:
            why = "hold on the held-back rows" if min(self.divergence) < self.divergence[0] else "help"
            return f"training after the fit is left out, since it did not {why}: divergence {before}, then {after[0]}"
        passes = "1 pass" if self.taken == 1 else f"{self.taken} passes"
        return f"trained for {passes} over the rows: divergence from the experts {before}, then {after[self.taken - 1]}"


def refine(merge: Prepared, fitted: Fitted, progress: Report, threads: int | None) -> tuple[Fitted, Refined | None]:
    """Train low-rank updates of the fitted tensors, as `merge.refine` says.

    In memory are the merged model in fp32, the updates with two moments each, and the activations of one row for each
    thread; the experts are read block by block.

    Args:
        merge: a merge with held-back rows, whose base predicts the next token.
        fitted: its fitted tensors.
        progress: called with (refine, work done, work in all).
        threads: by default one per core; any number gives the same bytes.

    Returns:
        The fitted tensors with the updates, or `fitted` itself if they bring nothing; and what training brought, None
        if nothing could be trained, or no expert that counts has held-back rows.

    Raises:
        LewisError: as `each_row`.
    """
    settings = merge.refine
    assert settings is not None
    passes = 1 + 3 * settings.epochs  # the experts' passes count 1, and each pass of the training 3
    weights, student = _weights(merge, fitted), Student(merge, fitted, settings.rank, threads)
    judged = any(weight and expert.held_back for expert, weight in zip(merge.experts, weights, strict=True))
    if not judged or not student.parameters:
        logger.warning(
            "lewis.refine: nothing is trained: expected a fitted projection that is neither stacked nor a router, and "
            "held-back rows of a model with a weight other than 0"
        )
        return fitted, None
    rows = [_rows(*each, threads) for each in zip(merge.experts, weights, strict=True)]
    own, back = zip(*rows, strict=True)
    progress("refine", 1, passes)
    with student:
        optimizer = torch.optim.AdamW(student.parameters, lr=settings.rate, weight_decay=0.0)
        steps = -(-max(map(len, own)) // EACH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, max(1, settings.epochs * steps)))
        draw, waiting = random.Random(0), [list[Row]() for _ in own]
        found, best = [student.divergence(back)], dict[str, tuple[torch.Tensor, torch.Tensor]]()
        for epoch in range(settings.epochs):
            for step in range(steps):
                student.learn([row for rows, left in zip(own, waiting, strict=True) for row in _next(rows, left, draw)])
                optimizer.step()
                schedule.step()
                progress("refine", 1 + 3 * epoch + 3 * (step + 1) // steps, passes)
            found.append(student.divergence(back))
            logger.info("pass %d over the rows: divergence %.5f on held-back rows", epoch + 1, found[-1])
            if found[-1] >= min(found[:-1]):
                break
            best = student.updates()
    taken = min(range(len(found)), key=found.__getitem__)
    return fitted.with_updates(best) if taken else fitted, Refined(tuple(found), taken)


def _share(steps: int, step: int) -> float:
    """The learning rate of a step as a share of the highest: a rise over `WARM_UP` steps, and a cosine down to 0."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _next(rows: Sequence[Row], left: list[Row], draw: random.Random) -> list[Row]:
    """Take the next `EACH` rows out of `left`, which is filled with all rows in a new order when it is empty."""
    taken = []
    for _ in range(EACH if rows else 0):
        if not left:
            left += draw.sample(rows, len(rows))
        taken.append(left.pop())
    return taken


def _weights(merge: Prepared, fitted: Fitted) -> list[float]:
    """How much each expert counts: its `weight`, the mean over the fitted tensors, as a share of the experts' mean."""
    each = [merge.parameters(name)["weight"] for name in merge.base.tensors if name in fitted]
    sums = [math.fsum(map(float, weights)) for weights in zip(*each, strict=True)]
    mean = math.fsum(sums) / len(sums)
    return [found / mean for found in sums] if mean else sums


def _rows(expert: Expert, weight: float, threads: int | None) -> list[list[Row]]:
    """Run an expert on the rows that it was fitted on, and on those held back, for what it predicts there.

    What counts are the answers, or all tokens where answers are not marked.
    """

    def predicted(_: Place, ids: torch.Tensor, logits: torch.Tensor, counts: torch.Tensor | None) -> Row | None:
        positions = torch.arange(len(logits)) if counts is None else counts.nonzero()[:, 0]
        return Row(ids, positions, Likely.of(logits[positions]), weight) if len(positions) else None

    if not weight:
        return [[], []]
    given = [(rows or Calibration("none", ())).of_answers for rows in (expert.calibration, expert.held_back)]
    found = each_row(expert.model, given, predicted, threads)
    with torch.inference_mode(False):  # what the passes made cannot take part in a backward pass
        return [[row.copy() for row in rows] for rows in found]


class Student:
    """The merged model with low-rank updates that can be trained; use as a context.

    Attributes:
        parameters: the matrices of the updates: A (rank, in) and B (out, rank) of each fitted projection, in turn.
    """

    def __init__(self, merge: Prepared, fitted: Fitted, rank: int, threads: int | None) -> None:
        from lewis.importance.measure import network_of
        from lewis.importance.streaming import Weights

        self._device, self._threads, self._contexts = merge.pass_device, threads, ExitStack()
        self._network = network_of(merge.base)
        self._of_positions = "logits_to_keep" in signature(self._network.module.forward).parameters
        self._weights = Weights(
            self._network, Unwritten(merge, fitted), self._device, torch.float32, partial(_normal, self._device)
        )
        places = {each.parameter.rpartition(".")[0]: each for each in in_order(self._network) if each.tensor in fitted}
        module = self._network.module.get_submodule
        self._places = {path: each for path, each in places.items() if _multiplies(module(path))}
        draw = torch.Generator().manual_seed(0)
        self.parameters: list[torch.Tensor] = []
        for each in self._places.values():
            outputs, inputs = self._network.empty(each.parameter).shape[:: -1 if each.transposed else 1]
            down = torch.randn(rank, inputs, generator=draw) / math.sqrt(inputs)
            for matrix in (down, torch.zeros(outputs, rank)):
                self.parameters.append(matrix.to(self._device).requires_grad_())

    def __enter__(self) -> Student:
        network = self._network
        self._contexts.enter_context(one_thread())
        self._workers = self._contexts.enter_context(Workers(self._threads if self._device == "cpu" else 1))
        self._weights.load_outside(with_head=True)
        self._weights.load(name for path in network.blocks for name in network.parameters_in(path))
        for i, path in enumerate(self._places):
            module = network.module.get_submodule(path)
            hook = partial(_add_update, self.parameters[2 * i], self.parameters[2 * i + 1])
            self._contexts.callback(module.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.close()

    def learn(self, rows: Sequence[Row]) -> None:
        """Set the gradients of `parameters`: those of the mean divergence of the rows, each by its weight."""

        def gradients(row: Row) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(row.weight * self._divergence(row) / len(rows), self.parameters)

        found = self._run([partial(gradients, row) for row in rows], grad=True)
        for parameter, *each in zip(self.parameters, *found, strict=True):
            parameter.grad = sum(each[1:], each[0])  # in the order of the rows, whatever thread was first

    def divergence(self, sets: Sequence[Sequence[Row]]) -> float:
        """The mean divergence from the experts, nats per predicted token: over the rows of a set, then over the sets.

        A set counts by the weight of its rows. Infinite if the model's numbers overflow.
        """

        def judge(row: Row) -> float:
            return float(self._divergence(row))

        found = iter(self._run([partial(judge, row) for rows in sets for row in rows], grad=False))
        means = [(sum(next(found) for _ in rows) / len(rows), rows[0].weight) for rows in sets if rows]
        mean = sum(mean * weight for mean, weight in means) / sum(weight for _, weight in means)
        return math.inf if math.isnan(mean) else mean

    def updates(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Tensor -> two matrices whose product is to be added to it; in fp32, on the CPU."""
        matrices = [each.detach().cpu().clone() for each in self.parameters]
        found = zip(self._places.values(), matrices[::2], matrices[1::2], strict=True)
        return {each.tensor: (down.T, up.T) if each.transposed else (up, down) for each, down, up in found}

    def _divergence(self, row: Row) -> torch.Tensor:
        ids, positions, *likely = (each.to(self._device) for each in (row.ids, row.positions, *row.likely))
        if self._of_positions:
            logits = self._network.module(input_ids=ids[None], use_cache=False, logits_to_keep=positions).logits[0]
        else:
            logits = self._network.module(input_ids=ids[None], use_cache=False).logits[0, positions]
        return Likely(*likely).divergence(logits).mean()

    def _run(self, jobs: Sequence[Callable[[], T]], *, grad: bool) -> list[T]:
        def in_mode(job: Callable[[], T]) -> T:
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                return job()

        return self._workers([partial(in_mode, job) for job in jobs])


def _multiplies(module: nn.Module) -> bool:
    """Whether a module does no more than multiply, and add a bias; some routers also choose among their outputs."""
    from transformers.pytorch_utils import Conv1D

    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _normal(device: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Copy a value, which may come from inference mode, for passes that are differentiated."""
    return torch.empty(value.shape, dtype=dtype or value.dtype, device=device).copy_(value)


def _add_update(
    down: torch.Tensor, up: torch.Tensor, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    """A forward hook of a projection: add what its update gives."""
    return output + inputs[0] @ down.T @ up.T

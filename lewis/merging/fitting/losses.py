"""Run a model on calibration rows for what it predicts there. The model need not be on disk, nor fit in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from lewis.devices import one_thread
from lewis.importance.calibration import Calibration
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.merging.fitting.passes import Pass, advance, stop
from lewis.models.network.module_tree import Network
from lewis.models.network.network_class import input_embeddings
from lewis.progress import Report, silent

if TYPE_CHECKING:
    from lewis.importance.batches import Batch

Found = TypeVar("Found")

Place = tuple[int, int]
"""A row of calibration sets: the number of its set, and its own in the order of `each_row`."""
_LEAST = 1e-7  # least probability of all other tokens together
_UNJUDGED = "give ridge a number, and set lewis.hold_back to false"
TOP = 64
LOGITS = 1 << 24  # logits of a batch at most: 64 MiB in fp32, unless one row alone has more


class RowLoss(NamedTuple):
    """The loss of one row.

    Attributes:
        nats: cross-entropy of the next token, summed over the tokens that are predicted, each by its weight.
        weight: the sum of their weights; without weights, their number.
        divergence: KL divergence from what an expert predicts, in nats, summed as `nats`; NaN if there is no expert.
    """

    nats: float
    weight: float
    divergence: float = math.nan


class Likely(NamedTuple):
    """The tokens that a model finds most likely at each position that it predicts.

    Attributes:
        logs: logarithms of the probabilities of the `TOP` most likely tokens, fp32 (predicted, TOP).
        tokens: the ids of these tokens, int64 (predicted, TOP).
    """

    logs: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Likely:
        """Find them in logits, fp32 (predicted, vocabulary)."""
        return cls(*logits.log_softmax(-1).topk(min(TOP, logits.shape[-1])))

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """The KL divergence from this distribution to that of logits, nats, fp32 (predicted,).

        All tokens that are not among the most likely ones count as one.
        """
        own = logits.float().log_softmax(-1).gather(-1, self.tokens)
        others, own_others = ((1 - each.exp().sum(-1)).clamp_min(_LEAST) for each in (self.logs, own))
        return (self.logs.exp() * (self.logs - own)).sum(-1) + others * (others.log() - own_others.log())


def predicts_next_token(model: Any) -> bool:
    """Whether a model, which reads like a checkpoint, predicts each token from those before it."""
    from lewis.importance.measure import network_of

    return network_of(model).predicts_next_token


def row_losses(
    model: Any,
    sets: Sequence[Calibration],
    threads: int | None = None,
    progress: Report = silent,
    *,
    note: dict[Place, Likely] | None = None,
    experts: Mapping[Place, Likely] | None = None,
) -> list[list[RowLoss]]:
    """Compute the loss of each row of each set, as `each_row`; rows without a predicted token that counts give none.

    Args:
        model, sets, threads, progress: as those of `each_row`.
        note: takes what the model finds likely where tokens count.
        experts: what the experts find likely there; then losses have a divergence from it.
    """

    def loss(place: Place, ids: torch.Tensor, logits: torch.Tensor, counts: torch.Tensor | None) -> RowLoss | None:
        wanted = ids[1:]
        if counts is None:
            nats = float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            found = RowLoss(nats, len(wanted))
        else:
            losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
            found = RowLoss(float((losses * counts).sum()), float(counts.sum()))
        if not found.weight:
            return None
        where = slice(None) if counts is None else counts > 0
        if note is not None:
            note[place] = Likely.of(logits[where])
        if experts is None:
            return found
        each = experts[place].divergence(logits[where])
        return found._replace(divergence=float((each if counts is None else each * counts[where]).sum()))

    return each_row(model, sets, loss, threads, progress)


def each_row(
    model: Any,
    sets: Sequence[Calibration],
    of_row: Callable[[Place, torch.Tensor, torch.Tensor, torch.Tensor | None], Found | None],
    threads: int | None = None,
    progress: Report = silent,
) -> list[list[Found]]:
    """Run a model on the rows of each set. Those of a set come longest first, in the same order for all models.

    In memory are what `run_batches` says, with the head.

    Args:
        model: a model that reads like a checkpoint.
        sets: the rows.
        of_row: what is wanted of a row, by its place, its token ids, int64 (tokens,), the logits for all tokens after
            the first, fp32 (tokens - 1, vocabulary), and how much each of these tokens counts, fp32 (tokens - 1,), None
            if all count alike. It is called in inference mode; for None the row is left out.
        threads: by default one per core; any number gives the same bits.
        progress: called with (losses, blocks done, blocks in all).

    Raises:
        InputError: if a row has more tokens than the model takes, or the model does not run on text alone.
        LewisError: if the model does not run its blocks in one order for every text.
    """
    from lewis.importance.batches import batches
    from lewis.importance.measure import check_lengths, network_of
    from lewis.importance.streaming import blaming_the_model

    network = network_of(model)
    for each in sets:
        check_lengths(model, network, each)
    found: dict[Batch, list[Found | None]] = {}

    def run(batch: Batch) -> None:
        with blaming_the_model(network, _UNJUDGED):
            logits = network.module(input_ids=batch.ids, use_cache=False).logits
        found[batch] = [
            of_row(
                (batch.of, begun[batch] + row),
                batch.ids[row, :length],
                logits[row, : length - 1].float(),
                None if batch.weights is None else batch.weights[row, 1:length],
            )
            for row, length in enumerate(batch.lengths)
        ]

    at_most = max(1, LOGITS // input_embeddings(network.module).num_embeddings)
    made = batches(sets, network, tokens=at_most)
    begun = {
        batch: sum(len(before.lengths) for before in made[:i] if before.of == batch.of) for i, batch in enumerate(made)
    }
    with one_thread(), Workers(threads) as workers:
        run_batches(network, model, made, run, workers, with_head=True, progress=progress)
    return [
        [row for batch in made if batch.of == of for row in found[batch] if row is not None]
        for of, _ in enumerate(sets)
    ]


def run_batches(
    network: Network,
    model: Any,
    made: Sequence[Batch],
    run: Callable[[Batch], None],
    workers: Workers,
    *,
    with_head: bool,
    progress: Report,
) -> None:
    """Run a model on batches side by side, block by block.

    At any time there are in memory: what lies outside of the blocks, one block, and the hidden states of all batches.

    Args:
        network: the model's, without weights.
        model: reads like a checkpoint.
        made: the batches.
        run: runs the network on one of them.
        workers: share out the batches.
        with_head: whether the head that makes logits runs.
        progress: called with (losses, blocks done, blocks in all).

    Raises:
        LewisError: if the model does not run its blocks in one order for every text.
    """
    from lewis.importance.streaming import Weights

    weights = Weights(network, model, "cpu", torch.float32)
    passes = [Pass(batch, partial(run, batch)) for batch in made]
    with ExitStack() as contexts:
        contexts.callback(lambda: workers.in_place([each.stop for each in passes]))
        weights.load_outside(with_head=with_head)
        for path, block in network.blocks.items():
            contexts.callback(block.register_forward_pre_hook(partial(stop, path, False)).remove)
        loaded: list[str] = []
        for done in itertools.count():
            progress("losses", min(done, len(network.blocks)), len(network.blocks))
            place = advance(passes, workers, "blocks", _UNJUDGED)
            weights.drop(loaded)
            if place is None:
                break
            loaded = list(network.parameters_in(place))
            workers([partial(weights.load, [name]) for name in loaded])


@dataclass(frozen=True)
class Course:
    """How a fit was changed in steps, and what these brought on the held-back rows.

    Attributes:
        divergence: from the experts, nats per predicted token: that of the fit, then that after each step.
        taken: how many of the steps the result has had; 0: the fit is kept as it was.
    """

    divergence: tuple[float, ...]
    taken: int

    def to_json(self) -> dict[str, Any]:
        """Return this as plain JSON data."""
        return {"divergence": [to_json(each) for each in self.divergence], "taken": self.taken}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read the data that `to_json` returned."""
        return cls(tuple(map(from_json, data["divergence"])), data["taken"])


def mean_loss(rows: Sequence[Sequence[RowLoss]]) -> float:
    """Nats per predicted token: the mean over the tokens of each set by their weights, then over the sets."""
    means = [sum(row.nats for row in each) / sum(row.weight for row in each) for each in rows if each]
    return sum(means) / max(len(means), 1)


def mean_divergence(rows: Sequence[Sequence[RowLoss]]) -> float:
    """Nats per predicted token from the experts, as `mean_loss`; infinite if a model's numbers overflow."""
    found = mean_loss([[row._replace(nats=row.divergence) for row in each] for each in rows])
    return math.inf if math.isnan(found) else found


def to_json(loss: float) -> float | None:
    """Convert a loss for JSON, which has no number that is not finite: None stands for it."""
    return loss if math.isfinite(loss) else None


def from_json(value: float | None) -> float:
    """Convert back what `to_json` returned; None becomes infinite."""
    return math.inf if value is None else value

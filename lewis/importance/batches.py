"""How calibration samples go through a model: which samples form a micro-batch, and which batches go in lock-step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from lewis.errors import LewisError
from lewis.importance.calibration import Calibration
from lewis.models.names import feeds_other_tokens
from lewis.models.network.module_tree import Network

TOKENS_PER_BATCH = 4096
_TOKENS_OF_A_BATCH = 100  # the fixed cost of a batch, in tokens: less on a CPU, more on a GPU


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one calibration set that go through a model together.

    Attributes:
        ids: token ids, int64 (samples, width), padded on the right with 0.
        lengths: of the samples.
        of: index of the set.
        weights: how much each token counts, fp32 (samples, width), 0 where it is padding; None: all alike.
    """

    ids: torch.Tensor
    lengths: list[int]
    of: int
    weights: torch.Tensor | None = None

    @classmethod
    def padded(cls, samples: Sequence[Sequence[int]], of: int, weights: Sequence[Sequence[float]] | None) -> "Batch":
        """Pad samples, and the weights of their tokens if there are some, to the width of the longest."""
        ids = pad_sequence([torch.tensor(sample, dtype=torch.long) for sample in samples], batch_first=True)
        rows = [torch.tensor(row, dtype=torch.float32) for row in weights or ()]
        counts = pad_sequence(rows, batch_first=True) if rows else None
        return cls(ids, [len(sample) for sample in samples], of, counts)

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        return sum(self.lengths)

    def weighs(self, path: str) -> bool:
        """Whether the tokens' weights apply in a module; not at keys and values, since later tokens read them."""
        return self.weights is not None and not feeds_other_tokens(path)

    def weighted(self, rows: torch.Tensor, path: str, taken: torch.Tensor | None = None) -> torch.Tensor:
        """Scale rows by the square roots of their tokens' weights, so that products of rows count as the tokens do.

        Args:
            rows: without padding, (tokens, features).
            path: of the module that they go into.
            taken: which of the real tokens the rows stand for, as ascending indices; None for all.

        Returns:
            fp32, of the same shape; the rows themselves if all count alike, or if it is unknown which tokens they are.
        """
        if self.weights is None or not self.weighs(path):
            return rows
        roots = torch.cat([row[:length] for row, length in zip(self.weights, self.lengths, strict=True)]).sqrt()
        roots = roots if taken is None else roots[taken]
        return rows * roots[:, None].to(rows.device) if len(roots) == len(rows) else rows

    def rows_of(self, inputs: torch.Tensor, place: str, taken: torch.Tensor | None = None) -> torch.Tensor:
        """The inputs of a module for this batch, without padding.

        Args:
            inputs: (samples, width, features), or of some of the tokens only, as a router sends them to an expert.
            place: path of the module.
            taken: which of the real tokens are wanted, as ascending indices; None for all.

        Returns:
            fp32 (tokens, features), a view of `inputs` where that is possible.

        Raises:
            LewisError: if it is unknown which of the inputs are padding.
        """
        width, flat = self.ids.shape[1], inputs.reshape(-1, inputs.shape[-1]).float()
        padded, samples = min(self.lengths) < width, len(self.lengths)
        turned = samples != width and inputs.shape[:2] == (width, samples)  # XLNet: (tokens, samples)
        if inputs.shape[:-1].numel() != self.ids.numel() or turned:
            if padded:
                raise LewisError(
                    f"{place}: gets {inputs.shape[:-1].numel()} of {self.ids.numel()} tokens, and which of them are "
                    "padding is unknown; this way of routing tokens to experts is not supported"
                )
            return flat
        rows = taken
        if padded:
            real = torch.arange(width)[None] < torch.tensor(self.lengths)[:, None]
            rows = real.reshape(-1).nonzero()[:, 0]
            rows = rows if taken is None else rows[taken]
        return flat if rows is None else flat[rows.to(flat.device)]


def batches(
    calibrations: Sequence[Calibration],
    network: Network,
    *,
    whole: bool = False,
    equal: bool = False,
    tokens: int | None = None,
) -> list[Batch]:
    """Batch samples of similar length within each set, so that padding and the number of batches cost least in sum.

    How a set is cut does not depend on the other sets, so that its results have the same bits with and without them.

    Args:
        calibrations: the sets.
        network: the network that the batches go through.
        whole: put each set into one batch, in its own order: the means that prune a model are rounded in that order.
        equal: put only samples of one length together; always done for experts of a mixture, or if text looks ahead.
        tokens: of a batch with its padding, at most, by default `TOKENS_PER_BATCH`; a longer sample goes alone.
    """
    if whole:
        return [Batch.padded(each.samples, of, each.factors) for of, each in enumerate(calibrations)]
    # Gemma's attention looks ahead if this is set, except in a padded batch, whose mask is causal.
    looks_ahead = bool(getattr(network.module.config.get_text_config(), "use_bidirectional_attention", False))
    equal = equal or looks_ahead or any(".experts." in each.parameter for each in network.covered)
    apart = _other_positions_from(network)
    made = []
    for of, calibration in enumerate(calibrations):
        samples, weights = calibration.samples, calibration.factors
        order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), samples[i], weights[i] if weights else ()))
        cuts = ends([len(samples[i]) for i in order], equal, apart, tokens)
        for start, end in zip([0, *cuts], cuts, strict=False):
            own = [weights[i] for i in order[start:end]] if weights else None
            made.append(Batch.padded([samples[i] for i in order[start:end]], of, own))
    return made


def _other_positions_from(network: Network) -> int:
    """The width beyond which LongRoPE (Phi-3) uses other frequencies for a whole batch; 0 for models without it."""
    found = getattr(network.module.config.get_text_config(), "rope_parameters", None) or {}
    long = isinstance(found, dict) and found.get("rope_type") == "longrope"
    return int(found["original_max_position_embeddings"]) if long else 0


def ends(lengths: Sequence[int], equal: bool, apart: int = 0, limit: int | None = None) -> list[int]:
    """The end index of each batch, for the least total cost; found by dynamic programming from the last sample back.

    Args:
        lengths: of the samples, longest first.
        equal: only samples of one length go together, where a router hides which tokens are padding.
        apart: samples that are longer than this do not go with those that are not.
        limit: tokens of a batch, with its padding.
    """
    limit = TOKENS_PER_BATCH if limit is None else limit
    costs, nexts = [0] * (len(lengths) + 1), [0] * len(lengths)
    for start in reversed(range(len(lengths))):
        width, best = lengths[start], None
        for end in range(start + 1, len(lengths) + 1):
            tokens, shortest = (end - start) * width, lengths[end - 1]
            other = (equal and shortest != width) or shortest <= apart < width
            if end > start + 1 and (other or tokens > limit):
                break
            if best is None or tokens + _TOKENS_OF_A_BATCH + costs[end] < best:
                best, nexts[start] = tokens + _TOKENS_OF_A_BATCH + costs[end], end
        costs[start] = best or 0
    found = [0]
    while found[-1] < len(lengths):
        found.append(nexts[found[-1]])
    return found[1:]


def groups(made: Sequence[Batch], bytes_per_token: int, room: int) -> Iterator[list[Batch]]:
    """Groups of batches, in order, that run in lock-step: their hidden states between two blocks fit into `room`.

    Args:
        made: the batches of all sets.
        bytes_per_token: bytes of hidden states that wait for each token.
        room: bytes; a batch that is larger goes alone.
    """
    group: list[Batch] = []
    waiting = 0
    for batch in made:
        own = batch.ids.numel() * bytes_per_token
        if group and waiting + own > room:
            yield group
            group, waiting = [], 0
        group.append(batch)
        waiting += own
    yield group

"""The pass that measures second-order statistics: for each covered projection the mean of x^T x of its inputs x.

All batches go through the model side by side, block by block. The inputs of a block's projections are summed up, and
written to disk while the passes go through the next block: so memory holds the weights of one block, the statistics of
one or two, the inputs of a few batches, and the hidden states of all tokens.

The batches do not depend on the number of threads, each goes through the model single-threaded, and the sums are cut
into jobs by their size only: so the numbers have the same bits for any number of threads (on the CPU).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lewis.devices import one_thread
from lewis.errors import LewisError
from lewis.importance import gram_files
from lewis.importance.calibration import Calibration
from lewis.importance.gram_files import Collected, FinishedFiles, Grams, packed_length
from lewis.importance.measure import check_samples, network_of, norms, stored_dtype
from lewis.importance.measured import Measured
from lewis.importance.passes import Pass, Watched, of_expert
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.methods.arithmetic.regression import DUAL_ABOVE, DUAL_TOKENS, keeps_rows
from lewis.models.model import Model
from lewis.models.network.module_tree import Network
from lewis.models.network.network_class import input_embeddings
from lewis.progress import Report, silent

if TYPE_CHECKING:
    from lewis.importance.streaming import Weights

logger = logging.getLogger(__name__)
TOKENS_PER_PASS = 512  # small batches share out better among threads, have less padding, and stay in the cache
_VALUES = 1 << 22  # elements that a batch has in the widest layer, at most


def measure_grams(
    model: Model,
    calibration: Calibration,
    folder: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Report = silent,
) -> dict[str, str]:
    """Measure second-order statistics of a model on one calibration set, except for blocks that `folder` has already.

    Args:
        model: an opened checkpoint, or a LoRA expert.
        calibration: token ids.
        folder: where the files go, one for each block; it exists.
        device: `cpu` (weights in fp32) or `cuda` (weights as stored).
        threads: of the CPU; by default one per core.
        progress: called with ("statistics", tokens done, tokens in all); a token half-way through the
            blocks counts as half done.

    Returns:
        File name -> SHA-256.

    Raises:
        InputError: if no layer is covered, or a token id is out of the vocabulary.
        LewisError: if activations are not finite, naming the projection.
    """
    from lewis.importance.batches import batches
    from lewis.importance.streaming import Weights, forward

    dtype = torch.float32 if device == "cpu" else stored_dtype(model)
    network = network_of(model, dtype)
    check_samples(model, network, calibration)
    made = batches([calibration], network, tokens=tokens_per_pass(network))
    made.sort(key=lambda batch: batch.ids.numel(), reverse=True)  # so batches that run side by side take equally long
    passes = [Pass(batch, partial(forward, network, batch.ids.to(device), batch.lengths)) for batch in made]
    with ExitStack() as contexts:
        contexts.enter_context(one_thread())
        workers = contexts.enter_context(Workers(threads if device == "cpu" else 1))
        contexts.callback(lambda: workers.in_place([each.stop for each in passes]))
        watched = contexts.enter_context(Watched(network))
        weights = Weights(network, model, device, dtype)
        weights.load_outside()
        writer = contexts.enter_context(ThreadPoolExecutor(1))
        walk = _Walk(weights, watched, passes, workers, writer, folder, calibration.tokens)
        for share in walk.blocks():
            progress("statistics", int(share * calibration.tokens), calibration.tokens)
    walk.files.remove_list()
    return walk.files.checksums


def tokens_per_pass(network: Network) -> int:
    """Tokens of a batch: `TOKENS_PER_PASS`, or fewer for a model with wide layers."""
    widest = max(max(network.empty(each.parameter).shape[-2:]) for each in network.covered)
    return max(64, min(TOKENS_PER_PASS, _VALUES // widest))


class _Walk:
    """Leads all passes through the model, block by block, and writes the statistics of each block."""

    def __init__(
        self,
        weights: Weights,
        watched: Watched,
        passes: list[Pass],
        workers: Workers,
        writer: Executor,
        folder: Path,
        tokens: int,
    ) -> None:
        self._weights, self._watched, self._passes, self._workers = weights, watched, passes, workers
        self._writer, self._folder, self._tokens = writer, folder, tokens
        self._written: Future[None] | None = None
        self._sums: list[Callable[[], None]] = []
        self._summed: Callable[[], None] | None = None
        self.files = FinishedFiles(folder)

    def blocks(self) -> Iterator[float]:
        """Go through the model; yields the share of the blocks that are done, after each."""
        network, done = self._weights.network, set[str]()
        self._go_on(self._passes)
        while path := next(filter(None, (each.place for each in self._passes)), None):
            if path in done:
                raise LewisError(
                    f"{network.folder}: it runs {path} twice, and the inputs of the two times cannot be distinguished; "
                    "use another merge_method than those that fit"
                )
            done.add(path)
            waiting = [each for each in self._passes if each.place == path]
            self._watched.notes = path not in self.files
            names = network.parameters_in(path)
            self._workers([partial(self._weights.load, [name]) for name in names])
            found = self._through(waiting)
            self._weights.drop(names)
            if self._watched.notes:
                self._summed = partial(self._write, path, *found)
            yield min(1.0, len(done) / len(network.blocks))
        self._workers(self._sums)
        self._hand_over()
        self._wait_for_writer()
        yield 1.0

    def _hand_over(self) -> None:
        """Give the sums of a block, which are complete, to the thread that writes."""
        if self._summed is not None:
            self._wait_for_writer()
            self._written, self._summed = self._writer.submit(self._summed), None

    def _wait_for_writer(self) -> None:
        if self._written is not None:
            self._written.result()

    def _go_on(self, some: Sequence[Pass], others: Sequence[Callable[[], None]] = ()) -> None:
        chosen = set(map(id, some))
        self._workers.in_place([each.go_on if id(each) in chosen else lambda: None for each in self._passes], others)

    def _through(self, waiting: Sequence[Pass]) -> tuple[dict[str, Collected], dict[str, str]]:
        """Run the passes through a block, a few at a time.

        The inputs that a pass recorded are summed while the next passes run, by threads whose own passes have ended.
        The last sums of a block are done during the first passes through the next block.

        Returns:
            The inputs of the block by name, and for each projection the name of its input.
        """
        inputs, sources = dict[str, Collected](), dict[str, str]()
        for start in range(0, len(waiting), self._workers.count):
            some = waiting[start : start + self._workers.count]
            self._go_on(some, self._sums)
            self._hand_over()
            parts, self._sums = dict[str, list[torch.Tensor]](), []
            for each in some:  # in their order, on which the rounding of the sums depends
                for name, rows in each.inputs.items():
                    parts.setdefault(name, []).extend(rows)
                for name, source in each.sources.items():
                    sources[name] = source if sources.get(name, source) == source else ""
                each.forget()
            for name, rows in parts.items():
                if name not in inputs:
                    inputs[name] = Collected(rows[0].shape[1], self._tokens)
                self._sums += inputs[name].add(rows)
        return inputs, sources

    def _write(self, path: str, inputs: Mapping[str, Collected], sources: Mapping[str, str]) -> None:
        try:
            self.files.add(gram_files.write(self._folder, path, inputs, sources))
        except ValueError as error:
            raise LewisError(
                f"{self._weights.model.folder}: activations into {str(error)!r} are NaN, Inf or too large for fp32; "
                "the model is damaged"
            ) from error


def measured_by(model: Model, calibration: Calibration, grams: Grams, reduce: str = "mean") -> Measured:
    """Compute a model's norms and second moments on one calibration set from its second-order statistics."""
    network = network_of(model)

    def means(parameter: str, _: int) -> torch.Tensor | None:
        shape = network.empty(parameter).shape
        if len(shape) < 3:
            return grams.squares(parameter).double() if parameter in grams else None
        names = [of_expert(parameter, expert) for expert in range(shape[0])]
        found = {name: grams.squares(name).double() for name in names if name in grams}
        if not found:
            return None
        unseen = torch.full_like(next(iter(found.values())), torch.nan)
        return torch.stack([found.get(name, unseen) for name in names])

    [measured] = norms(model, network, means, [calibration], reduce)
    return measured


def operations_per_second() -> float:
    """The number of fp32 operations that one core does per second, measured with a product of matrices."""
    with one_thread(), torch.inference_mode():
        square = torch.ones(1024, 1024)
        square @ square
        begun = time.perf_counter()
        square @ square
        return 2 * 1024**3 / (time.perf_counter() - begun)


def bytes_of(network: Network, tokens: int) -> int:
    """Bytes on disk that the statistics of a model take at most, as if no two projections shared their inputs.

    Args:
        network: its modules.
        tokens: of the calibration set. Of stacked experts, each is taken to see an even share, which takes most room.
    """
    return sum(each.stack * _bytes_of_input(each.size, each.tokens) for _, each in _stacks(network, tokens))


def operations_of(network: Network, tokens: int) -> float:
    """Floating-point operations of the pass, roughly: the products with the weights, and those of the inputs."""
    total = 0
    for parameter, each in _stacks(network, tokens):
        products = 0 if keeps_rows(each.size, each.tokens) else packed_length(each.size) * each.stack
        total += each.tokens * (network.empty(parameter).numel() + products)
    return 2.0 * total


def share_of_tokens(network: Network, parameter: str) -> float:
    """The share of all tokens that one of the matrices of a parameter sees, if a router sends out even shares."""
    return next(each.tokens for name, each in _stacks(network, 1 << 20) if name == parameter) / (1 << 20)


def memory_of(network: Network, tokens: int, threads: int) -> int:
    """Bytes of memory that the pass needs in addition to the weights, roughly.

    These are the statistics of two blocks (one is written while the next is measured), the hidden states of all tokens
    (and the embeddings that they began as), and for each thread what a batch leaves on its way through a block.
    """
    blocks = max(len(network.blocks), 1)
    inputs = sum(each.size * min(each.stack * each.tokens, tokens) / tokens for _, each in _stacks(network, tokens))
    hidden = input_embeddings(network.module).embedding_dim
    in_passes = 3 * threads * tokens_per_pass(network) * inputs / blocks
    return int(min(blocks, 2) * bytes_of(network, tokens) / blocks + 4 * (2 * tokens * hidden + in_passes))


class _Stack(NamedTuple):
    """A covered parameter: number of inputs, how many are stacked in it, and the tokens that each of them sees."""

    size: int
    stack: int
    tokens: int


def _stacks(network: Network, tokens: int) -> Iterator[tuple[str, _Stack]]:
    chosen = getattr(network.module.config.get_text_config(), "num_experts_per_tok", None) or 1
    for parameter, transposed in {each.parameter: each.transposed for each in network.covered}.items():
        shape = network.empty(parameter).shape
        stack = shape[0] if len(shape) == 3 else 1
        seen = -(-tokens * min(chosen, stack) // stack) if stack > 1 else tokens
        yield parameter, _Stack(shape[-2 if transposed else -1], stack, seen)


def _bytes_of_input(size: int, tokens: int) -> int:
    kept = min(tokens, DUAL_TOKENS) if size > DUAL_ABOVE else tokens
    return 4 * (size + (size * kept if keeps_rows(size, tokens) else packed_length(size)))

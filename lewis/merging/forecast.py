"""Forecast how long a merge takes and how much memory it needs, by merging a sample of it whose output is deleted.

Time grows with the number of elements. The memory of the compiled loops does not depend on the size of tensors. The
memory of a method's own function, if it takes a tensor as a whole, and of a LoRA expert, whose weights are computed,
grows with the largest tensor.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lewis import store
from lewis.devices import one_thread
from lewis.importance.grams import bytes_of, operations_per_second, share_of_tokens
from lewis.importance.measure import network_of
from lewis.lazy_torch import torch
from lewis.memory import LOADED, PeakMemory, anonymous_bytes
from lewis.merging.adapter import factorise, sides
from lewis.merging.engine.in_torch import PIECE, is_computed, is_whole
from lewis.merging.run import Merge
from lewis.methods import Method
from lewis.methods.arithmetic.regression import DUAL_ABOVE, DUAL_TOKENS
from lewis.models.dtypes import size_of
from lewis.models.files.writer import CheckpointWriter
from lewis.models.model import read_as
from lewis.models.network.module_tree import Network
from lewis.models.network.network_class import input_embeddings
from lewis.threads import cores

_WARM_UP = 1 << 20  # elements that are merged before the first sample, since a process is slow at first
_FIRST = 1 << 22  # elements of the first sample; each further one is four times as large
_ENOUGH = 0.3  # seconds: a sample that takes this long is the last


@dataclass(frozen=True)
class Forecast:
    """The time, memory and disk space that a merge will take.

    Attributes:
        seconds: wall time, without the start of the process, on a machine as busy as it is now.
        memory: bytes of anonymous memory at the peak.
        disk: bytes that it needs on disk while it runs, in addition to the output.
    """

    seconds: float
    memory: int
    disk: int = 0


def forecast(merge: Merge) -> Forecast:
    """Forecast a merge by doing larger and larger parts of it, until one takes long enough to extrapolate from.

    Raises:
        LewisError: as the merge.
    """
    from lewis.merging.fitting.fit import check_rows

    elements = {name: merge.base.tensors[name].elements for name in merge.layout}
    order = sorted(elements, key=lambda name: -elements[name])
    begun = time.perf_counter()
    _run(merge, order[-1:])
    loading = time.perf_counter() - begun  # time to load code, which delays the first tensor
    whole, limit = [name for name in order if _is_whole(merge, name)], _FIRST
    before = anonymous_bytes()
    _run(merge, _part(order, elements, _WARM_UP))
    while True:
        part = _part(order, elements, limit)
        sample = [name for name in part if name in whole] or whole[-1:]
        part += [name for name in sample if name not in part]
        begun = time.perf_counter()
        with PeakMemory() as memory:
            _run(merge, part)
        took = time.perf_counter() - begun
        if took >= _ENOUGH or limit >= merge.elements:
            break
        limit *= 4
    done, growth = sum(elements[name] for name in part), 1.0
    if whole:
        largest, tried = (sum(elements[name] for name in names[: cores()]) for names in (whole, sample))
        growth = max(min(largest, merge.budget.size) / max(tried, 1), 1)
    seconds, peak = loading + took * merge.elements / max(done, 1), int(before + growth * (memory.peak - before))
    disk = 0
    if merge.method.fits:
        network = network_of(merge.base)
        check_rows(merge, network)
        static, reading = merge.method.fits == "static", _seconds_to_read(merge, network)
        of_fit = _of_static_fit(merge, network) if static else _of_fit(merge, network, reading)
        parts = [*[of_fit] * merge.fit_count, _of_judging(merge, network, reading)]
        parts += [] if static else [_of_head(merge, network, reading)] * merge.fit_count
        parts += [_of_refining(merge, network, reading)] if merge.refine else []
        seconds += sum(each.seconds for each in parts)
        peak, disk = max(peak, *(each.memory for each in parts)), max(each.disk for each in parts)
    if merge.as_adapter:
        of_factors = _of_factors(merge)
        seconds, peak = seconds + of_factors.seconds, max(peak, of_factors.memory)
    return Forecast(seconds, peak, disk)


def _of_fit(merge: Merge, network: Network, reading: float) -> Forecast:
    """Forecast a fit in forward order by the number of tokens, the projections' sizes, and `_seconds_to_read`.

    Each token costs about 8.5 operations for each weight that is fitted: two passes, and the products of inputs. This
    was measured with SmolLM2-135M; how many operations a second there are is measured here.
    """
    from lewis.merging.fitting.fit import TOKENS_PER_PASS, extra_disk_bytes, in_order, paused_bytes
    from lewis.merging.fitting.losses import LOGITS
    from lewis.merging.fitting.spill import IN_MEMORY
    from lewis.merging.fitting.stacked_fit import stacks_of

    tokens = sum(expert.calibration.tokens for expert in merge.experts if expert.calibration)
    weights, solving = 0, 0
    for each in in_order(network):
        outputs, inputs = network.empty(each.parameter).shape[:: -1 if each.transposed else 1]
        known, weights = min(tokens, DUAL_TOKENS), weights + outputs * inputs
        products = (
            2 * known * inputs + 4 * known**2 if inputs > DUAL_ABOVE else (3 * len(merge.experts) + 4) * inputs**2
        )
        solving = max(solving, products + outputs * inputs + cores() * 3 * TOKENS_PER_PASS * max(outputs, inputs))
    stacked = [name for parameters in stacks_of(network, merge).values() for name in parameters]
    for name in stacked:
        weights += int(network.empty(name).numel() * share_of_tokens(network, name))
    if stacked:
        solving += len(merge.experts) * bytes_of(network, tokens) // (4 * len(network.blocks))
    paused = paused_bytes(merge, network)
    held = 4 * (cores() * 2 * LOGITS + solving) + (paused if paused <= IN_MEMORY else 0)
    held += _merged_embedding(merge, network, network.read_by_row())
    seconds = 8.5 * tokens * weights / (operations_per_second() * cores()) + (len(merge.experts) + 1) * reading
    return Forecast(seconds, LOADED + held, extra_disk_bytes(merge, network, paused))


def _of_head(merge: Merge, network: Network, reading: float) -> Forecast:
    """Forecast the fit of a head that experts may have moved: a pass of each expert, and the solution.

    Of a head (out, in), the task vectors' products and the solution take 8 out in^2 operations for each expert.
    """
    from lewis.merging.fitting.head import PART, head_of

    _, tensor = head_of(network, merge)
    if not tensor or not merge.may_move_head:
        return Forecast(0, 0)
    tokens, experts = sum(each.calibration.tokens for each in merge.experts if each.calibration), len(merge.experts)
    head, inputs = merge.base.tensors[tensor].elements, merge.base.tensors[tensor].shape[1]
    blocks = merge.elements - head
    operations = 2 * tokens * blocks + 8 * experts * head * inputs
    seconds = operations / (operations_per_second() * cores()) + experts * reading
    held = size_of(*merge.layout[tensor]) + 4 * (4 * min(head, PART) + tokens * inputs + 2 * experts * inputs**2)
    return Forecast(seconds, LOADED + held)


def _merged_embedding(merge: Merge, network: Network, by_row: Sequence[str]) -> int:
    """Bytes of the merged model's embedding if its passes read it by row; `by_row`: its names then, else empty."""
    return sum(size_of(*merge.layout[tensor]) for name in by_row[:1] for tensor in network.sources(name))


def _seconds_to_read(merge: Merge, network: Network) -> float:
    """Estimate the seconds to read an expert's weights once, in fp32, by reading its projection of median size."""
    sizes = sorted((merge.base.tensors[each.tensor].elements, each.tensor) for each in network.covered)
    elements, name = sizes[len(sizes) // 2]
    with one_thread():
        begun = time.perf_counter()
        read_as(merge.experts[0].model, name, torch.float32)
        took = time.perf_counter() - begun
    return took / elements * merge.elements / cores()


def _of_judging(merge: Merge, network: Network, reading: float) -> Forecast:
    """Forecast the runs on held-back rows: each expert runs its own; base, anchor and result run those of all.

    Where they choose how long the moves are, two steps are what is usual.

    In memory are the weights outside of the blocks and one block of one model; for the merged model also the embedding
    and, for each thread, one projection: of each expert whose weights are computed, or as it was fitted, in fp32.
    """
    from lewis.importance.memory import held_at_once
    from lewis.merging.fitting.losses import LOGITS

    sets = [expert.held_back for expert in merge.judging if expert.held_back]
    if not sets:
        return Forecast(0, 0)
    steps = 2 if merge.may_lengthen else 0
    tokens = (4 + steps) * sum(rows.tokens for rows in sets)
    seconds = 2 * tokens * merge.elements / (operations_per_second() * cores())
    seconds += (len(merge.experts) + 3 + steps) * reading
    held = 4 * held_at_once(network, with_head=True)
    held += _merged_embedding(merge, network, network.read_by_row(with_head=True))
    elements, largest = max((merge.base.tensors[each.tensor].elements, each.tensor) for each in network.covered)
    anchored = 2 + 4 * sum(expert.model.computes(largest) for expert in merge.experts)
    fitted = 6 + 4 * merge.may_lengthen
    held += cores() * elements * max(anchored, fitted)
    vocabulary = input_embeddings(network.module).num_embeddings
    logits = max(LOGITS, vocabulary * max(len(row) for rows in sets for row in rows.samples))
    return Forecast(seconds, LOADED + held + 8 * cores() * logits)


def _of_refining(merge: Merge, network: Network, reading: float) -> Forecast:
    """Forecast the training after a fit: the experts' passes, one forward and backward a row, and the judging.

    In memory are the weights in fp32, the updates, their moments and gradients, and what a backward pass needs of one
    row for each thread: about 16 hidden states and 4 states of the widest projection in each block, and the logits.
    """
    from lewis.merging.fitting.fit import in_order
    from lewis.merging.fitting.refine import EACH

    assert merge.refine is not None
    sets = [rows for expert in merge.experts for rows in (expert.calibration, expert.held_back) if rows]
    own = sum(expert.calibration.tokens for expert in merge.experts if expert.calibration)
    back = sum(rows.tokens for rows in sets) - own
    shapes = [network.empty(each.parameter).shape for each in in_order(network)]
    updates = merge.refine.rank * sum(map(sum, shapes))
    embedding = input_embeddings(network.module)
    each_token = len(network.blocks) * (16 * embedding.embedding_dim + 4 * max(map(max, shapes)))
    each_token += 4 * embedding.num_embeddings
    longest = max(len(row) for rows in sets for row in rows.samples)
    held = merge.elements + updates * (5 + EACH * len(merge.experts)) + cores() * longest * each_token
    operations = merge.elements * (2 * (own + back) + (5 * own + 2 * back) * merge.refine.epochs + 4 * back)
    seconds = operations / (operations_per_second() * cores()) + (len(merge.experts) + 2) * reading
    return Forecast(seconds, LOADED + 4 * held)


def _of_static_fit(merge: Merge, network: Network) -> Forecast:
    """Forecast a fit to statistics that have been measured already, by the sizes of the projections.

    Of a projection (out, in), the fit takes 2 out in^2 operations for each expert, twice as many in fp64 for the
    solution, and in^3 / 3 in fp64 for the factor of the inputs that it shares with others; in fp64 each counts twice.
    In memory are one projection of each model, as stored, the anchor whose place the result takes, and what is written.
    """
    operations, held = 0.0, 0
    for parameter, transposed in {each.parameter: each.transposed for each in network.covered}.items():
        shape = network.empty(parameter).shape
        outputs, inputs = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        known = min(inputs, DUAL_TOKENS) if inputs > DUAL_ABOVE else inputs
        stack = shape[0] if len(shape) == 3 else 1
        operations += stack * (outputs * inputs * known * (2 * len(merge.experts) + 8) + known**3 / 3)
        # Products of the inputs and of the task vectors in fp32, their sum and its factor in fp64; or rows, and
        # products of these in fp64.
        of_inputs = (
            4 * known * inputs + 16 * known**2 if inputs > DUAL_ABOVE else (8 * len(merge.experts) + 16) * inputs**2
        )
        held = max(held, of_inputs + 4 * (len(merge.experts) + 2) * shape.numel())
    return Forecast(operations / (operations_per_second() * cores()), LOADED + held)


def _of_factors(merge: Merge) -> Forecast:
    """Forecast the singular value decompositions for an adapter by the measured time of a small one.

    One of a tensor with a small side s and a large side l takes s * s * l operations, times a constant.
    """
    pairs = sides({name: shape for name, shape in merge.base.shapes.items() if merge.merges(name)})
    with one_thread(), torch.inference_mode():
        delta = torch.arange(256.0 * 256).sin_().reshape(256, 256)
        factorise(delta, None, None)
        begun = time.perf_counter()
        factorise(delta, None, None)
        per_operation = (time.perf_counter() - begun) / 256**3
    operations = sum(small * small * large for small, large in pairs)
    largest = max((small * large + 3 * small * small for small, large in pairs), default=0)
    return Forecast(per_operation * operations / cores(), LOADED + 20 * largest)


def without_models(method: Method, largest: int, experts: int) -> int:
    """Bytes of memory for a merge whose models are not on this disk yet; `largest`: elements of the largest tensor."""
    if method.compiled or method.coefficients:
        return 130_000_000
    by_rows = method.elementwise or method.by_rows
    # The base, each expert's weights and task vector, then a few temporaries, in fp32.
    return 400_000_000 + (PIECE if by_rows else largest) * 4 * (4 + 4 * experts)


def _part(order: list[str], elements: dict[str, int], limit: int) -> list[str]:
    """The largest tensors that together have at most `limit` elements; at least one."""
    part, left = [], limit
    for name in order:
        if elements[name] <= left:
            part.append(name)
            left -= elements[name]
    return part or order[-1:]


def _run(merge: Merge, names: Iterable[str]) -> None:
    folder = store.beside(store.home() / "forecast")
    folder.mkdir(parents=True)
    try:
        with CheckpointWriter(folder, {name: merge.layout[name] for name in names}, merge.size + 1) as writer:
            merge.write_tensors(writer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_whole(merge: Merge, name: str) -> bool:
    """Whether a tensor is whole in memory while it is merged."""
    if not merge.merges(name):
        return False
    maker = merge.maker_of(name)
    in_loops = merge.device == "cpu" and maker.compiles(name)
    return is_computed(maker, name) or (is_whole(maker, name) and not in_loops)

"""The compiled inner loops of a merge: they read and write raw bits, one block that fits the cache at a time.

They do the operations of the methods' torch functions in the same order, so that both give the same bytes; a test
compares them. numba compiles the loops once per machine and keeps the code in a cache, next to this file or in the
user's cache folder. It compiles again only when this file changes, so functions that call each other must all be in
this file. The loops take addresses instead of arrays, so that one compiled version serves any number of experts and any
mix of dtypes. They release Python's global lock.

Names that many functions share: a tensor is given by `addresses` and `kinds` (of the base, then of each expert), its
`size` and its `columns` (the last dimension); `start` is the number of an element in the flat tensor and `count` a
number of elements, at most BLOCK. A "score" is the size that elements are ranked by: |expert - base|, times a scale.
"""

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from lewis.methods.arithmetic.sparsify import SPREAD
from lewis.methods.arithmetic.streams import GAMMA, MIX_1, MIX_2
from lewis.methods.arithmetic.sums import BLOCK
from lewis.methods.loops import NEAREST, Combine

F32, F16, BF16 = 0, 1, 2
KINDS = {"F32": F32, "F16": F16, "BF16": BF16}
RUN = 32  # neighbouring elements that `sample` takes together
INFINITE = np.uint32(0x7F800000)  # the bits of infinity; the bits of every finite magnitude are less, as a whole number
MAGNITUDE = np.uint32(0x7FFFFFFF)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
NONE = np.uint32(0xFFFFFFFF)  # above the bits of all scores
SUM, ELECT, VOTE, CLAIM, SHARE, NEAR = (  # how task vectors are combined, as numbers that numba compiles in
    how.value for how in (Combine.SUM, Combine.ELECT, Combine.VOTE, Combine.CLAIM, Combine.SHARE, Combine.NEAR)
)

_options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    """Turn an address into a pointer; numba passes the typing context as the first argument."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), generate


_at: Any = _pointer


@njit(**_options)
def _brain(bits: Any) -> Any:
    """Convert the bits of a bf16 number to fp32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(**_options)
def _load(address: Any, kind: Any, start: Any, count: Any, out: Any) -> Any:
    """Read `count` elements of a tensor, from `start` on, into `out` as fp32; return whether one is not finite."""
    bits = out.view(np.uint32)
    largest = np.uint32(0)
    if kind == F32:
        wide = carray(_at(address + np.uint64(4 * start)), (count,), dtype=np.uint32)
        for i in range(count):
            bits[i] = wide[i]
    elif kind == BF16:
        brain = carray(_at(address + np.uint64(2 * start)), (count,), dtype=np.uint16)
        for i in range(count):
            bits[i] = np.uint32(brain[i]) << np.uint32(16)
    else:
        half = carray(_at(address + np.uint64(2 * start)), (count,), dtype=np.uint16)
        for i in range(count):
            magnitude = np.uint32(half[i]) & np.uint32(0x7FFF)
            largest = max(largest, magnitude)
            bits[i] = magnitude << np.uint32(13)
        for i in range(count):
            out[i] *= np.float32(2.0**112)  # the exponents' offsets differ by 112; exact, for subnormals too
        for i in range(count):
            bits[i] |= (np.uint32(half[i]) & np.uint32(0x8000)) << np.uint32(16)
        return largest >= np.uint32(0x7C00)
    for i in range(count):
        largest = max(largest, bits[i] & MAGNITUDE)
    return largest >= INFINITE


@njit(**_options)
def _store(values: Any, count: Any, address: Any, kind: Any, start: Any) -> Any:
    """Round fp32 values to a dtype, ties to even, and write them to `address`; return whether one is not finite."""
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    if kind == F32:
        wide = carray(_at(address + np.uint64(4 * start)), (count,), dtype=np.uint32)
        for i in range(count):
            wide[i] = bits[i]
            largest = max(largest, bits[i] & MAGNITUDE)
        return largest >= INFINITE
    narrow = carray(_at(address + np.uint64(2 * start)), (count,), dtype=np.uint16)
    if kind == BF16:
        for i in range(count):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            rounded = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            narrow[i] = np.uint16(rounded)
            # Rounding up could turn a NaN into a number, so the unrounded bits are checked too.
            largest = max(largest, max(np.uint32(rounded & 0x7FFF), np.uint32((bits[i] & MAGNITUDE) >> 16)))
        return largest >= np.uint32(0x7F80)
    small = np.empty(count, np.float32)
    small_bits = small.view(np.uint32)
    for i in range(count):
        # From 0.5 on, the last place of fp32 numbers is fp16's smallest number: the sum is rounded to that.
        small[i] = abs(values[i]) + np.float32(0.5)
    for i in range(count):
        magnitude = bits[i] & MAGNITUDE
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        rounded = ((magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)) & np.uint32(0x7FFFF)
        if magnitude < np.uint32(0x38800000):
            rounded = small_bits[i] - np.uint32(0x3F000000)
        if magnitude >= np.uint32(0x477FF000):
            rounded = np.uint32(0x7C00)
        narrow[i] = np.uint16(rounded | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))
        largest = max(largest, np.uint32(rounded))
    return largest >= np.uint32(0x7C00)


@njit(**_options)
def _times(values: Any, count: Any, start: Any, columns: Any, scale: Any) -> None:
    """Multiply elements by fp32 factors.

    `scale` is 0 for no factors, or the address of three int64: the address of the factors; how many consecutive rows
    have the same factors, 0 if all have; and how many factors a row has, which is `columns`, or 1 for the whole row.
    """
    if scale == 0:
        return
    layout, row = carray(_at(scale), (3,), dtype=np.int64), start // columns
    address, height, width = layout[0], layout[1], layout[2]
    done, column = 0, start - row * columns
    while done < count:
        length = min(columns - column, count - done)
        part, first = values[done : done + length], address
        if height > 0:
            first += 4 * width * (row // height)
        if width == 1:
            factor = carray(_at(first), (1,), dtype=np.float32)[0]
            for i in range(length):
                part[i] *= factor
        else:
            factors = carray(_at(first + 4 * column), (length,), dtype=np.float32)
            for i in range(length):
                part[i] *= factors[i]
        done, row, column = done + length, row + 1, 0


@njit(**_options)
def _scores(base: Any, own: Any, start: Any, count: Any, columns: Any, scale: Any, score: Any) -> None:
    """The score of each element: |own - base|, times its scale."""
    for i in range(count):
        score[i] = abs(own[i] - base[i])
    _times(score, count, start, columns, scale)


@njit("void(uint64,int64,uint64,int64,int64,int64,uint64,int64,float32[::1])", **_options)
def sample(
    base: Any, base_kind: Any, own: Any, own_kind: Any, size: Any, columns: Any, scale: Any, step: Any, out: Any
) -> None:
    """Fill `out` with the scores of runs of RUN neighbours, one run every `step` elements."""
    base_values, own_values = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    for number in range(out.size // RUN):
        start = number * step
        _load(base, base_kind, start, RUN, base_values)
        _load(own, own_kind, start, RUN, own_values)
        _scores(base_values, own_values, start, RUN, columns, scale, out[number * RUN : (number + 1) * RUN])


@njit("uint32(uint32[::1],int64)", **_options)
def nth(scores: Any, place: Any) -> Any:
    """Find the score at a place, from 0, in ascending order. Scores are given by their bits, whose highest is 0.

    Three rounds count a third of the bits each, since most scores of bf16 models are tied, which slows partitioning.
    """
    counts = np.empty(2048, np.int64)
    known, prefix = np.uint32(0), np.uint32(0)
    for shift in (20, 10, 0):
        counts[:] = 0
        for i in range(scores.size):
            if (scores[i] & known) == prefix:
                counts[(scores[i] >> np.uint32(shift)) & np.uint32(2047 if shift == 20 else 1023)] += 1
        bucket = 0
        while place >= counts[bucket]:
            place -= counts[bucket]
            bucket += 1
        known |= np.uint32(2047 if shift == 20 else 1023) << np.uint32(shift)
        prefix |= np.uint32(bucket) << np.uint32(shift)
    return prefix


@njit("UniTuple(int64,2)(uint32[::1],int64[::1],uint32)", **_options)
def order_ties(scores: Any, places: Any, threshold: Any) -> Any:
    """Count the scores above a threshold and the scores that equal it.

    `places` holds the element numbers of the scores. Its first items are overwritten by the places, in the order of
    ties, of the equal scores, as uint64.
    """
    orders, above, ties = places.view(np.uint64), np.int64(0), np.int64(0)
    for i in range(scores.size):
        order = np.uint64(places[i]) * SPREAD
        above += scores[i] > threshold
        if scores[i] == threshold:
            orders[ties] = order
            ties += 1
    return above, ties


@njit(
    "UniTuple(int64,3)(uint64,int64,uint64,int64,int64,int64,uint64,uint32,uint32,uint32[::1],int64[::1])", **_options
)
def scan(
    base: Any, base_kind: Any, own: Any, own_kind: Any, size: Any, columns: Any, scale: Any, low: Any, high: Any,
    found: Any, places: Any,
) -> Any:  # fmt: skip
    """Look for scores whose bits, as a whole number, lie in [low, high].

    Returns:
        How many scores are above `high`, how many are inside, and how many of those inside were written: their bits to
        `found`, their element numbers to `places`. A block for which `found` may have too little room is counted, and
        not written.
    """
    base_values, own_values = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    score, hits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint8)
    bits, eight = score.view(np.uint32), hits.view(np.uint64)
    plain = base_kind == BF16 and own_kind == BF16 and scale == 0  # the usual case: a single loop is twice as fast
    above = inside = kept = np.int64(0)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        over, reaching = np.uint32(0), np.uint32(0)
        if plain:
            first = carray(_at(base + np.uint64(2 * start)), (count,), dtype=np.uint16)
            second = carray(_at(own + np.uint64(2 * start)), (count,), dtype=np.uint16)
            for i in range(count):
                moved = abs(_brain(second[i]) - _brain(first[i]))
                size_bits = np.float32(moved).view(np.uint32)
                bits[i] = size_bits
                over += np.uint32(size_bits > high)
                reaching += np.uint32(size_bits >= low)
        else:
            _load(base, base_kind, start, count, base_values)
            _load(own, own_kind, start, count, own_values)
            _scores(base_values, own_values, start, count, columns, scale, score)
            for i in range(count):
                over += np.uint32(bits[i] > high)
                reaching += np.uint32(bits[i] >= low)
        above += over
        inside += np.int64(reaching) - np.int64(over)
        if reaching > over and kept + BLOCK <= found.size:
            for i in range(count):
                hits[i] = (bits[i] >= low) & (bits[i] <= high)
            for i in range(count, BLOCK):
                hits[i] = 0
            for word in range((count + 7) // 8):
                if eight[word]:  # few words have a hit, so most elements are skipped
                    for i in range(8 * word, 8 * word + 8):
                        found[kept] = bits[i]
                        places[kept] = start + i
                        kept += hits[i]
    return above, inside, kept


@njit("UniTuple(int64,3)(uint64,int64,uint64,int64,int64,int64,uint64,uint32,uint64,uint64,uint64[::1])", **_options)
def scan_ties(
    base: Any, base_kind: Any, own: Any, own_kind: Any, size: Any, columns: Any, scale: Any, tie: Any, low: Any,
    high: Any, found: Any,
) -> Any:  # fmt: skip
    """Look for scores with the bits `tie` whose place in the order of ties lies in [low, high].

    Returns:
        How many places are before, how many are inside, and how many of these were written to `found`, as in `scan`.
    """
    base_values, own_values = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    score = np.empty(BLOCK, np.float32)
    bits = score.view(np.uint32)
    before = inside = kept = np.int64(0)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        _load(base, base_kind, start, count, base_values)
        _load(own, own_kind, start, count, own_values)
        _scores(base_values, own_values, start, count, columns, scale, score)
        fits = kept + BLOCK <= found.size
        for i in range(count):
            if bits[i] == tie:
                order = np.uint64(start + i) * SPREAD
                before += np.int64(order < low)
                if low <= order <= high:
                    inside += 1
                    if fits:
                        found[kept] = order
                        kept += 1
    return before, inside, kept


@njit(**_options)
def _uniform(key: Any, place: Any) -> Any:
    """The random number at `place` of `streams.Stream(key)`."""
    z = key + np.uint64(place + 1) * GAMMA
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    z = z ^ (z >> np.uint64(31))
    return np.float32(z >> np.uint64(40)) * np.float32(2.0**-24)


@njit(**_options)
def _keep(score: Any, start: Any, count: Any, threshold: Any, cut: Any, delta: Any) -> None:
    """Set an element of `delta` to 0 if its score is below the threshold, or equals it and comes after the cut."""
    bits = score.view(np.uint32)
    if cut == ALL:
        for i in range(count):
            value = delta[i]
            delta[i] = value if bits[i] >= threshold else np.float32(0.0)
    else:
        for i in range(count):
            wins = (bits[i] == threshold) & (np.uint64(start + i) * SPREAD <= cut)
            value = delta[i]
            delta[i] = value if (bits[i] > threshold) | wins else np.float32(0.0)


@njit(**_options)
def _leave_out(score: Any, start: Any, count: Any, threshold: Any, cut: Any, delta: Any) -> None:
    """Set an element of `delta` to 0 if `_keep` would keep it."""
    bits = score.view(np.uint32)
    for i in range(count):
        first = (bits[i] > threshold) | ((bits[i] == threshold) & (np.uint64(start + i) * SPREAD <= cut))
        value = delta[i]
        delta[i] = np.float32(0.0) if first else value


@njit(**_options)
def _between(
    base: Any, own: Any, start: Any, count: Any, columns: Any, scale: Any, thresholds: Any, cuts: Any, score: Any,
    delta: Any,
) -> None:  # fmt: skip
    """Set an element of `delta` to 0 unless it lies in the first cut and not in the second."""
    below, above = thresholds[0] > 0 or cuts[0] != ALL, thresholds[1] != NONE
    if below or above:
        _scores(base, own, start, count, columns, scale, score)
    if below:
        _keep(score, start, count, thresholds[0], cuts[0], delta)
    if above:
        _leave_out(score, start, count, thresholds[1], cuts[1], delta)


@njit(**_options)
def _mask(address: Any, start: Any, count: Any, delta: Any) -> None:
    """Set an element of `delta` to 0 if its byte of a mask is 0."""
    kept = carray(_at(address + np.uint64(start)), (count,), dtype=np.uint8)
    for i in range(count):
        value = delta[i]
        delta[i] = value if kept[i] != 0 else np.float32(0.0)


@njit(**_options)
def _drop(start: Any, count: Any, key: Any, density: Any, delta: Any) -> None:
    """Set an element of `delta` to 0 if its random number is not below the density."""
    for i in range(count):
        value = delta[i]
        delta[i] = value if _uniform(key, start + i) < density else np.float32(0.0)


@njit(**_options)
def _block_sum(values: Any, count: Any, halves: Any) -> float:
    """Sum the magnitudes of a block in fp64: add its second half to its first until one is left, as `sums.total`."""
    width, quarter = BLOCK // 2, BLOCK // 4
    if count == BLOCK:  # the first two rounds in one loop
        for i in range(quarter):
            even = np.float64(abs(values[i])) + np.float64(abs(values[2 * quarter + i]))
            odd = np.float64(abs(values[quarter + i])) + np.float64(abs(values[3 * quarter + i]))
            halves[i] = even + odd
        width = quarter // 2
    else:
        for i in range(count):
            halves[i] = np.float64(abs(values[i]))
        for i in range(count, BLOCK):
            halves[i] = 0.0
    while width > 0:
        for i in range(width):
            halves[i] += halves[width + i]
        width //= 2
    return float(halves[0])


@njit(
    "void(uint64,int64,uint64,int64,int64,int64,uint64,uint32[::1],uint64[::1],boolean,uint64,float32,uint64,int64,"
    "float64[::1],float64[::1])",
    **_options,
)
def norms(
    base: Any, base_kind: Any, own: Any, own_kind: Any, size: Any, columns: Any, scale: Any, thresholds: Any, cuts: Any,
    dropping: Any, key: Any, density: Any, mask: Any, begin: Any, whole: Any, kept: Any,
) -> None:  # fmt: skip
    """Compute the L1 norm of each block of a task vector from element `begin` on, before and after sparsification.

    The results go to `whole` and `kept`. The arguments of the sparsification are those of `merge_task_vectors`.
    """
    base_values, own_values = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    delta, score, halves = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
    for number in range(whole.size):
        start = begin + number * BLOCK
        count = min(BLOCK, size - start)
        _load(base, base_kind, start, count, base_values)
        _load(own, own_kind, start, count, own_values)
        for i in range(count):
            delta[i] = own_values[i] - base_values[i]
        whole[number] = _block_sum(delta, count, halves)
        if mask != 0:
            _mask(mask, start - begin, count, delta)
        elif dropping:
            _drop(start, count, key, density, delta)
        else:
            _between(base_values, own_values, start, count, columns, scale, thresholds, cuts, score, delta)
        kept[number] = _block_sum(delta, count, halves)


@njit(**_options)
def _block_dot(first: Any, second: Any, count: Any, halves: Any) -> float:
    """The dot product of two blocks in fp64, summed by adding the second half to the first, as in `sums.gram`."""
    for i in range(count):
        halves[i] = np.float64(first[i]) * np.float64(second[i])
    for i in range(count, BLOCK):
        halves[i] = 0.0
    width = BLOCK // 2
    while width > 0:
        for i in range(width):
            halves[i] += halves[width + i]
        width //= 2
    return float(halves[0])


@njit("void(uint64[::1],int64[::1],int64,boolean,int64[:,::1],uint64,int64,float64[:,::1])", **_options)
def dots(
    addresses: Any, kinds: Any, size: Any, relative: Any, pairs: Any, mask: Any, begin: Any, out: Any
) -> None:  # fmt: skip
    """Compute the dot products of pairs of models in each block from element `begin` on: fp64, (blocks, pairs).

    With `relative`, the products are of the models' differences to the first model, after the mask if there is one.
    """
    models = addresses.size
    own, halves = np.empty((models, BLOCK), np.float32), np.empty(BLOCK, np.float64)
    for number in range(out.shape[0]):
        start = begin + number * BLOCK
        count = min(BLOCK, size - start)
        for m in range(models):
            values = own[m]
            _load(addresses[m], kinds[m], start, count, values)
            if relative and m > 0:
                for i in range(count):
                    values[i] -= own[0, i]
                if mask != 0:
                    _mask(mask, start - begin, count, values)
        for pair in range(pairs.shape[0]):
            out[number, pair] = _block_dot(own[pairs[pair, 0]], own[pairs[pair, 1]], count, halves)


@njit("void(uint64[::1],int64[::1],int64,float32[::1])", **_options)
def variances(addresses: Any, kinds: Any, start: Any, out: Any) -> None:
    """Compute for each element from `start` on the variance, over the experts, of the difference to the base."""
    experts = addresses.size - 1
    base, moved = np.empty(BLOCK, np.float32), np.empty((experts, BLOCK), np.float32)
    mean, squares = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    for first in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - first)
        _load(addresses[0], kinds[0], start + first, count, base)
        for e in range(experts):
            vector = moved[e]
            _load(addresses[e + 1], kinds[e + 1], start + first, count, vector)
            for i in range(count):
                vector[i] -= base[i]
                mean[i] = np.float64(vector[i]) + (mean[i] if e else 0.0)
        for i in range(count):
            mean[i] /= experts
        for e in range(experts):
            vector = moved[e]
            for i in range(count):
                away = np.float64(vector[i]) - mean[i]
                squares[i] = away * away + (squares[i] if e else 0.0)
        for i in range(count):
            out[first + i] = np.float32(squares[i] / experts)


@njit("void(uint64,int64,uint64,int64,int64,int64,uint64,int64,uint64[:,::1])", **_options)
def sort_keys(
    base: Any, base_kind: Any, own: Any, own_kind: Any, size: Any, columns: Any, scale: Any, begin: Any, out: Any
) -> None:
    """Compute for each element from `begin` on the key to sort its row by: the bits of its score, then its column."""
    base_values, own_values = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    score = np.empty(BLOCK, np.float32)
    bits, flat, column = score.view(np.uint32), out.reshape(-1), 0
    for first in range(0, flat.size, BLOCK):
        count = min(BLOCK, flat.size - first)
        _load(base, base_kind, begin + first, count, base_values)
        _load(own, own_kind, begin + first, count, own_values)
        _scores(base_values, own_values, begin + first, count, columns, scale, score)
        for i in range(count):
            flat[first + i] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(column)
            column = column + 1 if column + 1 < columns else 0


@njit("void(uint64[:,::1],int64,uint64,float32,float32,uint8[::1])", **_options)
def draw_by_rank(ordered: Any, begin: Any, key: Any, least: Any, width: Any, kept: Any) -> None:
    """Draw which elements of rows are kept, as `sparsify.drop_by_rank`; `ordered` holds the sorted keys of each row."""
    rows, columns = ordered.shape
    upper, lower = np.uint64(32), np.uint64(0xFFFFFFFF)
    for row in range(rows):
        first = 0
        while first < columns:
            last = first
            while last + 1 < columns and ordered[row, last + 1] >> upper == ordered[row, first] >> upper:
                last += 1
            rank = np.float32(0.5)
            if columns > 1:
                rank = np.float32(first + last) / np.float32(2 * (columns - 1))
            chance = least + rank * width
            for i in range(first, last + 1):
                place = row * columns + np.int64(ordered[row, i] & lower)
                kept[place] = _uniform(key, begin + place) < chance
            first = last + 1


@njit(**_options)
def _elect(weighted: Any, weights: Any, total: Any, count: Any, normalize: Any, least: Any, delta: Any) -> None:
    """Add the terms that have the sign of the total; with `normalize`, divide by the sum of their weights.

    A sum up to `least` counts as 0, and is not divided by.
    """
    divisor = np.zeros(BLOCK, np.float32)
    for i in range(count):
        delta[i] = np.float32(0.0)
    for e in range(weights.size):
        term, weight = weighted[e], weights[e]
        for i in range(count):
            value = term[i]
            agrees = ((total[i] >= 0) & (value > 0)) | (~(total[i] >= 0) & (value < 0))
            delta[i] += value if agrees else np.float32(0.0)
            divisor[i] += weight if agrees else np.float32(0.0)
    if normalize:
        for i in range(count):
            delta[i] /= np.float32(1.0) if abs(divisor[i]) <= least else divisor[i]


@njit(**_options)
def _claim(weighted: Any, total: Any, count: Any, selective: Any, least: Any, delta: Any) -> None:
    """Set `delta` to the total where at least `least` terms claim the element, else to 0 (`Combine.CLAIM`)."""
    claims = np.zeros(BLOCK, np.int32)
    for e in range(weighted.shape[0]):
        term = weighted[e]
        for i in range(count):
            claims[i] += np.int32(abs(term[i]) > selective * abs(total[i] - term[i]))
    for i in range(count):
        delta[i] = total[i] if claims[i] >= least else np.float32(0.0)


@njit(**_options)
def _share(moved: Any, scales: Any, count: Any, least: Any, delta: Any) -> None:
    """Set `delta` to the mean of the changes above `least`; an only one is taken times its scale (`Combine.SHARE`)."""
    owners = np.zeros(BLOCK, np.float32)
    for e in range(moved.shape[0]):
        vector = moved[e]
        for i in range(count):
            owners[i] += np.float32(abs(vector[i]) > least)
    for i in range(count):
        delta[i] = np.float32(0.0)
    for e in range(moved.shape[0]):
        vector, scale = moved[e], scales[e]
        for i in range(count):
            value = vector[i] * scale if owners[i] == np.float32(1.0) else vector[i]
            delta[i] += value if abs(vector[i]) > least else np.float32(0.0)
    for i in range(count):
        delta[i] /= max(owners[i], np.float32(1.0))


@njit("void(uint64[::1],int64[::1],int64,float32,int64[:,::1])", **_options)
def owned(addresses: Any, kinds: Any, size: Any, least: Any, out: Any) -> None:
    """Count the elements that each expert moved by more than `least`, and those of them that no other expert did."""
    experts = addresses.size - 1
    base, moved = np.empty(BLOCK, np.float32), np.empty((experts, BLOCK), np.float32)
    out[:] = 0
    for start in range(0, size, BLOCK):
        count, owners = min(BLOCK, size - start), np.zeros(BLOCK, np.int32)
        _load(addresses[0], kinds[0], start, count, base)
        for e in range(experts):
            vector = moved[e]
            _load(addresses[e + 1], kinds[e + 1], start, count, vector)
            for i in range(count):
                vector[i] -= base[i]
                owners[i] += np.int32(abs(vector[i]) > least)
        for e in range(experts):
            vector, all_, alone = moved[e], np.int32(0), np.int32(0)
            for i in range(count):
                own = np.int32(abs(vector[i]) > least)
                all_ += own
                alone += own & np.int32(owners[i] == 1)
            out[e, 0] += all_
            out[e, 1] += alone


@njit(
    "boolean(uint64[::1],int64[::1],int64,int64,int64,uint64[::1],uint32[:,::1],uint64[:,::1],boolean,uint64[::1],"
    "float32[::1],float32[::1],float32[::1],boolean[::1],int64,boolean,float32,float32,float32,int64,uint64,"
    "uint64[::1],uint64,int64)",
    **_options,
)
def merge_task_vectors(
    addresses: Any, kinds: Any, start: Any, stop: Any, columns: Any, scales: Any, thresholds: Any, cuts: Any,
    dropping: Any, keys: Any, densities: Any, factors: Any, weights: Any, active: Any, how: Any, normalize: Any,
    divisor: Any, lambda_: Any, selective: Any, least: Any, after: Any, masks: Any, out: Any, out_kind: Any,
) -> Any:  # fmt: skip
    """Sparsify, combine, add to the base and round the elements from `start` to `stop`.

    Args:
        addresses, kinds: of the base, then of each expert.
        columns: the last dimension of the tensor.
        scales, thresholds, cuts: of each expert: an element is kept if its score is in the first of two cuts and not
            in the second. A scale is an address as `_times` takes it.
        dropping, keys, densities: whether elements are dropped at random instead, and each expert's stream and density.
        factors, weights, active: of each expert: the factor of rescaling, the weight, whether it takes part.
        how: how the task vectors are combined, as `lewis.methods.loops.Combine` describes.
        normalize: of ELECT and VOTE: whether to divide by the sum of the agreeing weights.
        divisor: of SUM: what the sum is divided by.
        lambda_, after: what the merged delta is multiplied with: a number, and a scale.
        selective: the threshold of CLAIM, SHARE or NEAR; of ELECT and VOTE, the sum of weights up to which it is 0.
        least: how many experts have to CLAIM an element.
        masks: of each expert, the address of one byte for each element from `start` on, 0 if it is dropped; or 0.
        out, out_kind: the address of the result's first element, and its dtype.

    Returns:
        Whether a model or the result holds a number that is not finite.
    """
    experts = weights.size
    base, delta, score = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    total = np.empty(BLOCK, np.float32)
    own, moved = np.empty((experts, BLOCK), np.float32), np.empty((experts, BLOCK), np.float32)
    weighted = np.empty((experts, BLOCK), np.float32)
    bad = False
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        bad |= _load(addresses[0], kinds[0], first, count, base)
        for e in range(experts):
            bad |= _load(addresses[e + 1], kinds[e + 1], first, count, own[e])
            theirs, vector, kept = own[e], moved[e], weighted[e]
            for i in range(count):
                vector[i] = theirs[i] - base[i]
                kept[i] = vector[i]
            if masks[e] != 0:
                _mask(masks[e], first - start, count, kept)
            elif dropping:
                if densities[e] < np.float32(1.0):
                    _drop(first, count, keys[e], densities[e], kept)
            else:
                _between(base, theirs, first, count, columns, scales[e], thresholds[e], cuts[e], score, kept)
            factor, weight = factors[e], weights[e]
            if how == VOTE:
                for i in range(count):
                    total[i] = kept[i] if e == 0 else total[i] + kept[i]
            for i in range(count):
                kept[i] = (kept[i] * factor) * weight
            if how != VOTE:
                if e == 0:
                    for i in range(count):
                        total[i] = kept[i]
                else:
                    for i in range(count):
                        total[i] += kept[i]
        if how == SHARE:
            _share(moved, weights, count, selective, delta)
        elif how == NEAR:
            for i in range(count):
                inverse = np.float32(1.0) / max(abs(moved[0, i]), NEAREST)
                delta[i] = min(inverse * selective, np.float32(1.0)) * moved[0, i]
        elif how == CLAIM:
            _claim(weighted, total, count, selective, least, delta)
        elif how != SUM:
            _elect(weighted, weights, total, count, normalize, selective, delta)
        else:
            for i in range(count):
                delta[i] = total[i] / divisor
        for i in range(count):
            delta[i] *= lambda_
        _times(delta, count, first, columns, after)
        for i in range(count):
            origin, sum_ = base[i], base[i] + delta[i]
            total[i] = origin if delta[i] == np.float32(0.0) else sum_
        for e in range(experts):
            if active[e]:
                theirs, vector = own[e], moved[e]
                for i in range(count):
                    mine, other = theirs[i], total[i]
                    total[i] = mine if delta[i] == vector[i] else other
        bad |= _store(total, count, out, out_kind, first - start)
    return bad


@njit("boolean(uint64[::1],int64[::1],int64,int64,float32[::1],boolean,boolean,float32,uint64,int64)", **_options)
def average(
    addresses: Any, kinds: Any, start: Any, stop: Any, weights: Any, normalize: Any, signed: Any, divisor: Any,
    out: Any, out_kind: Any,
) -> Any:  # fmt: skip
    """The weighted sum of models, divided by `divisor`; returns as `merge_task_vectors`.

    With `normalize`, an element that is equal in all models stays as it is. With `signed`, a result of 0 that equals a
    model's element takes its sign.
    """
    models = weights.size
    own, total = np.empty((models, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    same = np.empty(BLOCK, np.bool_)
    bad = False
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        for m in range(models):
            bad |= _load(addresses[m], kinds[m], first, count, own[m])
            values, weight = own[m], weights[m]
            if m == 0:
                for i in range(count):
                    total[i] = values[i] * weight
                    same[i] = normalize
            else:
                for i in range(count):
                    total[i] += values[i] * weight
                    same[i] &= values[i] == own[0, i]
        for i in range(count):
            total[i] = own[0, i] if same[i] else total[i] / divisor
        for m in range(models if signed else 0):
            values = own[m]
            for i in range(count):
                total[i] = values[i] if total[i] == values[i] else total[i]
        bad |= _store(total, count, out, out_kind, first - start)
    return bad

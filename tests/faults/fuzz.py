"""What all fuzzers share: how many inputs, what may come of one, and values that nobody expects.

`make test` draws 60 inputs, always the same ones; `make faults` sets LEWIS_FAULTS_DRAWS to 10,000 others.
"""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st

from lewis.errors import LewisError

DRAWS = int(os.environ.get("LEWIS_FAULTS_DRAWS", "60"))
LIMIT = 500 << 20  # bytes of memory that one input may take
PATIENCE = 10.0  # seconds of the processor, which a busy machine does not stretch

fuzzed = settings(
    max_examples=DRAWS,
    derandomize=DRAWS <= 1000,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or its error if that is one of the product's own; anything else fails the test.

    Raises:
        MemoryError: if it takes more memory than `LIMIT`.
        TimeoutError: if it takes longer than `PATIENCE`.
    """
    with limited():
        try:
            found = call()
            event("taken")  # for --hypothesis-show-statistics
            return found
        except LewisError as error:
            event("refused")
            text = str(error)
            assert text and "\n  File " not in text and len(text) < 50_000
            return error


@contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {PATIENCE:g} s")

    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT, before[1]))
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, -0.0, float("inf"), float("nan")]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["", "..", "../../etc/passwd", "/dev/zero", "~nobody-x", "\0", "{{ 7*7 }}", "é" * 300, "x" * 5000]),
)
"""Values that nobody expects where they stand."""

ANY = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
"""The same, and blocks of them."""


def changed(value: Any, others: st.SearchStrategy[Any] = ANY) -> st.SearchStrategy[Any]:
    """Plain data with up to three of its values, keys or items replaced, removed, doubled or added."""

    def change(data: Any, places: list[float], given: list[Any]) -> Any:
        for place, new in zip(places, given, strict=True):
            data = _change(data, place, new)
        return data

    numbers = st.floats(0, 1, exclude_max=True)
    count = st.shared(st.integers(1, 3), key="changes")
    return count.flatmap(
        lambda n: st.builds(
            change, st.just(value), st.lists(numbers, min_size=n, max_size=n), st.lists(others, min_size=n, max_size=n)
        )
    )


def _change(data: Any, place: float, new: Any) -> Any:
    """Copy `data` with one change: `place` in [0, 1) says where on the way down, and what is done there."""
    size = len(data) if isinstance(data, dict | list) else 0
    if not size:
        return new
    index = int(place * size)
    within = place * size - index
    keys = list(data) if isinstance(data, dict) else list(range(size))
    inner = data[keys[index]]
    if within < 0.75 and isinstance(inner, dict | list) and inner:
        items = {**data} if isinstance(data, dict) else list(data)
        items[keys[index]] = _change(inner, within / 0.75, new)
        return items
    if isinstance(data, list):
        done = {0: data[:index] + data[index + 1 :], 1: [*data, inner], 2: [*data, new]}
        return done.get(int(within * 40) % 8, [*data[:index], new, *data[index + 1 :]])
    kept = {key: value for key, value in data.items() if key != keys[index]}
    done = {0: kept, 1: {**kept, f"{keys[index]}x": inner}, 2: {**data, str(new)[:20]: inner}}
    return done.get(int(within * 40) % 8, {**data, keys[index]: new})

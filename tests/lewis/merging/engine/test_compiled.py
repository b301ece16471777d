"""The compiled loops give the bytes of the methods' own functions, whatever goes in."""

import ast
import itertools
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lewis.errors import LewisError
from lewis.merging.engine import kernels, selection
from lewis.merging.engine.compiled import merge_tensor
from lewis.merging.engine.kernels import KINDS
from lewis.merging.engine.selection import Pair, Selector
from lewis.merging.run import Merge
from lewis.methods import METHODS as ALL
from lewis.methods.arithmetic.sparsify import largest
from lewis.methods.arithmetic.streams import Stream
from tests.support.models import bits, open_merge, write_tensors

NAME = "model.layers.0.a.weight"
# A method that fits needs calibration rows; `test_fit` merges with it.
COMPILED = [name for name, method in ALL.items() if (method.compiled or method.coefficients) and not method.fits]
DRAWS = int(os.environ.get("LEWIS_COMPILED_DRAWS", "3"))  # of each method
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (7,), (2048,), (2049,), (3, 5), (64, 33), (3, 4, 5), (70, 100), (1, 4097), (5000, 1), (), (5, 70, 33)]


def compiled(merge: Merge) -> bytes:
    """What the compiled loops write."""
    dtype, shape = merge.layout[NAME]
    out = bytearray(torch.Size(shape).numel() * (4 if dtype == "F32" else 2))

    def write(data: memoryview, offset: int) -> None:
        out[offset : offset + len(data)] = data

    assert merge_tensor(merge, NAME, write)
    return bytes(out)


def weights(rng: random.Random, count: int) -> list[float]:
    return [rng.choice([1.0, 0.0, -0.5, round(rng.uniform(-1, 2), 3)]) for _ in range(count)]


def parameters_of(method: str, rng: random.Random) -> dict[str, Any]:
    """Parameters of a whole merge, at random."""
    drawn: dict[str, Any] = {
        "normalize": rng.random() < 0.5, "lambda": rng.choice([1.0, 0.7, -1.5]), "rescale": rng.random() < 0.5,
        "gamma": rng.choice([0.0, 0.01, 0.3, 1.0]), "epsilon": rng.choice([0.0, 0.04]),
        "t": rng.choice([0, 0.3, 0.5, 1]), "min_agree": rng.choice([1, 2]),
        "tall_lambda": rng.choice([0.0, 0.4, 1.1]), "tol": rng.choice([0.0, 1e-5]),
        "normalize_weights": rng.random() < 0.5, "select_topk": rng.choice([0.0, 0.3, 0.9, 1.0]),
    }  # fmt: skip
    if method.startswith("ram"):
        drawn |= {"epsilon": rng.choice([0.0, 1e-5, 0.01]), "r": rng.choice([0.1, 1.0]), "alpha": rng.random()}
    if method == "linear":
        del drawn["lambda"]
    return {key: value for key, value in drawn.items() if key in ALL[method].parameters}


def layouts(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the activations into a linear layer, GPT-2's Conv1D and stacked experts as stored or transposed; others."""
    *rows, columns = shape
    ones = [1] * len(rows)
    found = [[columns], [*ones, columns], [*rows, 1], [*ones, 1], [*rows, columns]]
    found += [[rows[0], *ones[1:], columns], [rows[0], *ones[1:], 1]] if rows else []
    return [tuple(layout) for layout in found]


def draw(rng: random.Random, place: Path, method: str) -> Merge:
    """A random merge of one tensor."""
    low, high = ALL[method].experts
    count, shape = rng.randint(low, high or 5), rng.choice(SHAPES)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    scale, grain = rng.choice([1e-7, 1e-3, 1.0, 1e3]), rng.choice([0, 0, 1e-3])
    base = torch.randn(shape, generator=generator) * rng.choice([1e-6, 0.02, 10])
    models = [base]
    for _ in range(count):
        moved = base + scale * torch.randn(shape, generator=generator)
        moved = torch.where(torch.rand(shape, generator=generator) < rng.choice([0, 0.3]), base, moved)
        models.append((moved / grain).round() * grain if grain else moved)  # many ties
    dtypes = [rng.choice(DTYPES)] * (count + 1) if rng.random() < 0.5 else rng.choices(DTYPES, k=count + 1)
    folders = [
        write_tensors(place / f"m{i}", {NAME: model.clamp(-6e4, 6e4).to(dtype)})
        for i, (model, dtype) in enumerate(zip(models, dtypes, strict=True))
    ]
    own: list[dict[str, Any]] = [{}] * count
    if "weight" in ALL[method].parameters:
        own = [{"weight": weight} for weight in weights(rng, count)]
    if ALL[method].on != "task_vectors" and "weight" in ALL[method].parameters:
        own = [{"weight": 0.1 + abs(each["weight"])} for each in own]
    if method == "passthrough":
        own = [{"scale": scale} for scale in weights(rng, count)]
    densities: list[dict[str, float] | None] = [None] * count
    if "density" in ALL[method].parameters:
        densities = [{NAME: rng.choice([0.0, 1.0, 0.5, rng.uniform(0.05, 0.95)])} for _ in range(count)]
    on_weights = ALL[method].on != "task_vectors" and method != "slerp"
    without = method in ("linear", "passthrough") or (on_weights and rng.random() < 0.5)
    out = rng.choice(["float32", "float16", "bfloat16"])
    merge = open_merge(
        method, None if without else folders[0], folders[1:], own=own, parameters=parameters_of(method, rng),
        densities=densities, out_dtype=out, seed=3,
    )  # fmt: skip
    if ALL[method].takes_scales and shape and rng.random() < 0.5:
        scales = [{NAME: torch.rand(rng.choice(layouts(shape)), generator=generator)} for _ in merge.experts]
        experts = [replace(e, scales=s) for e, s in zip(merge.experts, scales, strict=True)]
        merge = Merge.of(merge.settings, merge.base, experts)
    if merge.adds_to_base and shape and rng.random() < 0.2:
        factors = {NAME: torch.rand(rng.choice(layouts(shape)), generator=generator)}
        return Merge.of(merge.settings, merge.base, merge.experts, factors)
    return merge


@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("method", COMPILED)
def test_the_bytes_of_the_methods_own_functions(
    method: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{method} {number}")
    if number % 2:  # so that small tensors take the way of large ones
        monkeypatch.setattr(selection, "_ROOM", 4096)
        monkeypatch.setattr("lewis.merging.engine.selection._own", type("Fresh", (), {})())
        monkeypatch.setattr("lewis.merging.memory_budget.CHUNK", 2048)
    merge = draw(rng, tmp_path, method)
    try:
        expected = bits(merge.tensor(NAME))
    except LewisError:
        assert not merge_tensor(merge, NAME, lambda data, offset: None)
        return
    assert compiled(merge) == expected


def test_weights_that_cancel_are_not_divided_by(tmp_path: Path) -> None:
    signs = (0.0, 2.0, 2.0, -2.0)
    folders = [write_tensors(tmp_path / str(i), {NAME: torch.tensor([sign, 1.0])}) for i, sign in enumerate(signs)]
    own = [{"weight": weight} for weight in (0.3, 0.6, -0.9)]
    merge = open_merge("ties", folders[0], folders[1:], own=own)
    assert compiled(merge) == bits(merge.tensor(NAME)) and merge.tensor(NAME).tolist() == pytest.approx([3.6, 1.0])
    even = open_merge("ties", folders[0], folders[1:], own=own, parameters={"normalize": False})
    assert "cancelling" in merge._resolved(NAME) and "cancelling" not in even._resolved(NAME)


def test_every_half_precision_number_goes_in_and_out(tmp_path: Path) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype, out in itertools.product((torch.float16, torch.bfloat16), ("float16", "bfloat16", "float32")):
        values = patterns.view(dtype)
        values = values[values.isfinite() & (values.float().abs() < 65504)]
        folder = write_tensors(tmp_path / f"{dtype}-{out}", {NAME: values})
        merge = open_merge("linear", None, [folder], out_dtype=out)
        assert compiled(merge) == bits(merge.tensor(NAME))


def test_rounding_to_half_precision(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 16, (100_000,), generator=generator)
    values = torch.randn(100_000, generator=generator).clamp(-1.9, 1.9) * 2.0**exponents
    halves = (torch.arange(4000) + 0.5) * 2.0**-24  # half way between two subnormals
    folder = write_tensors(tmp_path / "m", {NAME: torch.cat([values, halves, -halves])})
    for out in ("float16", "bfloat16"):
        merge = open_merge("linear", None, [folder], out_dtype=out)
        assert compiled(merge) == bits(merge.tensor(NAME))


@pytest.mark.parametrize("kind", ["smooth", "few values", "one value", "rows apart", "zeros"])
@pytest.mark.parametrize("share", [1e-5, 0.003, 0.3, 0.5, 0.97, 0.99999])
def test_exactly_the_k_largest_are_kept(kind: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ROOM", 4096)
    rng = np.random.default_rng(0)
    size = 100_000
    values = rng.standard_normal(size).astype(np.float32)
    if kind == "few values":
        values = np.round(values * 2)
    elif kind == "one value":
        values[:] = 3
    elif kind == "rows apart":
        values *= np.repeat(np.float32(2.0) ** np.arange(10), size // 10)
    elif kind == "zeros":
        values *= rng.random(size) < 0.1
    zeros, k = np.zeros_like(values), int(share * size)
    pair = Pair(np.uint64(zeros.ctypes.data), 0, np.uint64(values.ctypes.data), 0, size, size, np.uint64(0))
    threshold, cut = Selector().cut(pair, k)
    scores = np.abs(values).view(np.uint32)
    order = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    kept = (scores > threshold) | ((scores == threshold) & (order <= cut))
    assert kept.sum() == k
    assert np.array_equal(kept, largest(torch.from_numpy(np.abs(values)), k).numpy())


def test_equal_scores_are_cut_where_the_guess_ends_at_the_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.9375 + 8 / sqrt(16384) is the float 1.0, and 2^64 - 1 times it is 2^64."""
    monkeypatch.setattr(selection, "_ROOM", 4096)
    size, k = 16384, 15360
    zeros = np.zeros(size, np.float32)
    address = np.uint64(zeros.ctypes.data)
    _, cut = Selector().cut(Pair(address, 0, address, 0, size, size, np.uint64(0)), k)
    order = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert (order <= cut).sum() == k


def test_a_stream_is_splitmix64() -> None:
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of the key 0, as its authors publish it
    assert Stream(0).random(3).tolist() == [(number >> 40) * 2.0**-24 for number in first]
    assert np.array_equal(np.concatenate([(s := Stream(7)).random(5), s.random(400_000)]), Stream(7).random(400_005))


@pytest.mark.parametrize("shape", [(64, 33), (5, 70, 33)])
def test_activations_of_every_layout_are_compiled(shape: tuple[int, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folders = [write_tensors(tmp_path / str(i), {NAME: torch.randn(shape, generator=generator)}) for i in range(3)]
    plain = open_merge("ties", folders[0], folders[1:], parameters={"density": 0.4})
    for layout in layouts(shape):
        scales, factors = ({NAME: torch.rand(layout, generator=generator)} for _ in range(2))
        merge = Merge.of(plain.settings, plain.base, [replace(e, scales=scales) for e in plain.experts], factors)
        assert compiled(merge) == bits(merge.tensor(NAME))


def test_activations_of_another_layout_are_left_to_the_function(tmp_path: Path) -> None:
    folders = [write_tensors(tmp_path / str(i), {NAME: torch.full((3, 4, 5), 1.0 * i)}) for i in range(2)]
    plain = open_merge("task_arithmetic", folders[0], folders[1:])
    for layout in ((4, 1), (4, 5), (1, 4, 5)):
        merge = Merge.of(plain.settings, plain.base, plain.experts, {NAME: torch.ones(layout)})
        assert not merge_tensor(merge, NAME, lambda data, offset: None)


def test_the_loops_of_a_method_are_data_and_not_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_tensors(tmp_path / str(i), {NAME: torch.full((8,), 1.0 * i)}) for i in range(3)]
    monkeypatch.setitem(ALL, "mine", replace(ALL["ties"], name="mine", origin="mine 1.0"))
    merge = open_merge("mine", folders[0], folders[1:])
    assert compiled(merge) == bits(merge.tensor(NAME))
    slow = replace(merge.settings, method=replace(merge.method, compiled=None))
    assert not merge_tensor(replace(merge, settings=slow), NAME, lambda data, offset: None)


def test_the_engine_names_no_method() -> None:
    for path in Path(kernels.__file__).parent.glob("*.py"):
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not constants & ALL.keys(), path.name


def test_what_is_not_compiled_is_left_to_the_function(tmp_path: Path) -> None:
    folders = [write_tensors(tmp_path / str(i), {NAME: torch.randn(8, dtype=torch.float64)}) for i in range(2)]
    assert "F64" not in KINDS
    for method in ("ties", "sce", "karcher"):
        assert not merge_tensor(open_merge(method, folders[0], folders[1:]), NAME, lambda data, offset: None)

"""Parity with mergekit 0.1.5: the same tensors from the same parameters, method by method.

Every deterministic method is drawn LEWIS_PARITY_DRAWS times (20) with random parameters, shapes and dtypes; the random
ones are compared by what they keep. Where we differ from mergekit by intention, `DEFECTS` says why, the draws show that
we differ nowhere else, and `TestDefects` that the defect is there.
"""

import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lewis.merging.prepared import random_stream
from lewis.methods import METHODS
from lewis.methods.arcee_fusion import divergence
from lewis.methods.arithmetic.sparsify import largest

MERGEKIT = os.environ.get("LEWIS_MERGEKIT")
DRAWS = int(os.environ.get("LEWIS_PARITY_DRAWS", "20"))
SHAPES = [(1,), (2,), (7,), (64,), (1, 5), (5, 1), (8, 8), (13, 17), (3, 5, 7), (2, 1, 9), (4, 3, 2)]

pytestmark = [
    pytest.mark.skipif(not MERGEKIT, reason="LEWIS_MERGEKIT names no python that has mergekit"),
    pytest.mark.timeout(400),
]
Draw = dict[str, Any]


Oracle = Callable[[list[Draw]], list[torch.Tensor | str]]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """mergekit, in one process for all tests: draws in, results (or what it stops with) out."""
    folder = tmp_path_factory.mktemp("mergekit")
    command = [str(MERGEKIT), str(Path(__file__).parents[2] / "support" / "mergekit_oracle.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdin is not None and process.stdout is not None
        pipes = process.stdin, process.stdout

        def merge(draws: list[Draw]) -> list[torch.Tensor | str]:
            torch.save(draws, folder / "draws.pt")
            print(folder, file=pipes[0], flush=True)
            assert pipes[1].readline() == "done\n", "mergekit's process died; its error is above"
            results: list[torch.Tensor | str] = torch.load(folder / "results.pt")
            return results

        yield merge


def ours(draw: Draw) -> torch.Tensor:
    """The same merge by our function, in fp32."""
    method, experts = METHODS[draw["method"]], torch.stack([e.float() for e in draw["experts"]])
    values = {"lambda_" if key == "lambda" else key: value for key, value in draw["parameters"].items()}
    base = None if draw["base"] is None else draw["base"].float()
    if method.takes_base:
        values["base"] = base
    if method.random:
        values["streams"] = [random_stream(draw["seed"], str(i), "t") for i in range(len(experts))]
    if method.on == "weights" and not method.takes_base and base is not None:
        return method(torch.cat([experts, base[None]]), **values)
    if method.on == "weights" or base is None:
        return method(experts, **values)
    return base + method(experts - base, **values)


# What the parameters of a method are drawn from.


def _weights(rng: random.Random, count: int) -> list[float]:
    return [round(rng.uniform(-0.5, 1.5), 3) for _ in range(count)]


def _densities(rng: random.Random, count: int) -> list[float]:
    return [rng.choice([1.0, round(rng.uniform(0.03, 1), 3)]) for _ in range(count)]


def _sum(rng: random.Random, count: int, *, density: bool = True) -> Draw:
    values: Draw = {"weight": _weights(rng, count), "normalize": rng.random() < 0.5, "int8_mask": rng.random() < 0.5}
    values["lambda"] = rng.choice([1.0, round(rng.uniform(0.3, 2), 3)])
    return values | ({"density": _densities(rng, count), "rescale": rng.random() < 0.5} if density else {})


def _crumbs(rng: random.Random, count: int) -> Draw:
    return _sum(rng, count) | {"gamma": [rng.choice([0.0, 0.01, round(rng.uniform(0, 0.6), 3)]) for _ in range(count)]}


METHODS_DRAWN: dict[str, tuple[tuple[int, int], bool | None, Callable[[random.Random, int], Draw]]] = {
    # how many experts, with a base (None: both), parameters
    "linear": ((1, 4), False, lambda rng, n: {"weight": [0.1 + abs(w) for w in _weights(rng, n)]}),
    "task_arithmetic": ((1, 4), True, lambda rng, n: _sum(rng, n, density=False)),
    "ties": ((1, 4), True, _sum),
    "breadcrumbs": ((1, 4), True, _crumbs),
    "breadcrumbs_ties": ((1, 4), True, _crumbs),
    "sce": ((1, 4), True, lambda rng, n: {"select_topk": rng.choice([1.0, rng.random()])}),
    "model_stock": ((2, 4), True, lambda rng, n: {"filter_wise": rng.random() < 0.5}),
    "ram": ((1, 4), True, lambda rng, n: {"epsilon": rng.choice([1e-5, 0.05])}),
    "ramplus_tl": ((1, 4), True, lambda rng, n: {"r": rng.random(), "alpha": rng.random(), "epsilon": 0.05}),
    "nearswap": ((1, 1), True, lambda rng, n: {"t": rng.choice([0.0, 1e-4, 0.05])}),
    "arcee_fusion": ((1, 1), True, lambda rng, n: {}),
    "passthrough": ((1, 1), False, lambda rng, n: {"scale": _weights(rng, 1)}),
    "slerp": ((1, 1), True, lambda rng, n: {"t": rng.choice([0.0, 1.0, rng.random()])}),
    "nuslerp": (
        (2, 2),
        None,
        lambda rng, n: {
            "weight": rng.choice([[1.0, 0.0], [1.0, -1.0], [rng.random(), rng.random()]]),
            "nuslerp_flatten": rng.random() < 0.4,
            "nuslerp_row_wise": rng.random() < 0.5,
        },
    ),
    "multislerp": (
        (1, 4),
        None,
        lambda rng, n: {"weight": [0.1 + abs(w) for w in _weights(rng, n)], "normalize_weights": rng.random() < 0.7},
    ),
    "karcher": ((1, 4), None, lambda rng, n: rng.choice([{}, {"max_iter": 30, "tol": 1e-6}])),
}


def draw(method: str, number: int) -> Draw:
    """The `number`-th draw of a method: always the same."""
    rng = random.Random(f"{method} {number}")
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    (low, high), with_base, parameters = METHODS_DRAWN[method]
    count, shape, scale = rng.randint(low, high), rng.choice(SHAPES), rng.choice([1e-3, 0.1, 1.0])
    base = torch.randn(shape, generator=generator)
    experts = [base + scale * torch.randn(shape, generator=generator) for _ in range(count)]
    if rng.random() < 0.15:  # a tensor that an expert left as it was
        experts[rng.randrange(count)] = base.clone()
    if rng.random() < 0.1:
        experts[rng.randrange(count)] = torch.zeros(shape)
    if (
        "density" not in METHODS[method].parameters
    ):  # bf16 deltas tie at thresholds, which sort order breaks in mergekit
        dtypes = [rng.choice([torch.float32, torch.float32, torch.bfloat16]) for _ in range(count + 1)]
        dtypes[0] = torch.float32  # which they promote to
        base, *experts = [tensor.to(dtype) for tensor, dtype in zip((base, *experts), dtypes, strict=True)]
    if not (rng.random() < 0.5 if with_base is None else with_base):
        base = None  # type: ignore[assignment]
        experts[0] = experts[0].float()
    return {
        "method": method, "base": base, "experts": experts, "parameters": parameters(rng, count), "seed": number
    }  # fmt: skip


# Where we differ by intention: method -> (why, whether a draw is such a case).


def _deltas(draw: Draw) -> list[torch.Tensor]:
    return [expert.float() - (0 if draw["base"] is None else draw["base"].float()) for expert in draw["experts"]]


def _ties_keeps_one(draw: Draw) -> bool:
    n = draw["experts"][0].numel()
    return any(int(density * n) == 0 for density in draw["parameters"]["density"])


def _equal_weights(draw: Draw) -> bool:
    deltas, share = torch.stack(_deltas(draw)), draw["parameters"].get("select_topk", 1)
    if share < 1:
        variance = deltas.var(dim=0, correction=0)
        deltas = torch.where(largest(variance, int(int(torch.count_nonzero(variance)) * share)), deltas, 0.0)
    return float(sum((delta**2).mean() for delta in deltas)) < 1e-6


def _perpendicular(draw: Draw) -> bool:
    deltas = [d if draw["parameters"]["filter_wise"] else d.reshape(-1) for d in _deltas(draw)]
    lengths = [torch.linalg.vector_norm(delta, dim=-1) for delta in deltas]
    return any(bool((a * b < 1e-6).any()) for i, a in enumerate(lengths) for b in lengths[:i])


def _antiparallel(draw: Draw) -> bool:
    a, b = _deltas(draw)
    if draw["parameters"]["nuslerp_flatten"]:
        return bool(torch.cosine_similarity(a.reshape(-1), b.reshape(-1), dim=0) < -0.9999)
    dim = 0 if draw["parameters"]["nuslerp_row_wise"] else -1
    return bool((torch.cosine_similarity(a, b, dim=dim) < -0.9999).any())


def _nearly_parallel(draw: Draw) -> bool:
    tensors = [t.float() for t in (*draw["experts"], draw["base"]) if t is not None and bool(t.any())]
    units = [t / torch.linalg.vector_norm(t) for t in tensors]
    mean = sum(units) / torch.linalg.vector_norm(sum(units)) if units else 0
    return any(float(torch.linalg.vector_norm(unit - mean)) < 2e-3 for unit in units)


def _nothing_changed(draw: Draw) -> bool:
    return not any(bool(delta.any()) for delta in _deltas(draw))


DEFECTS: dict[str, tuple[str, Callable[[Draw], bool]]] = {
    "ties": ("mergekit keeps one element where the density allows none", _ties_keeps_one),
    "sce": ("mergekit weighs experts alike where their mean squares sum to less than 1e-6", _equal_weights),
    "model_stock": ("mergekit takes short task vectors for perpendicular", _perpendicular),
    "nuslerp": ("mergekit multiplies antiparallel rows by 1/sin of a rounding error", _antiparallel),
    "karcher": ("mergekit leaves out models within 3e-4 of the mean", _nearly_parallel),
    "multislerp": ("mergekit stops where no expert changed a tensor", _nothing_changed),
}


@pytest.fixture(scope="module")
def results(oracle: Oracle) -> dict[str, list[tuple[Draw, torch.Tensor | str]]]:
    draws = [draw(method, number) for method in METHODS_DRAWN for number in range(DRAWS)]
    theirs = oracle(draws)
    by_method: dict[str, list[tuple[Draw, torch.Tensor | str]]] = {method: [] for method in METHODS_DRAWN}
    for each, result in zip(draws, theirs, strict=True):
        by_method[each["method"]].append((each, result))
    return by_method


def near_threshold(draw: Draw) -> torch.Tensor:
    """Elements whose importance is so near to arcee_fusion's threshold that an fp32 rounding decides."""
    base = draw["base"].float()
    delta = draw["experts"][0].float() - base
    scores = (delta.abs() * divergence(delta, base)).reshape(delta.shape)
    ordered = scores.reshape(-1).sort().values
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    return (scores - threshold).abs() <= 1e-3 * threshold.abs() + 1e-9


def condition(draw: Draw) -> float:
    """How much a method multiplies fp32 roundings.

    model_stock divides by 1 + (N - 1) cos, others by a sum of weights, which may be next to 0. In nuslerp the rounding
    of mergekit's fp32 cosine goes in with t (1 - t), which is w_1 w_2 / (w_1 + w_2)^2.
    """
    weights = draw["parameters"].get("weight", [])
    if draw["method"] == "nuslerp":
        return max(1.0, sum(map(abs, weights)) / max(abs(sum(weights)), 1e-6)) ** 2
    if draw["parameters"].get("normalize"):
        sums = [abs(sum(some)) for n in range(1, len(weights) + 1) for some in itertools.combinations(weights, n)]
        return max(1.0, sum(map(abs, weights)) / max(min(sums), 1e-6))
    if draw["method"] != "model_stock":
        return 1.0
    deltas = [d if draw["parameters"]["filter_wise"] else d.reshape(-1) for d in _deltas(draw)]
    cosines = [torch.cosine_similarity(a, b, dim=-1, eps=1e-30) for i, a in enumerate(deltas) for b in deltas[:i]]
    divisor = 1 + (len(deltas) - 1) * torch.stack(cosines).mean(dim=0)
    return max(1.0, max(float(divisor.abs().min()), 1e-6) ** -2)


@pytest.mark.parametrize("method", METHODS_DRAWN)
def test_equals_mergekit(method: str, results: dict[str, list[tuple[Draw, torch.Tensor | str]]]) -> None:
    compared = 0
    for each, theirs in results[method]:
        if method in DEFECTS and DEFECTS[method][1](each):
            continue
        assert isinstance(theirs, torch.Tensor), (theirs, each)
        mine = ours(each)
        if method == "arcee_fusion":
            mine = torch.where(near_threshold(each), theirs, mine)
        atol = 1e-6 * max(float(t.abs().max()) for t in (theirs, *each["experts"])) * condition(each)
        torch.testing.assert_close(
            mine, theirs, rtol=1e-6, atol=atol, msg=lambda m, each=each: f"{m}\n{each['seed']} {each['parameters']}"
        )
        compared += 1
    assert compared >= DRAWS / 2


def test_every_deterministic_method_of_mergekit_is_drawn() -> None:
    assert {name for name, m in METHODS.items() if m.in_mergekit and not m.random} == METHODS_DRAWN.keys()


def single(method: str, tensors: list[Any], parameters: Draw, seed: int = 0, base: Any = None) -> Draw:
    """A draw made by hand: experts on a base, of zeros if none is given."""
    experts = [torch.as_tensor(tensor, dtype=torch.float32) for tensor in tensors]
    base = torch.zeros_like(experts[0]) if base is None else base
    return {"method": method, "base": base, "experts": experts, "parameters": parameters, "seed": seed}


class TestDefects:
    """What mergekit does where `DEFECTS` and the docstrings say that we differ."""

    def both(self, draw: Draw, oracle: Oracle) -> tuple[torch.Tensor, torch.Tensor | str]:
        return ours(draw), oracle([draw])[0]

    def test_ties_keeps_an_element_beyond_the_density(self, oracle: Oracle) -> None:
        mine, theirs = self.both(single("ties", [[1.0, 3, 2]], {"weight": [1.0], "density": [0.3]}), oracle)
        assert isinstance(theirs, torch.Tensor)
        assert (mine.tolist(), theirs.tolist()) == ([0, 0, 0], [0, 3, 0])

    def test_sce_weighs_small_task_vectors_alike(self, oracle: Oracle) -> None:
        # shares 1/10 and 9/10: 0.1 * 1e-4 + 0.9 * 3e-4
        mine, theirs = self.both(single("sce", [[1e-4, 1e-4], [3e-4, 3e-4]], {}), oracle)
        torch.testing.assert_close(mine, torch.full((2,), 2.8e-4))
        torch.testing.assert_close(theirs, torch.full((2,), 2e-4))

    def test_model_stock_takes_short_task_vectors_for_perpendicular(self, oracle: Oracle) -> None:
        # equal task vectors: cos 1, t 1; mergekit has cos 1e-8 / 1e-6, t 0.02 / 1.01
        mine, theirs = self.both(single("model_stock", [[1e-4, 0], [1e-4, 0]], {}), oracle)
        torch.testing.assert_close(mine, torch.tensor([1e-4, 0]))
        torch.testing.assert_close(theirs, torch.tensor([1e-4 * 0.02 / 1.01, 0]))

    def test_nuslerp_blows_antiparallel_rows_up(self, oracle: Oracle) -> None:
        rows = torch.randn((200, 16), generator=torch.Generator().manual_seed(0))
        parameters = {"weight": [1.0, 1.0], "nuslerp_flatten": False}
        mine, theirs = self.both(single("nuslerp", [rows, rows * -3], parameters), oracle)
        torch.testing.assert_close(mine, -rows, rtol=0, atol=1e-6)  # (x - 3x) / 2
        assert isinstance(theirs, torch.Tensor) and float((theirs.abs() / rows.abs()).max()) > 100

    def test_multislerp_stops_at_a_frozen_tensor(self, oracle: Oracle) -> None:
        mine, theirs = self.both(single("multislerp", [[0.0, 0]] * 3, {"weight": [1.0] * 3}), oracle)
        assert isinstance(theirs, str) and "zero" in theirs
        assert mine.tolist() == [0, 0]

    def test_karcher_leaves_models_out_that_are_near_the_mean(self, oracle: Oracle) -> None:
        generator = torch.Generator().manual_seed(0)
        base, draws = torch.randn(64, generator=generator), []
        for number in range(20):
            experts = [base + 3e-4 * torch.randn(64, generator=generator) for _ in range(3)]
            draws.append(single("karcher", experts, {}, number, base))
        mine, theirs = [ours(each) for each in draws], oracle(draws)

        def off(merged: Any, each: Draw) -> float:
            tensors = [t.double() for t in (*each["experts"], each["base"])]
            lengths = [t.norm() for t in tensors]
            mean = sum(t / length for t, length in zip(tensors, lengths, strict=True))
            exact = mean / mean.norm() * sum(lengths) / 4  # of directions so near the arcs are straight
            return float((merged.double() - exact).abs().max())

        assert max(off(merged, each) for merged, each in zip(mine, draws, strict=True)) < 1e-6
        assert max(off(merged, each) for merged, each in zip(theirs, draws, strict=True)) > 1e-5

    def test_arcee_fusion_takes_rounding_for_importance_and_differs_each_run(self, oracle: Oracle) -> None:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn((64, 64), generator=generator)
        small = single("arcee_fusion", [base + 1e-4 * torch.randn((64, 64), generator=generator)], {}, base=base)
        mine, theirs = self.both(small, oracle)
        assert isinstance(theirs, torch.Tensor)
        assert int(((mine != base) != (theirs != base)).sum()) > int((mine != base).sum()) / 10

        big = torch.randn((1001, 1001), generator=generator)
        draws = [single("arcee_fusion", [big], {}, seed) for seed in (1, 2)]
        first, second = oracle(draws)
        assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and not torch.equal(first, second)
        assert torch.equal(ours(draws[0]), ours(draws[1]))

    def test_della_fails_on_rows_of_one_element(self, oracle: Oracle) -> None:
        draw = single("della_linear", [torch.ones(400, 1)], {"weight": [1.0], "density": [0.5], "rescale": False})
        mine, theirs = self.both(draw, oracle)
        assert isinstance(theirs, str) or not bool(torch.isfinite(theirs).all()) or float(theirs.mean()) in (0, 1)
        assert abs(float(mine.mean()) - 0.5) < 0.125  # 5 sigma


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.random])
def test_random_methods_keep_as_mergekit_does(method: str, oracle: Oracle) -> None:
    magnitudes = torch.rand((100, 200), generator=torch.Generator().manual_seed(0)) + 0.5
    expert = torch.where(torch.arange(20000).reshape(100, 200) % 2 == 0, magnitudes, -magnitudes)
    parameters = {"weight": [1.0], "density": [0.4], "normalize": False}
    if "epsilon" in METHODS[method].parameters:
        parameters["epsilon"] = [0.3]
    draws = [single(method, [expert], parameters | {"rescale": rescale}, seed=3) for rescale in (False, True)]
    decile = (magnitudes.argsort(dim=1).argsort(dim=1) // 20).reshape(-1)
    for draw, theirs in zip(draws, oracle(draws), strict=True):
        mine = ours(draw)
        assert isinstance(theirs, torch.Tensor)
        for ten in range(10):  # of 2000 elements each: a share has a standard deviation of 0.011 at most
            shares = [float((merged.reshape(-1)[decile == ten] != 0).float().mean()) for merged in (mine, theirs)]
            assert abs(shares[0] - shares[1]) < 5 * 0.011 * 2**0.5, (ten, shares)
        assert abs(float((mine != 0).float().mean()) - 0.4) < 5 * (0.24 / 20000) ** 0.5
        for merged in (mine, theirs):
            whole, kept = expert.abs().sum(), merged.abs().sum()
            assert (abs(kept / whole - 1) < 1e-5) == draw["parameters"]["rescale"]
            assert torch.equal((merged / expert).unique().round(decimals=4).unique()[:1], torch.zeros(1))

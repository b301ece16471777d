"""Metrics of task vectors and the global threshold, against what is written out on whole tensors."""

import math
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from lewis.allocation import evidence, global_threshold
from lewis.importance.calibration import Calibration
from lewis.importance.measure import network_of
from lewis.models.checkpoint import Checkpoint
from lewis.models.network.module_tree import Covered, Layer
from tests.conftest import Family
from tests.support.measuring import measure
from tests.support.models import rewrite, write_llama

CALIBRATION = Calibration("sums", ((3, 4, 5, 6, 7, 8, 9), (10,), (11, 12, 13), (20, 21, 22)))


class Case:
    """An expert, its moments, and its scores |delta| sqrt(s) as flat tensors by layer."""

    def __init__(self, base: Path, expert: Path) -> None:
        self.base, self.expert = Checkpoint(base, "base"), Checkpoint(expert, "expert")
        self.covered = network_of(self.base).covered
        self.moments = measure(self.expert, CALIBRATION).moments
        self.scores = {
            x.tensor: ((self.expert.read(x.tensor) - self.base.read(x.tensor)).abs() * self.moments[x.tensor].sqrt())
            for x in self.covered
        }

    def metric(self, name: str) -> dict[str, float | None]:
        return evidence.of_task_vector(name, self.base, self.expert, self.covered, self.moments)

    def shares(self, **bounds: float) -> dict[str, float]:
        found = global_threshold.shares(self.base, self.expert, self.covered, self.moments, **bounds)  # type: ignore[arg-type]
        return {key: value for key, value in found.items() if value is not None}


@pytest.fixture(scope="module")
def case(family: Family) -> Case:
    return Case(family.base, family.math)


def test_delta_norm_is_the_norm_of_the_scores(case: Case) -> None:
    for key, value in case.metric("delta_norm").items():
        assert value == pytest.approx(float(case.scores[key].double().norm()), rel=1e-6)


def test_delta_norm_sees_a_change_of_sign_that_norms_do_not(family: Family, tmp_path: Path) -> None:
    turned = rewrite(family.base, tmp_path / "turned", lambda name, t: -t if "layers.1.mlp.down" in name else t)
    case, key = Case(family.base, turned), "model.layers.1.mlp.down_proj.weight"
    base, own = (measure(each, CALIBRATION).norms for each in (case.base, case.expert))
    assert evidence.norm_difference(base, own)[key] == pytest.approx(0, abs=1e-6)
    assert case.metric("delta_norm")[key] == pytest.approx(2 * float(base[key] or 0), rel=1e-5)


def test_outlier_is_the_share_beyond_five_means(family: Family, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def move(tensor: str, t: torch.Tensor) -> torch.Tensor:
        delta = torch.full_like(t, 1e-3)
        if tensor == name:
            delta.view(-1)[:8] = 1.0
        return t + delta

    case = Case(family.base, rewrite(family.base, tmp_path / "outliers", move))
    scores = case.scores[name].double()
    expected = float((scores > 5 * scores.mean()).double().mean())
    assert 0 < expected <= 8 / 256 and case.metric("outlier")[name] == pytest.approx(expected)


def test_median(case: Case) -> None:
    for key, value in case.metric("median").items():
        assert value == pytest.approx(float(np.median(case.scores[key].numpy())))


class TestThreshold:
    @pytest.mark.parametrize("target", [0.03, 0.1, 0.5, 1.0])
    def test_keeps_the_largest_scores_of_all(self, case: Case, target: float) -> None:
        found = case.shares(target=target, low=0.0, high=1.0)
        every = torch.cat([x.reshape(-1) for x in case.scores.values()])
        k = target * len(every)
        limit = every.sort(descending=True).values[math.ceil(k) - 1]
        assert sum(found[x.tensor] * case.scores[x.tensor].numel() for x in case.covered) == pytest.approx(k, abs=1e-6)
        for key, share in found.items():
            assert share * case.scores[key].numel() == pytest.approx(float((case.scores[key] >= limit).sum()), abs=1.01)

    def test_no_other_choice_of_as_many_leaves_less_error(self, case: Case) -> None:
        def error(shares: dict[str, float]) -> float:
            total = 0.0
            for key, share in shares.items():
                costs = case.scores[key].double().square().reshape(-1).sort(descending=True).values
                total += float(costs[round(share * len(costs)) :].sum())
            return total

        best = case.shares(target=0.2, low=0.0, high=1.0)
        uniform = dict.fromkeys(best, 0.2)
        assert error(best) < error(uniform)
        keys, sizes = list(best), {key: case.scores[key].numel() for key in best}
        for one, other in pairwise(keys):  # move one element from a tensor to the next
            if best[one] * sizes[one] < 1:
                continue
            moved = best | {one: best[one] - 1 / sizes[one], other: best[other] + 1 / sizes[other]}
            assert error(moved) >= error(best) * (1 - 1e-9)

    def test_holds_the_bounds_and_the_budget_together(self, case: Case) -> None:
        found = case.shares(target=0.3, low=0.25, high=0.35)
        sizes = {x.tensor: case.scores[x.tensor].numel() for x in case.covered}
        assert all(0.25 - 1e-9 <= share <= 0.35 + 1e-9 for share in found.values())
        assert {round(share, 2) for share in found.values()} >= {0.25, 0.35}
        mean = sum(found[key] * n for key, n in sizes.items()) / sum(sizes.values())
        assert mean == pytest.approx(0.3, abs=1 / sum(sizes.values()))

    @pytest.mark.parametrize("target", [0.301, 0.3, 0.8])
    def test_meets_a_budget_at_its_bounds_exactly(self, case: Case, target: float) -> None:
        found = case.shares(target=target, low=0.3, high=0.8)  # of no tensor a whole number of elements
        sizes = {key: case.scores[key].numel() for key in found}
        assert sum(found[key] * n for key, n in sizes.items()) / sum(sizes.values()) == pytest.approx(target, rel=1e-12)
        assert all(0.3 - 1e-12 <= share <= 0.8 + 1e-12 for share in found.values())

    def test_ties_are_shared(self, family: Family, tmp_path: Path) -> None:
        case = Case(family.base, rewrite(family.base, tmp_path / "same", lambda _, t: t))  # no delta: all scores 0
        found = case.shares(target=0.4, low=0.0, high=1.0)
        assert list(found.values()) == pytest.approx([0.4] * len(found), abs=1e-4)

    def test_takes_a_few_bytes_for_each_bin_of_a_layer(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mixture of experts with 18,624 layers took tens of gigabytes."""
        generator = torch.Generator().manual_seed(0)
        deltas = {f"{i}": torch.randn(16, 16, generator=generator) for i in range(100)}
        covered = [Covered(name, (Layer(name, 0, "up", 256),), (None,), name) for name in deltas]
        moments = {name: torch.ones(16) for name in deltas}
        monkeypatch.setattr(global_threshold, "task_vector", lambda base, expert, tensor: deltas[tensor].clone())
        tracemalloc.start()
        try:
            found = global_threshold.shares(case.base, case.expert, covered, moments, target=0.2, low=0.0, high=1.0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert sum(share or 0 for share in found.values()) == pytest.approx(0.2 * 100)
        assert peak < 4 * len(covered) * (1 << 16)


def test_a_base_that_is_no_ancestor_is_told_with_numbers(family: Family, tmp_path: Path) -> None:
    base, tensors = Checkpoint(family.base, "b"), [x.tensor for x in network_of(Checkpoint(family.base, "b")).covered]
    stranger = Checkpoint(write_llama(tmp_path / "stranger", seed=9), "s")
    told = evidence.unrelated("org/stranger", base, stranger, tensors) or ""
    assert told.startswith("org/stranger: its weights differ from the base's by 1") and "is base_model" in told
    kin = Checkpoint(rewrite(family.base, tmp_path / "kin", lambda _, t: t * 1.05), "k")
    assert evidence.unrelated("kin", base, kin, tensors) is None

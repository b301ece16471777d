"""The merge methods on tensors small enough to work out by hand, and what `trim` and `drop` keep."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lewis.merge import random_stream
from lewis.methods import METHODS, Parameter
from lewis.methods.dare import dare_linear, dare_ties
from lewis.methods.linear import linear
from lewis.methods.sparsify import drop, match_l1, trim
from lewis.methods.task_arithmetic import task_arithmetic
from lewis.methods.ties import ties


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-7)


class FixedStream:
    """Draws these numbers instead of random ones."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = np.array(numbers, np.float32)

    def random(self, size: int, dtype: type) -> np.ndarray:
        assert (size, dtype) == (len(self.numbers), np.float32)
        return self.numbers


class TestLinear:
    def test_is_the_weighted_mean(self) -> None:
        # (1 * [1, 2, -3] + 3 * [5, -2, 1]) / 4
        close(linear(rows([1, 2, -3], [5, -2, 1]), weight=[1.0, 3.0]), [4.0, -1.0, 0.0])

    def test_is_the_weighted_sum_without_normalize(self) -> None:
        close(linear(rows([1, 2, -3], [5, -2, 1]), weight=[0.5, -1.0], normalize=False), [-4.5, 3.0, -2.5])

    def test_refuses_an_average_with_weights_that_cancel(self) -> None:
        with pytest.raises(ValueError, match=r"weights \[1.0, -1.0\] sum to 0.*normalize: false"):
            linear(rows([1], [2]), weight=[1.0, -1.0])


class TestTaskArithmetic:
    def test_adds_what_the_weights_say(self) -> None:
        close(task_arithmetic(rows([1, -2, 0], [3, 4, -1]), weight=[2.0, -0.5]), [0.5, -6.0, 0.5])

    def test_normalize_divides_by_the_sum_of_the_weights(self) -> None:
        close(task_arithmetic(rows([1, -2], [3, 4]), weight=[1.0, 3.0], normalize=True), [2.5, 2.5])

    def test_normalize_leaves_weights_that_cancel_alone(self) -> None:
        close(task_arithmetic(rows([1, -2], [3, 4]), weight=[1.0, -1.0], normalize=True), [-2.0, -6.0])

    def test_lambda_scales_the_result(self) -> None:
        close(task_arithmetic(rows([1, -2], [3, 4]), lambda_=0.5), [2.0, 1.0])


class TestTies:
    def test_trims_elects_and_averages_those_that_agree(self) -> None:
        # density 3/5 keeps [4, -3, 0, 2, 0] and [0, 6, 0, -4, 5]; sums 4, 3, 0, -2, 5 elect + + + - +.
        vectors = rows([4, -3, 0.5, 2, 0.1], [1, 6, 0.2, -4, 5])
        close(ties(vectors, density=0.6), [4.0, 6.0, 0.0, -4.0, 5.0])

    def test_averages_where_signs_agree(self) -> None:
        close(ties(rows([4, -3, 2], [2, -1, -6])), [3.0, -2.0, -6.0])

    def test_weights_move_the_election_and_the_average(self) -> None:
        # weighted rows [3, -9], [1, 1], [-2, 2]: sums 2 and -6; (3 + 1) / (3 + 1) and -9 / 3.
        close(ties(rows([1, -3], [1, 1], [-2, 2]), weight=[3.0, 1.0, 1.0]), [1.0, -3.0])

    def test_a_sum_of_zero_elects_plus(self) -> None:
        close(ties(rows([2, -2], [-2, 2])), [2.0, 2.0])

    def test_a_negative_weight_turns_its_vector_round(self) -> None:
        # weighted rows [2, -4], [-6, -1]: sums -4, -5. First: -6 / -1. Second: (-4 - 1) / (1 - 1), which counts as 1.
        close(ties(rows([2, -4], [6, 1]), weight=[1.0, -1.0]), [6.0, -5.0])

    def test_without_normalize_the_agreeing_are_summed(self) -> None:
        close(ties(rows([4, -3, 2], [2, -1, -6]), normalize=False), [6.0, -4.0, -6.0])

    def test_lambda_scales_the_result(self) -> None:
        close(ties(rows([4, -3], [2, -1]), lambda_=0.5), [1.5, -1.0])

    def test_rescale_restores_the_l1_norm(self) -> None:
        # Kept [4, -4, 0, 0] of an L1 norm of 10: times 10 / 8.
        close(ties(rows([4, -4, 1, 1]), density=0.5, rescale=True), [5.0, -5.0, 0.0, 0.0])

    def test_each_expert_has_its_own_density(self) -> None:
        close(ties(rows([4, 3, 2, 1], [-1, -2, -3, -4]), density=[0.25, 0.5]), [4.0, 0.0, -3.0, -4.0])

    def test_refuses_a_density_too_few(self) -> None:
        with pytest.raises(ValueError, match="one value for each of the 2 experts, got 1"):
            ties(rows([1], [2]), density=[0.5])


class TestDare:
    def test_linear_drops_and_restores_the_l1_norm(self) -> None:
        # 0.4 and 0.1 lie below the density: [4, 0, 0, 2] is kept, of an L1 norm of 10: times 10 / 6.
        delta = dare_linear(rows([4, -3, 1, 2]), [FixedStream(0.4, 0.5, 0.9, 0.1)], density=0.5)  # type: ignore[list-item]
        close(delta, [20 / 3, 0.0, 0.0, 10 / 3])

    def test_linear_sums_with_weights(self) -> None:
        streams = [FixedStream(0.0, 0.9, 0.0), FixedStream(0.9, 0.0, 0.0)]
        delta = dare_linear(
            rows([4, -3, 1], [2, 5, -6]), streams, density=0.5, weight=[1.0, -2.0], rescale=False, lambda_=0.5
        )  # type: ignore[arg-type]
        close(delta, [2.0, -5.0, 6.5])  # 0.5 * [4, -10, 1 + 12]

    def test_linear_normalizes_by_all_weights(self) -> None:
        streams = [FixedStream(0.0, 0.9), FixedStream(0.0, 0.0)]
        delta = dare_linear(
            rows([4, -3], [2, 5]), streams, density=0.5, weight=[1.0, 3.0], normalize=True, rescale=False
        )  # type: ignore[arg-type]
        close(delta, [2.5, 3.75])

    def test_ties_elects_among_what_is_left(self) -> None:
        # Left [4, 0, 1] and [-6, 5, -1]; sums -2, 5, 0: -6 wins, 5 is alone, +1 wins the tie.
        streams = [FixedStream(0.0, 0.9, 0.0), FixedStream(0.0, 0.0, 0.0)]
        delta = dare_ties(rows([4, -3, 1], [-6, 5, -1]), streams, density=[0.5, 0.5], rescale=False)  # type: ignore[arg-type]
        close(delta, [-6.0, 5.0, 1.0])

    def test_ties_with_a_negative_weight(self) -> None:
        # weighted rows [4, -3], [6, -5] agree; divided by 1 - 1 = 0, which counts as 1.
        streams = [FixedStream(0.0, 0.0)] * 2
        delta = dare_ties(
            rows([4, -3], [-6, 5]), streams, density=0.5, weight=[1.0, -1.0], normalize=True, rescale=False
        )  # type: ignore[arg-type]
        close(delta, [10.0, -8.0])

    def test_keeps_the_share_asked_for(self) -> None:
        kept = drop(torch.ones(100, 100), 0.3, random_stream(0, "expert", "tensor"))
        assert abs(float(kept.sum()) - 3000) < 5 * (10000 * 0.3 * 0.7) ** 0.5

    def test_streams_differ_by_seed_expert_and_tensor_only(self) -> None:
        def draw(*key: object) -> float:
            return float(random_stream(*key).random())  # type: ignore[arg-type]

        assert draw(0, "a", "t") == draw(0, "a", "t")
        assert len({draw(0, "a", "t"), draw(1, "a", "t"), draw(0, "b", "t"), draw(0, "a", "u")}) == 4

    def test_a_vector_of_which_nothing_is_left_stays_zero(self) -> None:
        zero = torch.zeros(3)
        assert torch.equal(match_l1(zero, torch.ones(3)), zero)


class TestTrim:
    def test_keeps_the_largest_magnitudes(self) -> None:
        close(trim(torch.tensor([0.1, -5, 3, -0.2, 4]), 0.6), [0.0, -5.0, 3.0, 0.0, 4.0])

    @given(
        st.lists(st.sampled_from([0.5, -0.5, 1.0, -1.0, 2.0, 0.25]), min_size=1, max_size=80),
        st.floats(0, 1, allow_nan=False),
    )
    def test_keeps_exactly_k_however_many_are_equal(self, values: list[float], density: float) -> None:
        vector = torch.tensor(values)
        kept, k = trim(vector, density), int(density * len(values))
        assert int((kept != 0).sum()) == k
        assert bool(((kept == vector) | (kept == 0)).all())
        dropped = vector[kept == 0].abs()
        assert k in (0, len(values)) or float(kept[kept != 0].abs().min()) >= float(dropped.max())

    def test_ties_are_spread_over_the_tensor(self) -> None:
        kept = trim(torch.ones(64, 64), 0.25)
        per_row = kept.sum(dim=1)
        assert kept.sum() == 1024
        assert float(per_row.min()) >= 8 and float(per_row.max()) <= 24  # "lowest index first" gives 64 and 0

    def test_ties_follow_the_documented_permutation(self) -> None:
        order = sorted(range(10), key=lambda i: i * 0x9E3779B97F4A7C15 % 2**64)
        kept = trim(torch.full((10,), -0.5), 0.4)
        assert torch.nonzero(kept).flatten().tolist() == sorted(order[:4])

    def test_larger_ones_go_before_ties(self) -> None:
        vector = torch.tensor([1.0] * 9 + [2.0])
        for density in (0.1, 0.5, 0.9):
            assert trim(vector, density)[-1] == 2

    def test_keeps_the_shape(self) -> None:
        assert trim(torch.rand(2, 3, 4), 0.5).shape == (2, 3, 4)


class TestRegistry:
    def test_holds_the_methods_of_mergekit_by_name(self) -> None:
        assert set(METHODS) == {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"}
        assert Counter(m.on for m in METHODS.values()) == {"task_vectors": 4, "weights": 1}
        assert {m.name for m in METHODS.values() if m.random} == {"dare_linear", "dare_ties"}

    def test_the_signature_is_the_schema(self) -> None:
        parameters = METHODS["ties"].parameters
        assert parameters["density"] == Parameter("density", float, True, 1.0)
        assert parameters["lambda"] == Parameter("lambda", float, False, 1.0)
        assert parameters["normalize"] == Parameter("normalize", bool, False, True)

    @pytest.mark.parametrize(
        "name, value, expected",
        [
            ("density", 0, "0 < density <= 1"),
            ("density", 1.5, "0 < density <= 1"),
            ("weight", "much", "a finite number, got 'much'"),
            ("weight", True, "a finite number, got True"),
            ("weight", float("nan"), "a finite number"),
            ("normalize", 1, "true or false, got 1"),
        ],
    )
    def test_a_value_of_the_wrong_kind_is_refused(self, name: str, value: object, expected: str) -> None:
        with pytest.raises(ValueError, match=expected):
            METHODS["ties"].parameters[name].parse(value)

    def test_a_number_written_as_text_is_one(self) -> None:
        assert METHODS["ties"].parameters["weight"].parse("1e-3") == 0.001

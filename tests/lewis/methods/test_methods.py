"""The merge methods on tensors small enough to work out by hand, and what `trim` and `drop` keep."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis.allocation.step import aim
from lewis.merging.prepared import random_stream
from lewis.methods import METHODS, Parameter, registry
from lewis.methods.arcee_fusion import arcee_fusion
from lewis.methods.arithmetic.sparsify import drop, match_l1, trim
from lewis.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from lewis.methods.consensus import consensus
from lewis.methods.dare import dare_linear, dare_ties
from lewis.methods.della import della, della_linear
from lewis.methods.karcher import karcher
from lewis.methods.linear import linear
from lewis.methods.loops import Combine, Loops
from lewis.methods.model_stock import model_stock
from lewis.methods.multislerp import multislerp
from lewis.methods.nearswap import nearswap
from lewis.methods.nuslerp import nuslerp
from lewis.methods.passthrough import passthrough
from lewis.methods.pcb import pcb
from lewis.methods.ram import ram, ramplus_tl
from lewis.methods.registry import Count, Fraction, NotNegative, PerExpert, Range, merge_method
from lewis.methods.sce import sce
from lewis.methods.slerp import slerp
from lewis.methods.task_arithmetic import task_arithmetic
from lewis.methods.ties import ties


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-7)


class FixedStream:
    """Draws these numbers instead of random ones."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = np.array(numbers, np.float32)

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.numbers)
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

    def test_weights_that_cancel_but_for_rounding_are_not_divided_by(self) -> None:
        """In fp32, 0.3 + 0.6 - 0.9 is 6e-8: elements became a million times as large."""
        given = rows([2, 1], [2, 1], [-2, 1])
        close(ties(given, weight=[0.3, 0.6, -0.9]), [3.6, 1.0])

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
            return float(random_stream(*key).random(1)[0])  # type: ignore[arg-type]

        assert draw(0, "a", "t") == draw(0, "a", "t")
        assert len({draw(0, "a", "t"), draw(1, "a", "t"), draw(0, "b", "t"), draw(0, "a", "u")}) == 4

    def test_a_vector_of_which_nothing_is_left_stays_zero(self) -> None:
        zero = torch.zeros(3)
        assert torch.equal(match_l1(zero, torch.ones(3)), zero)


class TestBreadcrumbs:
    def test_drops_the_largest_and_keeps_the_next(self) -> None:
        # 1 of 5 is dropped (5), the next 2 of 5 are kept.
        close(breadcrumbs(rows([5, -4, 3, -2, 1]), density=0.4, gamma=0.2), [0, -4, 3, 0, 0])

    def test_drops_fewer_where_the_density_would_not_be_reached(self) -> None:
        close(breadcrumbs(rows([5, -4, 3, -2, 1]), density=0.4, gamma=0.9), [0, 0, 0, -2, 1])

    @pytest.mark.parametrize("gamma", [0.0, 0.01])
    def test_small_tensors_and_gamma_0_lose_no_outlier(self, gamma: float) -> None:
        close(breadcrumbs(rows([5, -4, 3]), density=0.7, gamma=gamma), [5, -4, 0])

    def test_density_1_keeps_outliers_too(self) -> None:
        close(breadcrumbs(rows([5, -4, 3]), gamma=0.5, weight=0.5, lambda_=2.0), [5, -4, 3])

    def test_rescale_restores_the_l1_norm(self) -> None:
        close(breadcrumbs(rows([5, -4, 3, -2, 1]), density=0.4, gamma=0.2, rescale=True), [0, -60 / 7, 45 / 7, 0, 0])

    def test_ties_elects_among_what_is_left(self) -> None:
        # left [0, -4, 3, 0, 0] and [0, 2, 0, 3, 0]: sums -2, 3, 3
        vectors = rows([5, -4, 3, -2, 1], [1, 2, -9, 3, 0])
        close(breadcrumbs_ties(vectors, density=0.4, gamma=0.2), [0, -4, 3, 3, 0])

    def test_each_expert_has_its_own_gamma(self) -> None:
        close(breadcrumbs(rows([4, 3, 2, 1], [4, 3, 2, 1]), density=0.25, gamma=[0.25, 0.5]), [0, 3, 2, 0])


class TestDella:
    def test_small_ones_are_dropped_more_often(self) -> None:
        # Ranks of 4, 1, 2: last, first, middle; kept with probability 0.7, 0.3, 0.5.
        for numbers, kept in (((0.69, 0.29, 0.49), [4.0, -1, 2]), ((0.71, 0.31, 0.51), [0.0, 0, 0])):
            delta = della_linear(rows([4, -1, 2]), [FixedStream(*numbers)], density=0.5, epsilon=0.2, rescale=False)  # type: ignore[list-item]
            close(delta, kept)

    def test_rescale_restores_the_l1_norm(self) -> None:
        delta = della(rows([4, -1, 2]), [FixedStream(0.6, 0.4, 0.6)], density=0.5, epsilon=0.2)  # type: ignore[list-item]
        close(delta, [7, 0, 0])

    def test_equals_share_their_ranks_and_rows_are_ranked_apart(self) -> None:
        # Row [1, -1, 3]: ranks 1/4, 1/4, 1, so 0.4, 0.4, 0.7; row [5, 5, 5]: all 1/2, so 0.5.
        vector = torch.tensor([[[1.0, -1, 3], [5, 5, 5]]])
        for shift, kept in ((-0.01, vector[0]), (0.01, torch.zeros(2, 3))):
            numbers = [each + shift for each in (0.4, 0.4, 0.7, 0.5, 0.5, 0.5)]
            delta = della_linear(vector, [FixedStream(*numbers)], density=0.5, epsilon=0.2, rescale=False)  # type: ignore[list-item]
            assert torch.equal(delta, kept)

    def test_the_only_element_of_a_row_is_kept_with_the_density(self) -> None:
        for number, kept in ((0.29, 2.0), (0.31, 0.0)):
            close(della_linear(rows([2]), [FixedStream(number)], density=0.3, epsilon=0.2, rescale=False), [kept])  # type: ignore[list-item]

    def test_elects_among_what_is_left(self) -> None:
        # All is kept but the 2: sums 1, -6; then as TIES without normalize.
        streams = [FixedStream(0.0, 0.99), FixedStream(0.0, 0.0)]
        delta = della(rows([4, 2], [-3, -6]), streams, density=0.5, epsilon=0.1, rescale=False, normalize=False)  # type: ignore[arg-type]
        close(delta, [4, -6])

    def test_density_0_and_1_need_no_probabilities(self) -> None:
        assert torch.equal(
            della(rows([4, -1], [3, 3]), [FixedStream()] * 2, density=[1.0, 0.0]), torch.tensor([4.0, -1])
        )  # type: ignore[list-item]

    def test_probabilities_beyond_0_and_1_are_refused(self) -> None:
        for method in (della, della_linear):
            with pytest.raises(ValueError, match=r"got density=0.9, epsilon=0.15; set epsilon below 0.1"):
                method(rows([1]), [FixedStream(0.5)], density=0.9)


class TestSce:
    def test_weighs_by_energy_and_merges_the_elected_sign(self) -> None:
        # Energies 5 and 29, sums 6, 2, 2 elect +: (2 * 5 + 4 * 29) / 34, and the second alone twice.
        close(sce(rows([2, 0, -1], [4, 2, 3])), [126 / 34, 2, 3])

    def test_selects_by_variance(self) -> None:
        # Variances 1, 1, 4: int(3 * 0.34) = 1 is kept, of which + is elected.
        close(sce(rows([2, 0, -1], [4, 2, 3]), select_topk=0.34), [0, 0, 3])

    def test_one_expert_has_no_variance(self) -> None:
        close(sce(rows([2, -1])), [2, -1])
        close(sce(rows([2, -1]), select_topk=0.9), [0, 0])


class TestModelStock:
    def test_goes_as_far_as_the_task_vectors_agree(self) -> None:
        # cos 45 degrees = 0.7071: t = 2 * 0.7071 / 1.7071 = 0.82843, times the mean [1.5, 0.5]
        close(model_stock(rows([2, 0], [1, 1])), [1.2426407, 0.4142136])

    def test_three(self) -> None:
        # cosines 1, 0, 0: c = 1/3, t = 1 / (1 + 2/3) = 0.6, mean [2/3, 1/3]
        close(model_stock(rows([1, 0], [1, 0], [0, 1])), [0.4, 0.2])

    def test_stays_at_the_base_where_they_cancel_or_are_perpendicular(self) -> None:
        close(model_stock(rows([1, 0], [-1, 0])), [0, 0])
        close(model_stock(rows([1, 0], [0, 1])), [0, 0])
        close(model_stock(rows([0, 0], [0, 1])), [0, 0])

    def test_each_filter_by_itself(self) -> None:
        vectors = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]]])
        assert torch.equal(model_stock(vectors, filter_wise=True), torch.tensor([[1.0, 0], [0, 0]]))
        close(model_stock(rows([2, 0], [1, 1]), filter_wise=True), [1.2426407, 0.4142136])


class TestRam:
    def test_averages_over_those_that_changed_an_element(self) -> None:
        close(ram(rows([2, 0, -1, 1e-6], [4, 3, 0, 0])), [3, 3, -1, 0])

    def test_plus_scales_what_one_alone_changed(self) -> None:
        # Each has one element shared and one alone: 1 + 0.5 * min(0.2, 1 / 1)
        close(ramplus_tl(rows([2, 0, -1], [4, 3, 0]), r=0.5), [3, 3.3, -1.1])


class TestTwoModels:
    def test_nearswap_takes_what_is_near(self) -> None:
        # |-2| is 4 times as far: a quarter of the way
        close(nearswap(rows([0.1, -2, 0.5, 0]), t=0.5), [0.1, -0.5, 0.5, 0])
        close(nearswap(rows([0.1, -2]), t=0.0), [0, 0])

    def test_arcee_fusion_takes_what_stands_out(self) -> None:
        # One row: importance goes by |delta|. Quartiles 2, 3, 4: from 3 + 1.5 * 2 = 6 on.
        close(arcee_fusion(rows([1, 2, -3, 4, 20]), torch.zeros(5)), [0, 0, 0, 0, 20])

    def test_arcee_fusion_sees_no_change_in_a_shifted_row(self) -> None:
        # The softmax of [1, 1] is that of [0, 0]. Importances 0, 0, 0, 0, 0, 2k: the threshold is 0.
        delta = torch.tensor([[[1.0, 1], [0, 0], [0, 2]]])
        assert torch.equal(arcee_fusion(delta, torch.zeros(3, 2)), delta[0])
        # Importances 0, 0, k, 3k: quartiles 0, 0, k: from 1.5 k on.
        assert torch.equal(
            arcee_fusion(torch.tensor([[[1.0, 1], [1, 3]]]), torch.zeros(2, 2))[1], torch.tensor([0.0, 3])
        )

    def test_passthrough_scales(self) -> None:
        close(passthrough(rows([1, -2]), scale=0.5), [0.5, -1])


class TestSlerp:
    def test_a_quarter_circle(self) -> None:
        # sin 45 / sin 90 of each
        close(slerp(rows([0, 2]), torch.tensor([1.0, 0]), t=0.5), [0.7071068, 1.4142136])

    def test_sixty_degrees(self) -> None:
        # sin 30 / sin 60 of each: 0.57735 * (1.5, 0.8660254)
        close(slerp(rows([0.5, 0.8660254]), torch.tensor([1.0, 0]), t=0.5), [0.8660254, 0.5])

    def test_opposite_tensors_are_interpolated_on_the_line(self) -> None:
        close(slerp(rows([-2, -4]), torch.tensor([1.0, 2]), t=0.25), [0.25, 0.5])

    def test_a_tensor_of_zeros_is_perpendicular(self) -> None:
        close(slerp(rows([2, 4]), torch.zeros(2), t=1 / 3), [1, 2])  # sin 30

    def test_the_ends_are_exact(self) -> None:
        base, other = torch.rand(9), torch.rand(9)
        assert torch.equal(slerp(other[None], base, t=0.0), base)
        assert torch.equal(slerp(other[None], base, t=1.0), other)


class TestNuslerp:
    def test_weights_say_where(self) -> None:
        # t = 3/4 of 90 degrees: sin 22.5, sin 67.5
        close(nuslerp(rows([1, 0], [0, 2]), weight=[1.0, 3.0]), [0.3826834, 1.8477591])

    def test_weights_that_cancel_give_the_middle(self) -> None:
        close(nuslerp(rows([1, 0], [0, 2]), weight=[1.0, -1.0]), [0.7071068, 1.4142136])

    def test_vector_by_vector(self) -> None:
        tensors = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [0, 3]]])
        # Rows: perpendicular; parallel.
        by_last = nuslerp(tensors, nuslerp_flatten=False)
        torch.testing.assert_close(by_last, torch.tensor([[0.7071068, 0.7071068], [0, 2]]))
        # Columns: [1, 0] and zeros; [0, 1] and [1, 3], 18.435 degrees apart: sin 9.2175 / sin 18.435 = 0.5065407.
        by_first = nuslerp(tensors, nuslerp_flatten=False, nuslerp_row_wise=True)
        torch.testing.assert_close(by_first, torch.tensor([[0.7071068, 0.5065407], [0, 2.0261630]]))

    def test_opposite_tensors_are_interpolated_on_the_line(self) -> None:
        close(nuslerp(rows([1, 2], [-3, -6])), [-1, -2])


class TestMultislerp:
    def test_mean_direction_and_mean_length(self) -> None:
        # (1, 1) / sqrt 2, times (3 + 1) / 2
        close(multislerp(rows([3, 0], [0, 1])), [1.4142136, 1.4142136])

    def test_weights(self) -> None:
        # directions 3/4 (1, 0) + 1/4 (0, 1), |.| = 0.790569; length 3/4 * 2 + 1/4 * 4 = 2.5
        close(multislerp(rows([2, 0], [0, 4]), weight=[3.0, 1.0]), [2.3717082, 0.7905694])

    def test_weights_as_they_are(self) -> None:
        # length 3 * 2 + 1 * 4 = 10
        close(multislerp(rows([2, 0], [0, 4]), weight=[3.0, 1.0], normalize_weights=False), [9.486833, 3.1622777])

    def test_two_that_cancel_are_added(self) -> None:
        close(multislerp(rows([1, 2], [-2, -4])), [-0.5, -1])

    def test_a_frozen_tensor_stays(self) -> None:
        close(multislerp(rows([0, 0], [0, 0], [0, 0])), [0, 0])

    def test_one_model_is_itself(self) -> None:
        close(multislerp(rows([3, 4]), weight=0.3), [3, 4])

    def test_what_has_no_direction_is_refused(self) -> None:
        with pytest.raises(ValueError, match="cancel out"):
            multislerp(rows([1, 0], [-1, 0], [0, 0]))
        with pytest.raises(ValueError, match=r"\[1.0, -1.0\] sum to 0"):
            multislerp(rows([1, 0], [0, 1]), weight=[1.0, -1.0])


class TestKarcher:
    def test_the_middle_of_two(self) -> None:
        close(karcher(rows([1, 0], [0, 3])), [1.4142136, 1.4142136])

    def test_the_mean_angle_of_three(self) -> None:
        # 0, 0 and 90 degrees: 30 (the mean vector points to 26.6); lengths 1, 1, 4: 2
        close(karcher(rows([1, 0], [1, 0], [0, 4])), [1.7320508, 1])

    def test_zeros_shorten_but_do_not_turn(self) -> None:
        close(karcher(rows([0, 0], [0, 4])), [0, 2])
        close(karcher(rows([0, 0], [0, 0])), [0, 0])

    def test_opposite_models_give_the_first(self) -> None:
        close(karcher(rows([1, 0], [-3, 0])), [2, 0])


class TestPcb:
    def test_a_conflict_is_won_by_the_stronger(self) -> None:
        # Element 1 sums to 1.5: the -0.5 goes against it and has no score. Element 0: both score e^2 tanh, the top.
        close(pcb(rows([1, -0.5], [3, 2])), [2, 2])

    def test_scores_weigh(self) -> None:
        # s = [1, 0, 1/2] and [0, 1, 0]; N = 2; sums 2, 3, 2.
        # beta_1 = e^2 tanh 6, tanh 1 * 3, e^(1/2) tanh 4; beta_2 = tanh -1 < 0, ...
        one, two = torch.tensor([3.0, 1, 2]), torch.tensor([-1.0, 2, 0])
        delta = pcb(torch.stack([one, two]), lambda_=2.0)
        e = np.exp
        first = np.array([e(2) * np.tanh(6), np.tanh(3), e(0.5) * np.tanh(4)]) / (e(2) * np.tanh(6))
        second = np.array([0, 1, 0])  # s_2 = [1/2, 1, 0]; the third has beta 0
        middle = (first[1] * 1 + second[1] * 2) / (first[1] + second[1])
        close(delta, [2 * 3, 2 * middle, 2 * 2])

    def test_density_keeps_the_highest_scores(self) -> None:
        # beta_1 = [e^2 tanh 4, tanh 0.25], beta_2 = [e^2 tanh 12, 0]
        vectors = rows([1, 0.5], [3, 0])
        close(pcb(vectors), [2, 0.5])
        close(pcb(vectors, density=0.5), [2, 0])


class TestConsensus:
    def test_keeps_what_two_claim(self) -> None:
        # Sums 3, 2, 4. Element 0: 2 > 0.4 * 1 and 1 > 0.4 * 2. Element 1: 3 > 0.4 * 1, but 1 < 0.4 * 3. Element 2: one.
        vectors = rows([2, 3, 0], [1, -1, 4])
        close(consensus(vectors), [3, 0, 0])
        close(consensus(vectors, min_agree=1), [3, 2, 4])
        close(consensus(vectors, tall_lambda=0.3), [3, 2, 0])
        close(consensus(vectors, tall_lambda=0.6), [0, 0, 0])

    def test_weights_count_before_the_claims(self) -> None:
        # Weighted [2, 3], [3, -3]: sums 5, 0; all claimed.
        close(consensus(rows([2, 3], [1, -1]), weight=[1.0, 3.0], lambda_=0.5), [2.5, 0])

    def test_density_trims_first(self) -> None:
        close(consensus(rows([2, 3, 0], [1, -1, 4]), density=0.4, min_agree=1), [0, 3, 4])

    def test_more_than_there_are_cannot_agree(self) -> None:
        with pytest.raises(ValueError, match="min_agree <= 2, the number of experts, got min_agree=3"):
            consensus(rows([1], [2]), min_agree=3)


class TestAim:
    def test_holds_back_what_the_base_uses_most(self) -> None:
        # 1 - 0.5 * [1/4, 1]
        assert torch.equal(aim(torch.tensor([1.0, 4]), 0.5), torch.tensor([0.875, 0.5]))
        assert torch.equal(aim(torch.tensor([[1.0], [4]]), 0.0), torch.tensor([[0.75], [0]]))

    def test_stacked_experts_have_a_maximum_each(self) -> None:
        held = aim(torch.tensor([[[1.0, 2]], [[8.0, 4]]]), 0.5)
        assert torch.equal(held, torch.tensor([[[0.75, 0.5]], [[0.5, 0.75]]]))

    def test_omega_1_and_an_unused_layer_change_nothing(self) -> None:
        assert torch.equal(aim(torch.tensor([1.0, 4]), 1.0), torch.ones(2))
        assert torch.equal(aim(torch.zeros(2), 0.2), torch.ones(2))


def call(name: str, tensors: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """A method on as many of the tensors as it takes, parameters away from their defaults."""
    method = METHODS[name]
    tensors = tensors[: method.experts[1]]
    values = {"density": 0.5, "t": 0.3, "weight": [1.0, 0.7, 1.3, 0.5][: len(tensors)], "epsilon": 0.1}
    values = {key: value for key, value in values.items() if key in method.parameters}
    if method.random:
        values["streams"] = [random_stream(0, str(i), "t") for i in range(len(tensors))]
    return method(tensors, **values, **({"base": base} if method.takes_base else {}))


class TestEveryMethod:
    numbers = st.lists(st.floats(-4, 4, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0), min_size=12, max_size=12)
    stacks = st.lists(numbers, min_size=2, max_size=4)
    shapes = st.sampled_from([(12,), (3, 4), (12, 1), (2, 3, 2)])

    @settings(max_examples=15, deadline=None)
    @given(values=stacks, shape=shapes)
    @pytest.mark.parametrize("name", METHODS)
    def test_is_finite_fp32_and_the_same_twice(
        self, name: str, values: list[list[float]], shape: tuple[int, ...]
    ) -> None:
        stack = torch.tensor(values).reshape(-1, *shape)
        before = stack.clone()
        try:
            first, second = (call(name, stack, stack[0] + 1) for _ in range(2))
        except ValueError as error:
            assert "cancel out" in str(error)
            return
        assert first.dtype == torch.float32 and first.shape == shape
        assert bool(torch.isfinite(first).all()) and torch.equal(first, second)
        assert torch.equal(stack, before)

    @pytest.mark.parametrize("name", METHODS)
    def test_the_number_of_threads_changes_no_byte(self, name: str) -> None:
        generator = torch.Generator().manual_seed(0)
        stack = torch.randn((3, 301, 403), generator=generator)  # large enough for torch to split its sums
        base, threads = torch.randn((301, 403), generator=generator), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = call(name, stack, base)
            torch.set_num_threads(3)
            assert torch.equal(call(name, stack, base), one)
        finally:
            torch.set_num_threads(threads)

    @settings(max_examples=20, deadline=None)
    @given(values=stacks, power=st.integers(-30, 30))
    @pytest.mark.parametrize(
        "name", ["ties", "breadcrumbs_ties", "sce", "model_stock", "consensus", "slerp", "linear", "della"]
    )
    def test_knows_no_scale(self, name: str, values: list[list[float]], power: int) -> None:
        stack, base = torch.tensor(values), torch.tensor(values[0][::-1])
        scaled = call(name, stack * 2.0**power, base * 2.0**power)
        torch.testing.assert_close(scaled, call(name, stack, base) * 2.0**power, rtol=1e-6, atol=0)

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**32), order=st.permutations(range(4)), scale=st.sampled_from([1e-4, 1.0]))
    @pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.experts[1] is None and not m.random])
    def test_the_order_of_experts_is_of_no_account(self, name: str, seed: int, order: list[int], scale: float) -> None:
        stack = scale * torch.randn((4, 5, 5), generator=torch.Generator().manual_seed(seed))
        own = {"density": [0.3, 0.9, 0.5, 0.6], "weight": [1.0, 0.7, 1.3, 0.5]}
        own = {key: value for key, value in own.items() if key in METHODS[name].parameters}
        other = {key: [value[i] for i in order] for key, value in own.items()}
        first, second = METHODS[name](stack, **own), METHODS[name](stack[order], **other)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5 * scale)


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

    def test_a_scale_per_input_channel_changes_what_is_largest(self) -> None:
        # scores 4, 6, 2 and 5, 2, 6
        vector, scale = torch.tensor([[4.0, -3, 1], [5, 1, 3]]), torch.tensor([1.0, 2, 2])
        assert torch.equal(trim(vector, 0.5, scale), torch.tensor([[0.0, -3, 0], [5, 0, 3]]))
        assert torch.equal(trim(vector, 0.5, torch.ones(3)), trim(vector, 0.5))


class TestRegistry:
    def test_holds_the_methods_of_mergekit_by_name(self) -> None:
        mergekits = """linear slerp nuslerp multislerp karcher task_arithmetic ties dare_linear dare_ties breadcrumbs
            breadcrumbs_ties della della_linear sce model_stock nearswap arcee_fusion ram ramplus_tl passthrough"""
        assert set(METHODS) == {*mergekits.split(), "pcb", "consensus", "regmean", "regmean_forward"}
        assert Counter(m.on for m in METHODS.values()) == {"task_vectors": 18, "weights": 4, "either": 2}
        assert {m.name for m in METHODS.values() if m.random} == {"dare_linear", "dare_ties", "della", "della_linear"}
        assert {m.name for m in METHODS.values() if m.in_mergekit} == set(mergekits.split())
        assert {m.name for m in METHODS.values() if m.takes_base} == {"slerp", "arcee_fusion"}

    def test_a_name_is_given_once(self) -> None:
        with pytest.raises(ValueError, match=r"the merge method 'ties' exists already, in lewis.methods.ties"):

            @merge_method("ties", paper="https://example.org")
            def other(task_vectors: torch.Tensor) -> torch.Tensor:
                return task_vectors[0]

    def test_every_kind_of_parameter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lewis.methods.registry.METHODS", copy.copy(METHODS))

        def new(
            weights: torch.Tensor, base: torch.Tensor, *, t: Fraction, n: Count = 2, each: PerExpert[NotNegative] = 0.5
        ) -> torch.Tensor:
            return weights[0]

        merge_method("new", paper="https://example.org", on="weights", experts=(1, 2))(new)
        method = registry.METHODS["new"]
        assert method.takes_base and method.needs_base and not method.base_is_a_model and method.experts == (1, 2)
        assert method.parameters["t"].required and method.parameters["t"].range == Range(0, 1)
        assert method.parameters["n"] == Parameter("n", int, False, 2, Range(1))
        assert method.parameters["each"] == Parameter("each", float, True, 0.5, Range(0))

    def test_a_parameter_of_another_type_is_refused(self) -> None:
        with pytest.raises(TypeError, match="how: a parameter is a float, int or bool"):

            @merge_method("unfinished", paper="https://example.org")
            def unfinished(task_vectors: torch.Tensor, *, how: str = "well") -> torch.Tensor:
                return task_vectors[0]

    def test_one_density_for_all_experts_is_refused(self) -> None:
        """The merge ended with a TypeError: a `lewis` block may guide each expert's."""
        with pytest.raises(TypeError, match=r"density: every expert has its own; expected PerExpert"):

            @merge_method("unfinished", paper="https://example.org")
            def unfinished(task_vectors: torch.Tensor, *, density: float = 1.0) -> torch.Tensor:
                return task_vectors[0]

    def test_compiled_loops_of_a_parameter_that_there_is_not_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"unfinished: `compiled` names the parameters \['gamma'\]"):

            @merge_method("unfinished", paper="https://example.org", compiled=Loops(Combine.SUM, outliers="gamma"))
            def unfinished(task_vectors: torch.Tensor, *, density: PerExpert[float] = 1.0) -> torch.Tensor:
                return task_vectors[0]

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

    @pytest.mark.parametrize(
        "method, name, value, expected",
        [
            ("slerp", "t", 1.1, "a number >= 0 and <= 1, got 1.1"),
            ("nearswap", "t", -1, "a number >= 0, got -1"),
            ("karcher", "max_iter", 2.5, "a whole number, got 2.5"),
            ("karcher", "max_iter", 0, "a number >= 1, got 0"),
            ("breadcrumbs", "gamma", 2, "a number >= 0 and <= 1"),
        ],
    )
    def test_a_number_out_of_range_is_refused(self, method: str, name: str, value: object, expected: str) -> None:
        with pytest.raises(ValueError, match=expected):
            METHODS[method].parameters[name].parse(value)

    def test_a_number_written_as_text_is_one(self) -> None:
        assert METHODS["ties"].parameters["weight"].parse("1e-3") == 0.001


class TestScales:
    """Size times scale decides; the numbers themselves stay."""

    VECTOR = (4.0, -3.0, 1.0, 2.0)
    SCALE = torch.tensor([0.1, 1.0, 5.0, 1.0])  # sizes 0.4, 3, 5, 2

    def test_ties_and_breadcrumbs_keep_the_largest_products(self) -> None:
        close(ties(rows([*self.VECTOR]), [self.SCALE], density=0.5), [0.0, -3.0, 1.0, 0.0])
        close(breadcrumbs(rows([*self.VECTOR]), [self.SCALE], density=0.5, gamma=0.25), [0.0, -3.0, 0.0, 2.0])

    def test_an_expert_without_one_goes_by_magnitude(self) -> None:
        vectors = rows([*self.VECTOR], [*self.VECTOR])
        close(ties(vectors, [self.SCALE, None], density=0.5, normalize=False), [4.0, -6.0, 1.0, 0.0])
        assert torch.equal(ties(vectors, None, density=0.5), ties(vectors, density=0.5))

    def test_consensus_and_pcb(self) -> None:
        vectors = rows([*self.VECTOR], [*self.VECTOR])
        close(consensus(vectors, [self.SCALE] * 2, density=0.5), [0.0, -6.0, 2.0, 0.0])
        close(pcb(rows([1, 1]), [torch.tensor([2.0, 1.0])], density=0.5), [1.0, 0.0])
        close(pcb(rows([1, 1]), [torch.tensor([1.0, 2.0])], density=0.5), [0.0, 1.0])

    def test_della_ranks_products(self) -> None:
        # Ranks of 0.4, 3, 5, 2: probabilities 0.2, 0.6, 0.8, 0.4.
        for method in (della, della_linear):
            streams = [FixedStream(0.21, 0.59, 0.79, 0.41)]
            kept = method(rows([*self.VECTOR]), streams, [self.SCALE], density=0.5, epsilon=0.3, rescale=False)
            close(kept, [0.0, -3.0, 1.0, 0.0])

    def test_of_a_transposed_or_stacked_tensor_broadcast(self) -> None:
        vector = torch.ones(1, 2, 3)
        assert ties(vector, [torch.tensor([[1.0], [2.0]])], density=0.5)[1].tolist() == [1, 1, 1]
        stacked = torch.ones(1, 2, 2, 2)
        kept = ties(stacked, [torch.tensor([[[1.0, 4]], [[2, 3]]])], density=0.5)
        assert kept[..., 1].eq(1).all() and kept[..., 0].eq(0).all()

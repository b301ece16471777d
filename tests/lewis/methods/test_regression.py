"""The closed form of a layer's regression, against hand-made numbers and other ways to the same solution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis.methods.arithmetic import regression
from lewis.methods.arithmetic.cholesky import Factor
from lewis.methods.arithmetic.prior import prior_rows
from lewis.methods.arithmetic.regression import Inputs
from lewis.methods.arithmetic.sums import one_after_another
from lewis.methods.arithmetic.tokens import Gram, Rows, Stacked


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_least_squares(
    anchor: torch.Tensor,
    weights: list[torch.Tensor],
    experts: list[Rows],
    ridge: float,
    besides: list[torch.Tensor],
    alpha: float,
) -> torch.Tensor:
    """The same minimum as one large system of equations, fp64; share 1 - alpha is that of each input alone."""
    left, right, squares = [], [], 0.0
    for rows, weight, more in zip(experts, weights, besides, strict=True):
        x, z = torch.cat(rows.merged).double(), torch.cat(rows.own).double()
        scale = (rows.weight / len(x)) ** 0.5
        left.append(scale * alpha**0.5 * x)
        right.append(scale * alpha**0.5 * (z @ weight.double().T + more))
        for j in range(x.shape[1]):
            left.append(scale * (1 - alpha) ** 0.5 * x[:, j : j + 1] * torch.eye(x.shape[1])[j].double())
            right.append(scale * (1 - alpha) ** 0.5 * z[:, j : j + 1] * weight[:, j].double())
        squares += float((scale * x).square().sum())
    pull = (ridge * squares / anchor.shape[1]) ** 0.5
    left.append(pull * torch.eye(anchor.shape[1], dtype=torch.float64))
    right.append(pull * anchor.double().T)
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T


def test_a_2_by_3_layer_by_hand() -> None:
    """Expert 1 uses inputs 1 and 2 only, expert 2 input 3 only: each has its own columns, as there is no conflict."""
    first = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    second = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    one = [torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])]
    two = [torch.tensor([[0.0, 0.0, 1.0]])]
    found = Inputs([Rows(one, one), Rows(two, two)], 0.0).solve(torch.zeros(2, 3), [first, second])
    assert torch.allclose(found, torch.tensor([[1.0, 2.0, -3.0], [4.0, 5.0, -6.0]]), atol=1e-5)


TOKENS = [torch.tensor([[1.0, 1.0, 0.0]])], [torch.tensor([[0.0, 1.0, 1.0]])]  # of expert 1 and of expert 2
FIRST, ANCHOR = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "alpha, ridge, anchor, expected",
    [
        (0.0, 0.0, torch.zeros(2, 3), [[1, 0, -3], [4, 0, -6]]),  # only input 2 is shared: the mean of 2 and -2
        (0.5, 0.0, torch.zeros(2, 3), [[2, 0, -4], [6.5, 0, -8.5]]),
        # S + r I = [[2, .5, 0], [.5, 3, .5], [0, .5, 2]], since 0.75 of the mean of S's diagonal 1, 2, 1 is r = 1;
        # R = [[1, -1, -3], [6.5, -1, -8.5]]
        (0.5, 0.75, ANCHOR, [[17 / 11, -2 / 11, -27 / 11], [145 / 44, -2 / 11, -185 / 44]]),
    ],
)
@pytest.mark.parametrize("form", ["_primal", "_dual"])
def test_a_2_by_3_layer_with_alpha_and_an_anchor_by_hand(
    form: str, alpha: float, ridge: float, anchor: torch.Tensor, expected: list[list[float]]
) -> None:
    inputs = Inputs([Rows(rows, rows) for rows in TOKENS], ridge, alpha=alpha)
    found = torch.empty_like(anchor)
    getattr(inputs, form)(anchor, [FIRST, -FIRST], [None, None], found)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5)


def test_the_ridge_may_change_between_layers_of_the_same_inputs() -> None:
    rows = [draw(1, 30, 8)]
    other = [draw(2, 25, 8)]
    anchor, weights = draw(3, 4, 8), [draw(4, 4, 8), draw(5, 4, 8)]
    shared = Inputs([Rows(rows, rows), Rows(other, other)], 0.1)
    for ridge in (0.1, 2.0, 0.1):
        shared.ridge = ridge
        alone = Inputs(shared.experts, ridge)
        assert torch.equal(shared.solve(anchor, weights), alone.solve(anchor, weights))


@pytest.mark.parametrize("tokens", [30, 3])  # the primal and the dual form
def test_weights_may_be_as_stored_and_the_result_in_the_anchors_place(tokens: int) -> None:
    rows, anchor, stored = [draw(1, tokens, 8)], draw(3, 4, 8), draw(4, 4, 8).to(torch.bfloat16)
    expected = Inputs([Rows(rows, rows)], 0.1).solve(anchor, [stored.float()])
    found = Inputs([Rows(rows, rows)], 0.1).solve(anchor, [stored], out=anchor)
    assert found is anchor and torch.equal(found, expected)


@pytest.mark.parametrize("form", ["products", "tokens"])
def test_a_fit_beyond_its_bound_is_the_fit_with_a_larger_ridge(form: str) -> None:
    """Twelve outputs of sixteen inputs: 30 tokens of each expert are solved by products, 3 token by token."""
    count, weights, anchor = 30 if form == "products" else 3, [draw(4, 12, 16), draw(5, 12, 16)], draw(3, 12, 16)
    rows = [Rows([draw(1, count, 16)], [draw(6, count, 16)]), Rows([draw(2, count, 16)], [draw(7, count, 16)])]
    free = Inputs(rows, 1e-3).solve(anchor, weights)
    far = max(float((weight - anchor).norm()) for weight in weights)
    goal = 0.7 * float((free - anchor).norm())
    held = Inputs(rows, 1e-3, bound=goal / far)
    found = held.solve(anchor.clone(), weights)
    assert held.is_dual == (form == "tokens")
    assert float((found - anchor).norm()) == pytest.approx(goal, rel=1e-5)
    # It is a multiple, at most 10 % shorter, of the fit with some larger ridge: find that by halving.
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        wider = Inputs(rows, middle).solve(anchor, weights) - anchor
        low, high = (middle, high) if float(wider.norm()) > goal else (low, middle)
    cosine = torch.nn.functional.cosine_similarity((found - anchor).flatten(), wider.flatten(), dim=0)
    assert float(cosine) > 0.998
    assert torch.equal(Inputs(rows, 1e-3, bound=2 * goal / far).solve(anchor, weights), free)


@pytest.mark.parametrize("tokens", [30, 3])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_layer_that_no_expert_moved_goes_as_far_as_its_reach(tokens: int, alpha: float) -> None:
    anchor = draw(3, 4, 8)
    rows = Rows([draw(1, tokens, 8)], [draw(2, tokens, 8)])
    free = Inputs([rows], 0.1, alpha=alpha).solve(anchor, [anchor])
    assert float((free - anchor).norm()) > 0.06 * float(anchor.norm())
    held = Inputs([rows], 0.1, alpha=alpha, bound=6.0)
    found = held.solve(anchor, [anchor], reach=lambda: 0.01)
    assert float((found - anchor).norm()) == pytest.approx(0.06 * float(anchor.norm()), rel=1e-4)
    assert torch.equal(held.solve(anchor, [anchor]), anchor)


def test_a_shared_input_is_the_mean_weighted_by_its_square() -> None:
    """One input: W = (x1^2 w1 + x2^2 w2) / (x1^2 + x2^2) = (4 * 3 + 1 * 8) / 5."""
    one, two = [torch.tensor([[2.0]])], [torch.tensor([[1.0]])]
    found = Inputs([Rows(one, one), Rows(two, two)], 0.0).solve(
        torch.zeros(1, 1), [torch.tensor([[3.0]]), torch.tensor([[8.0]])]
    )
    assert found.item() == pytest.approx(4.0)


def test_the_merged_models_input_is_scaled_to_the_experts_output() -> None:
    """The expert sees 2 and has weight 3; the merged model sees 4: its weight must be 6 / 4."""
    own, merged = [torch.tensor([[2.0]])], [torch.tensor([[4.0]])]
    found = Inputs([Rows(merged, own)], 0.0).solve(torch.zeros(1, 1), [torch.tensor([[3.0]])])
    assert found.item() == pytest.approx(1.5)


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_what_was_measured_of_the_tokens_gives_what_the_tokens_give(alpha: float) -> None:
    rows = [draw(1, 40, 6)], [draw(2, 30, 6)]
    anchor, weights = draw(3, 4, 6), [draw(4, 4, 6), draw(5, 4, 6)]
    measured = [Gram(x.T @ x / len(x), len(x), 2.0) for (x,) in rows]
    kept = [each.mean.clone() for each in measured]
    by_tokens = Inputs([Rows(x, x, 2.0) for x in rows], 0.1, alpha=alpha).solve(anchor, weights)
    assert torch.allclose(Inputs(measured, 0.1, alpha=alpha).solve(anchor, weights), by_tokens, atol=1e-5)
    assert all(torch.equal(each.mean, before) for each, before in zip(measured, kept, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    size=st.integers(1, 24),
    outputs=st.integers(1, 9),
    ridge=st.sampled_from([1e-3, 0.1, 10.0]),
    alpha=st.sampled_from([1.0, 0.9, 0.3, 0.0]),
)
def test_both_forms_are_the_least_squares_solution(
    seed: int, tokens: list[int], size: int, outputs: int, ridge: float, alpha: float
) -> None:
    experts, weights, besides = [], [], []
    for i, count in enumerate(tokens):
        merged = draw(seed + 10 * i, count, size)
        own = merged + 0.1 * draw(seed + 10 * i + 1, count, size)
        cut = count // 2
        experts.append(Rows([merged[:cut], merged[cut:]], [own[:cut], own[cut:]], 1.0 + i))
        weights.append(draw(seed + 10 * i + 2, outputs, size))
        besides.append(draw(seed + 10 * i + 3, count, outputs))
    anchor = draw(seed + 99, outputs, size)
    expected = by_least_squares(anchor, weights, experts, ridge, besides, alpha)
    close = {
        "rtol": 2e-3,
        "atol": max(2e-3, 1e-5 / ridge),
    }  # the error in fp32 grows with 1 / ridge
    parts = [
        [more[: len(rows.merged[0])], more[len(rows.merged[0]) :]] for rows, more in zip(experts, besides, strict=True)
    ]
    found = anchor.clone()
    for form in (Inputs._primal, Inputs._dual):
        form(Inputs(experts, ridge, alpha=alpha), anchor, weights, parts, found)
        assert torch.allclose(found.double(), expected, **close)
    # Without what the layer gives besides: products of all pairs of inputs, not token by token.
    Inputs(experts, ridge, alpha=alpha)._primal(anchor, weights, [None] * len(tokens), found)
    nothing = [torch.zeros_like(each) for each in besides]
    assert torch.allclose(found.double(), by_least_squares(anchor, weights, experts, ridge, nothing, alpha), **close)


def test_the_dual_form_takes_even_shares_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "DUAL_ABOVE", 4)
    monkeypatch.setattr(regression, "DUAL_TOKENS", 50)
    rows = [draw(1, 300, 6)]
    inputs = Inputs([Rows(rows, rows), Rows([rows[0][:100]], [rows[0][:100]])], 1e-4)
    taken = [regression.sampled(6, each.tokens, 400) for each in inputs.experts]
    stacked = Stacked(inputs.experts, [None, None], taken)
    assert stacked.counts == [37, 12] and stacked.merged.shape == stacked.shift.shape == (49, 6)
    weight = draw(2, 3, 6)  # an exact fit is found from any part of the tokens
    assert torch.allclose(inputs.solve(torch.zeros(3, 6), [weight, weight]), weight, atol=1e-2)


def test_a_large_ridge_gives_the_anchor_and_an_expert_alone_itself() -> None:
    rows, weight, anchor = [draw(1, 30, 8)], draw(2, 4, 8), draw(3, 4, 8)
    assert torch.allclose(Inputs([Rows(rows, rows)], 1e9).solve(anchor, [weight]), anchor, atol=1e-5)
    for alpha in (1.0, 0.5, 0.0):
        assert torch.equal(Inputs([Rows(rows, rows)], 1e-4, alpha=alpha).solve(weight, [weight]), weight)


def test_a_singular_system_without_ridge_is_finite() -> None:
    rows = [draw(1, 3, 1).expand(3, 8).contiguous()]
    found = torch.empty(4, 8)
    Inputs([Rows(rows, rows)], 0.0)._primal(draw(2, 4, 8), [draw(3, 4, 8)], [None], found)
    assert bool(found.isfinite().all())


def test_inputs_that_are_not_finite_are_an_error() -> None:
    rows = [torch.full((30, 4), float("inf"))]
    with pytest.raises(ValueError, match="NaN, Inf"):
        Inputs([Rows(rows, rows)], 1e-4).solve(draw(1, 2, 4), [draw(2, 2, 4)])


def test_a_layer_that_no_token_reached_is_the_anchor() -> None:
    none, anchor = [torch.empty(0, 4)], draw(1, 2, 4)
    assert torch.equal(Inputs([Rows(none, none)], 1e-4).solve(anchor, [draw(2, 2, 4)]), anchor)


@pytest.mark.parametrize("size", [2, 193, 500])
def test_the_factor_in_blocks_solves_whatever_the_order_of_its_jobs(size: int) -> None:
    rows, right = draw(1, 2 * size, size).double(), draw(2, 7, size).double()
    matrix = rows.T @ rows
    found = Factor(matrix.triu(), one_after_another).solve(right.clone())
    assert torch.allclose(found @ matrix, right, atol=1e-8 * float(matrix.abs().max()))
    backwards = Factor(matrix, lambda jobs: one_after_another(list(reversed(jobs)))).solve(right.clone())
    assert torch.equal(found, backwards)


def test_the_factor_of_what_is_not_positive_definite_failed() -> None:
    assert Factor(torch.diag(torch.tensor([*[1.0] * 300, -1.0], dtype=torch.float64)), one_after_another).failed


def test_a_layer_with_many_outputs_is_fitted_as_its_rows_are() -> None:
    """Beyond two outputs for each input of two experts the solution is found in another order."""
    grams = [Gram(x.T @ x / len(x), len(x)) for x in (draw(1, 40, 8), draw(2, 40, 8))]
    anchor, weights = draw(3, 30, 8), [draw(4, 30, 8), draw(5, 30, 8)]
    whole = Inputs(grams, 0.1).solve(anchor, weights)
    few = [Inputs(grams, 0.1).solve(anchor[i : i + 8], [each[i : i + 8] for each in weights]) for i in (0, 8, 16, 22)]
    assert torch.allclose(whole, torch.cat([*few[:3], few[3][2:]]), atol=1e-5)
    shared = Inputs(grams, 0.1)
    shared.solve(anchor, weights)
    shared.ridge = 10.0
    again = shared.solve(anchor[:8], [each[:8] for each in weights])
    assert torch.allclose(again, Inputs(grams, 10.0).solve(anchor[:8], [each[:8] for each in weights]), atol=1e-5)


def test_what_the_experts_give_may_be_given_in_place_of_what_it_is_computed_from() -> None:
    experts = [
        Rows([draw(1, 20, 5), draw(2, 9, 5)], [draw(3, 20, 5), draw(4, 9, 5)]),
        Rows([draw(5, 30, 5)], [draw(6, 30, 5)], 2.0),
    ]
    anchor, weights = draw(7, 4, 5), [draw(8, 4, 5), draw(9, 4, 5)]
    more = [[draw(10, 20, 4), draw(11, 9, 4)], [draw(12, 30, 4)]]
    given = [
        [z @ weight.T + b for z, b in zip(rows.own, parts, strict=True)]
        for rows, weight, parts in zip(experts, weights, more, strict=True)
    ]
    inputs = Inputs(experts, 0.01)
    assert inputs.takes_outputs and not Inputs(experts, 1e-4).takes_outputs
    expected = inputs.solve(anchor, weights, more)
    assert torch.allclose(inputs.solve(anchor, weights, given, whole=True), expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    size=st.integers(1, 24),
    outputs=st.integers(1, 9),
    alpha=st.sampled_from([1.0, 0.3]),
)
def test_rows_of_a_prior_count_as_tokens_of_their_expert(
    seed: int, tokens: list[int], size: int, outputs: int, alpha: float
) -> None:
    """Both forms give the least squares of all rows; the ridge goes by the tokens, or without any by the prior."""
    ridge, base, anchor = 0.05, draw(seed, outputs, size), draw(seed + 99, outputs, size)
    experts, weights = list[Rows](), [base + draw(seed + 10 * i + 2, outputs, size) for i in range(len(tokens))]
    for i, count in enumerate(tokens):
        merged = draw(seed + 10 * i + 3, count, size)
        experts.append(Rows([merged], [merged], 1.0 + i))
    prior = prior_rows(experts, [weight - base for weight in weights], 2.0)
    traces = [float(each.merged[0].square().sum()) / count if (count := each.tokens) else 0.0 for each in experts]
    unseen = sum(traces) / max(sum(map(bool, traces)), 1) or 1.0
    for each, rows, trace in zip(experts, prior, traces, strict=True):
        power = rows.share * float(rows.merged[0].square().sum())
        assert power == pytest.approx(each.weight * 2.0 * (trace or unseen), rel=1e-4)
    wanted = ridge * (sum(e.weight * t for e, t in zip(experts, traces, strict=True)) or sum(e.weight for e in experts))
    seen = [(e, w) for e, w in [*zip(experts, weights, strict=True), *zip(prior, weights, strict=True)] if e.tokens]
    in_all = sum(each.weight * float(each.merged[0].square().sum()) / each.tokens for each, _ in seen)
    nothing = [torch.zeros(each.tokens, outputs) for each, _ in seen]
    all_rows, all_weights = [each for each, _ in seen], [weight for _, weight in seen]
    expected = by_least_squares(anchor, all_weights, all_rows, wanted / in_all, nothing, alpha)
    for form in (Inputs._primal, Inputs._dual):
        found, inputs = anchor.clone(), Inputs(experts, ridge, alpha=alpha, prior=prior)
        form(inputs, anchor, weights, [None] * len(tokens), found)
        assert torch.allclose(found.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [8, 200])  # the primal and the dual form, whose prior's factor was kept
def test_a_prior_belongs_to_one_layer_of_those_that_share_inputs(size: int) -> None:
    rows, anchor, weights = draw(1, 30, size), draw(2, 4, size), [draw(3, 4, size), draw(4, 4, size)]
    shared = Inputs([Rows([rows], [rows]), Rows([rows], [rows])], 0.1)
    plain = shared.solve(anchor, weights)
    for strength in (1.0, 0.2):
        shared.prior = prior_rows(shared.experts, weights, strength)
        alone = Inputs(shared.experts, 0.1, prior=shared.prior)
        assert torch.equal(shared.solve(anchor, weights), alone.solve(anchor, weights))
    shared.prior = ()
    assert torch.equal(shared.solve(anchor, weights), plain)
    assert [each.tokens for each in prior_rows(shared.experts, [draw(5, 4, size), 0 * anchor], 1.0)] == [4, 0]

"""The gate's rules, one by one with numbers by hand, and how often it lets chance through."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lewis.errors import InputError
from lewis.evaluation.gate import Incumbent, Standing, decide, judge
from lewis.evaluation.statistics import comparison
from lewis.evaluation.statistics.comparison import PairingError
from lewis.evaluation.statistics.looks import Look
from lewis.evaluation.statistics.scored import Scored
from lewis.evaluation.statistics.scores import Ends, Evaluated, Part, Samples, Score, combined
from lewis.recipe.schema import Gate

KEY = "maths/exact_match,none"
CHAMPION = Incumbent("models:/m/1", "a" * 64)
GOOD = Ends({"maths": 0.0}, 4, 2, 5.0)


def gate(metric: str = KEY, policy: str = "better", tolerance: Any = 0.05, **rules: Any) -> Gate:
    return Gate(metric=metric, policy=policy, tolerance=tolerance, **rules)


def not_worse(**rules: Any) -> Gate:
    return gate(policy="not_worse", **rules)


def model(label: str, ends: Ends = GOOD, *, weights=None, higher=True, group=None, **tasks) -> Scored:
    scores, samples = [], []
    for task, values in tasks.items():
        plain = tuple(map(float, values))
        part = Part(task, 1.0, "mean", tuple(f"{i}" for i in range(len(plain))), plain)
        scores.append(Score(task, "exact_match,none", sum(plain) / len(plain), 0.01, higher, len(plain)))
        samples.append(Samples(task, "exact_match,none", (part,)))
    if group:
        samples.append(combined(group, "exact_match,none", [(each, 1 / len(samples)) for each in samples]))
        scores.append(Score(group, "exact_match,none", samples[-1].value(), 0.01, higher, 1))
    return Scored.of(label, label, Evaluated(scores, samples, ends, {}), weights)


def right(number: int, of: int = 100) -> list[int]:
    return [1] * number + [0] * (of - number)


def verdict(rule, ours: Scored, theirs: Scored, **more):
    return decide(rule, ours, theirs, "base", **{"base": theirs, **more})


def failed(found) -> list[str]:
    return [reason for reason in found.reasons if reason.endswith(": fail")]


def test_every_rule_is_a_line_with_its_number() -> None:
    base = model("base", maths=right(50), code=right(40))
    found = verdict(gate(), model("lewis", maths=right(70), code=right(41)), base)
    assert found.passed and found.compared_with == "base"
    gains, superior, code, nan, empty, ends, perplexity = found.reasons
    assert gains == f"{KEY} must gain at least 0: 0.7000 vs 0.5000: pass"
    assert superior.startswith(f"{KEY} must be better with p at most 0.05: gain +0.2000, from +0.1")
    assert superior.endswith(", p 1.91e-06: pass")
    assert code.startswith("code/exact_match,none must not be worse by 0.05: gain +0.0100, from -0.0")
    assert nan == "no score may be NaN or infinite: 0 of 2: pass"
    assert empty == "maths must have no empty answers, or no more than base: 0.0% vs 0.0%: pass"
    assert ends == "a generation must come to its end: 2 of 4: pass"
    assert perplexity == "the reference answers' perplexity must be at most 1.1 times the base's: 5 vs 5: pass"


@pytest.mark.parametrize(
    ("new", "old", "min_gain", "passed"),
    [
        (57, 55, 0.02, True),  # 0.57 - 0.55 < 0.02 in floating point
        (56, 55, 0.02, False),
    ],
)
def test_the_gain(new: int, old: int, min_gain: float, passed: bool) -> None:
    found = verdict(gate(min_gain=min_gain), model("m", maths=right(new)), model("base", maths=right(old)))
    assert found.reasons[0].endswith("pass") is passed


def test_lower_is_better() -> None:
    low, high = (model(label, higher=False, maths=[v + i % 3 for i in range(60)]) for label, v in (("m", 9), ("b", 10)))
    assert verdict(gate(min_gain=1.0), low, high).passed
    assert failed(verdict(gate(), high, low))[0].startswith(f"{KEY} must drop at least 0: 11.0000 vs 10.0000")


def test_a_gain_that_may_be_chance_is_not_enough_where_a_gain_is_asked_for() -> None:
    base, ours = model("base", maths=right(50)), model("m", maths=right(54))  # 4 wins, no loss: p 0.125
    [reason] = failed(verdict(gate(), ours, base))
    assert reason.endswith("p 0.125: fail")
    assert verdict(not_worse(), ours, base).passed
    assert verdict(gate(), model("m", maths=right(56)), base).passed
    [reason] = failed(verdict(gate(), model("m", maths=right(56)), base, number=2))  # p 0.0312
    assert reason.startswith(f"{KEY} must be better with p at most 0.017 (comparison 2): gain +0.0600")


def test_a_merge_of_an_expert_that_moved_is_let_in_unless_something_got_worse() -> None:
    """Equal scores, of which a few documents change sides: the gate that asks for a gain refuses them for ever."""
    values = np.array(right(140, 200))
    moved = values.copy()
    moved[[3, 50, 120]], moved[[150, 170, 190]] = 0, 1
    champion, ours = model("champion", maths=values, code=right(90, 200)), model("m", maths=moved, code=right(90, 200))
    rule = Gate(metric=KEY)
    let_in = judge(rule, [champion, ours], "b" * 64, champion=CHAMPION)
    assert rule.policy == "not_worse" and let_in.passed and failed(let_in) == []
    assert let_in.reasons[0].startswith(f"{KEY} must not be worse by 0.07328: gain +0.0000, from -0.0")
    [reason] = failed(judge(Gate(metric=KEY, policy="better"), [champion, ours], "b" * 64, champion=CHAMPION))
    assert reason == f"{KEY} must be better with p at most 0.05: gain +0.0000, from -0.0251, p 1: fail"
    worse = model("m", maths=right(120, 200), code=right(95, 200))
    [reason] = failed(judge(rule, [champion, worse], "b" * 64, champion=CHAMPION))
    assert reason.startswith(f"{KEY} must not be worse by 0.07328: gain -0.1000, from -0.1")


def test_the_metric_is_judged_as_well_as_its_tasks_or_the_model_stays_out() -> None:
    base, ours = (model(label, weights={"maths": 2, "code": 1}, maths=right(50), code=right(50)) for label in "bm")
    rules = [reason.split()[0] for reason in verdict(not_worse(metric="weighted/mean,none"), ours, base).reasons[:4]]
    assert rules == ["weighted/mean,none", "maths/exact_match,none", "code/exact_match,none", "no"]
    blind = replace(ours, samples=tuple(each for each in ours.samples if each.task == "code"))
    [reason] = failed(verdict(not_worse(), blind, base))
    assert reason == f"{KEY} must not be worse: it has no value per document: fail"


MARK = Incumbent("models:/m/1", "c" * 64)


def test_small_losses_do_not_add_up() -> None:
    labels = {"mark": 800, "champion": 770, "m": 740}
    mark, champion, ours = (model(label, maths=right(number, 1000)) for label, number in labels.items())
    given = {"champion": Incumbent("models:/m/2", "a" * 64), "standing": Standing(MARK, 3)}
    found = judge(not_worse(), [champion, ours], "b" * 64, marked=mark, **given)
    [reason] = failed(found)
    assert reason.startswith(f"{KEY} must not be worse than models:/m/1 by 0.05: gain -0.0600")
    assert judge(not_worse(tolerance=0.08), [champion, ours], "b" * 64, marked=mark, **given).mark == MARK.uri
    better = model("m", maths=right(830, 1000))
    assert judge(not_worse(), [champion, better], "b" * 64, marked=mark, **given).mark == ""  # it is the mark then
    for scores in (None, model("mark", maths=right(800, 900))):
        lost = judge(not_worse(), [champion, ours], "b" * 64, marked=scores, **given)
        assert lost.passed and lost.mark == ""
        assert lost.reasons[-1] == "note: models:/m/1 has no scores on these documents; losses are counted from here on"


def test_the_luck_of_a_score_is_that_of_versions_of_one_merge() -> None:
    reference, ours = (model(label, maths=values) for label, values in (("champion", right(50)), ("m", right(56))))
    found = judge(not_worse(), [reference, ours], "b" * 64, champion=CHAMPION)
    assert found.luck == pytest.approx(math.sqrt(0.06 * 0.94 / 99 / 2), rel=0.05)
    assert judge(not_worse(), [replace(reference, label="base"), ours], "b" * 64).luck is None
    low = [model(m.label, higher=False, maths=values) for m, values in ((reference, right(50)), (ours, right(44)))]
    assert judge(not_worse(), low, "b" * 64, champion=CHAMPION).luck == pytest.approx(-found.luck, rel=0.05)


def test_the_mark_stays_where_a_gain_may_be_chance() -> None:
    champion, ours = model("champion", maths=right(50)), model("m", maths=right(56))  # 6 wins, no loss: p 0.031
    marks = [
        judge(not_worse(), [champion, ours], "b" * 64, champion=MARK, standing=Standing(MARK, number)).mark
        for number in (1, 2)
    ]
    assert marks == ["", MARK.uri]


def test_a_note_says_which_other_model_of_the_run_is_better() -> None:
    base, uniform, ours = (model(n, maths=right(v)) for n, v in (("base", 50), ("uniform", 70), ("m", 52)))
    found = judge(not_worse(), [base, uniform, ours], "b" * 64)
    assert found.passed and found.reasons[-2:] == (
        f"note: uniform is better: {KEY} -0.1800, p 7.63e-06",
        f"note: no gain in {KEY} over base is shown",
    )
    assert not any("note" in reason for reason in judge(gate(), [base, ours, uniform], "b" * 64).reasons)


def test_a_task_that_falls_too_far_holds_the_model_back_by_its_own_tolerance() -> None:
    base = model("base", maths=right(50), code=right(90), prose=right(90))
    ours = model("m", maths=right(80), code=right(80), prose=right(90))
    [reason] = failed(verdict(gate(), ours, base))
    assert reason.startswith("code/exact_match,none must not be worse by 0.05: gain -0.1000")
    assert verdict(gate(tolerance=0.25), ours, base).passed
    assert verdict(gate(tolerance={"code": 0.25}), ours, base).passed
    assert verdict(gate(tolerance={"code/exact_match,none": 0.25}), ours, base).passed
    assert not verdict(gate(tolerance={"prose": 0.25}), ours, base).passed
    with pytest.raises(InputError, match=r"tolerance: .* got 'cod'; did you mean 'code'"):
        verdict(gate(tolerance={"cod": 0.25}), ours, base)


def test_a_tolerance_is_relative_where_scores_are_not_shares() -> None:
    values = [20.0 + i % 2 for i in range(50)]
    base, ours = (
        model(label, higher=False, maths=maths, prose=[v + more for v in values])
        for label, maths, more in (("base", values, 0.0), ("m", [v - 5 for v in values], 0.9))
    )
    assert verdict(gate(), ours, base).passed  # 0.9 of 20.5
    worse = model("m", higher=False, maths=[v - 5 for v in values], prose=[v + 1.1 for v in values])
    [reason] = failed(verdict(gate(), worse, base))
    assert reason.startswith("prose/exact_match,none must not be worse by 1.025: gain -1.1000")


def test_an_error_rate_of_0_must_stay_so_and_keeps_no_equal_version_out() -> None:
    clean = model("base", higher=False, maths=right(0))
    found = verdict(not_worse(), model("m", higher=False, maths=right(0)), clean)
    assert found.passed and found.reasons[0] == f"{KEY} must not be worse: 0 before, gain +0.0000: pass"
    assert not verdict(not_worse(), model("m", higher=False, maths=right(1)), clean).passed
    early = Look(100, {"maths": 1000}, 0.5, 0.5)
    assert not verdict(not_worse(), model("m", higher=False, maths=right(0)), clean, look=early).passed


def test_a_group_stands_for_its_members_and_a_weighted_mean_for_none() -> None:
    base = model("base", maths=right(50), code=right(50), group="both")
    ours = model("m", maths=right(80), code=right(50), group="both")
    kept = [r for r in verdict(gate("both/exact_match,none"), ours, base).reasons if "not be worse" in r]
    assert kept == []  # the only one is the gate's own metric
    weights = {"maths": 1, "code": 1}
    base, ours = (
        model(m.label, weights=weights, maths=a, code=right(50)) for m, a in ((base, right(50)), (ours, right(80)))
    )
    found = verdict(gate("weighted/mean,none"), ours, base)
    assert found.passed and [r.split()[0] for r in found.reasons if "not be worse" in r] == [
        "maths/exact_match,none",
        "code/exact_match,none",
    ]


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (replace(GOOD, empty={"maths": 0.02}), "maths must have no empty answers, or no more than base: 2.0% vs 0.0%"),
        (replace(GOOD, ended=0), "a generation must come to its end: 0 of 4"),
        (replace(GOOD, perplexity=5.6), "the reference answers' perplexity must be at most 1.1 times the base's: 5.6"),
        (replace(GOOD, perplexity=math.nan), "the reference answers' perplexity"),
    ],
)
def test_the_guards(ends: Ends, reason: str) -> None:
    found = verdict(gate(), model("m", ends, maths=right(80)), model("base", maths=right(50)))
    [told] = failed(found)
    assert told.startswith(reason) and not found.passed


def test_the_mean_of_two_metrics_of_a_task_is_judged_as_one_of_them() -> None:
    weights = {"maths/exact_match,none": 1.0, "maths/flexible,none": 1.0}

    def twice(label: str, number: int) -> Scored:
        one = model(label, maths=right(number))
        scores = [*one.scores, replace(one.scores[0], metric="flexible,none")]
        samples = [*one.samples, replace(one.samples[0], metric="flexible,none")]
        return Scored.of(label, label, Evaluated(scores, samples, GOOD, {}), weights)

    rule = not_worse(metric="weighted/mean,none", tolerance=None)
    alone = [model(label, maths=right(number), weights={"maths": 1.0}) for label, number in (("m", 55), ("base", 50))]
    found, expected = verdict(rule, twice("m", 55), twice("base", 50)), verdict(rule, *alone)
    assert found.reasons[0].partition(", p")[0] == expected.reasons[0].partition(", p")[0]  # the margin, and from where
    assert found.luck == pytest.approx(expected.luck)
    assert twice("m", 55).by_name["weighted/mean,none"].stderr == pytest.approx(0.01)


def test_a_guard_asks_for_no_more_than_the_base_does() -> None:
    poor = Ends({"maths": 0.3}, 4, 0, None)
    found = verdict(gate(), model("m", poor, maths=right(80)), model("base", poor, maths=right(50)))
    assert found.passed and "no generation of base ends, so none must: 0 of 4: pass" in found.reasons


def test_nan_and_perplexity_of_a_task() -> None:
    base, ours = model("base", maths=right(50)), model("m", maths=right(80))
    broken = Samples("loss", "bits,none", (Part("loss", 1.0, "mean", ("a",), (math.nan,)),))
    found = verdict(gate(), replace(ours, samples=(*ours.samples, broken)), base)
    assert failed(found) == ["no score may be NaN or infinite: 1 of 1: fail"]
    wiki = [Score("wiki", "word_perplexity,none", value, None, False, 9) for value in (10.0, 11.5)]
    base, ours = (replace(m, scores=(*m.scores, score)) for m, score in zip((base, ours), wiki, strict=True))
    [reason] = failed(verdict(gate(), ours, base))
    assert reason.startswith("wiki/word_perplexity,none must be at most 1.1 times the base's: 11.5 vs 10")


def test_a_task_that_cannot_be_judged_is_noted_with_its_scores() -> None:
    """Its score fell from 0.6 to -0.1, and the verdict was a pass that did not name it."""
    base, ours = (model(label, maths=right(50)) for label in ("base", "m"))
    cola = [Score("cola", "mcc,none", value, None, True, 200) for value in (0.6, -0.1)]
    base, ours = (replace(m, scores=(*m.scores, score)) for m, score in zip((base, ours), cola, strict=True))
    note = "note: cola is not judged, since it has no value per document: mcc,none -0.1 vs 0.6"
    assert note in judge(not_worse(), [base, ours], "b" * 64).reasons
    named = judge(not_worse(metric="cola/mcc,none"), [base, ours], "b" * 64)
    assert note not in named.reasons and not named.passed  # the rule of the metric says so
    grouped = [model(label, maths=right(50), code=right(50), group="both") for label in ("base", "m")]
    assert not any("judged" in reason for reason in judge(not_worse(), grouped, "b" * 64).reasons)


def test_a_limit_is_for_trying_out() -> None:
    base, ours = model("base", maths=right(50)), model("m", maths=right(80))
    [reason] = failed(verdict(gate(), ours, base, limit=100))
    assert reason.startswith("all documents must be scored: evaluate.limit is 100 (set register.gate.allow_limit")
    assert verdict(gate(allow_limit=True), ours, base, limit=100).passed


def test_an_unknown_metric_names_the_nearest_and_other_documents_are_an_error() -> None:
    base, ours = model("base", maths=right(50)), model("m", maths=right(80))
    with pytest.raises(InputError, match=r"of the candidate, got 'maths/exact_mtch,none'; did you mean 'maths/exact_m"):
        verdict(gate(metric="maths/exact_mtch,none"), ours, base)
    with pytest.raises(InputError, match=r"a score of base, got .*; there are no scores"):
        verdict(gate(), ours, replace(base, scores=(), samples=()))
    with pytest.raises(PairingError):
        verdict(gate(), ours, model("base", maths=right(40, of=80)))


def partly(label: str, values: list[int], documents: int) -> Scored:
    """A model whose metric skips all documents but the first ones."""
    one = model(label, maths=values)
    names = tuple(map(str, range(documents)))
    padded = (*map(float, values), *[None] * (documents - len(values)))
    part = replace(one.samples[0].parts[0], documents=names, values=padded)
    return replace(one, samples=(replace(one.samples[0], parts=(part,)),))


def test_documents_that_a_metric_skips_do_not_narrow_the_margin() -> None:
    rule = not_worse(tolerance=None)
    few, many = (
        verdict(rule, partly("m", right(18, 20), documents), partly("base", right(18, 20), documents)).reasons[0]
        for documents in (20, 1000)
    )
    assert few == many and " by 0.1: " in few
    look = Look(1000, {"maths": 5000}, 0.5, 0.5)
    early = verdict(rule, partly("m", right(180, 200), 1000), partly("base", right(180, 200), 1000), look=look)
    assert " by 0.02926: " in early.reasons[0]  # as for 1,000 documents: a fifth of 5,000


def early_look(documents: int, *tasks: str) -> Look:
    return Look(documents, dict.fromkeys(tasks, 1319), 0.0, 0.2)


def test_a_gain_that_no_document_of_an_early_look_shows_may_still_come() -> None:
    weights = {"maths": 1, "code": 1}
    ours, base = (model(label, weights=weights, maths=right(16, 32), code=right(16, 32)) for label in ("m", "base"))
    rule = gate("weighted/mean,none", min_gain=0.005, tolerance=0.1)
    found = verdict(rule, ours, base, look=early_look(32, "maths", "code"))
    assert not found.passed and not found.certain
    clear = model("m", weights=weights, maths=right(2, 32), code=right(2, 32))
    assert verdict(rule, clear, base, look=early_look(32, "maths", "code")).certain


@pytest.mark.parametrize("tasks", [("maths",), ("maths", "code")])
def test_an_equal_model_is_not_called_worse_at_an_early_look_where_no_loss_is_tolerated(tasks: tuple[str, ...]) -> None:
    weights = dict.fromkeys(tasks, 1) if len(tasks) > 1 else None
    values = dict.fromkeys(tasks, right(16, 32))
    ours, base = (model(label, weights=weights, **values) for label in ("m", "base"))
    rule = not_worse(metric="weighted/mean,none" if weights else KEY, tolerance=0.0)
    assert not verdict(rule, ours, base, look=early_look(32, *tasks)).certain
    lost = model("m", weights=weights, **dict.fromkeys(tasks, right(6, 32)))
    assert verdict(rule, lost, base, look=early_look(32, *tasks)).certain


def with_metric(one: Scored, metric: str, number: int) -> Scored:
    """The model with another metric of `maths`."""
    more = model("", maths=right(number))
    return replace(
        one,
        scores=(*one.scores, replace(more.scores[0], metric=metric)),
        samples=(*one.samples, replace(more.samples[0], metric=metric)),
    )


def test_each_metric_with_a_tolerance_of_its_own_is_judged() -> None:
    ours, base = (with_metric(model(label, maths=right(50)), "f,none", n) for label, n in (("m", 20), ("base", 50)))
    found = verdict(not_worse(tolerance={KEY: 0.2, "maths/f,none": 0.2}), ours, base)
    [reason] = failed(found)
    assert reason.startswith("maths/f,none must not be worse by 0.2: gain -0.3000") and found.reasons[0].startswith(KEY)
    assert verdict(not_worse(tolerance={KEY: 0.2}), ours, base).passed


@pytest.mark.parametrize("name", ["weighted", "weighted/mean,none"])
def test_the_weighted_mean_may_have_a_tolerance_of_its_own(name: str) -> None:
    weights = {"maths": 1, "code": 1}
    base = model("base", weights=weights, maths=right(80), code=right(80))
    ours = model("m", weights=weights, maths=right(70), code=right(70))
    rule = not_worse(tolerance={name: 0.05, "maths": 0.5, "code": 0.5})
    [reason] = failed(verdict(rule, ours, base))
    assert reason.startswith("weighted/mean,none must not be worse by 0.05: gain -0.1000")


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide nothing where answers are right or wrong, and take most of the time."""
    monkeypatch.setattr(comparison, "RESAMPLES", 50)


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("documents", "agreement"),
    [
        (30, 0.0),
        (200, 0.8),
        pytest.param(30, 0.8, marks=pytest.mark.long),
        pytest.param(200, 0.0, marks=pytest.mark.long),
    ],
)
def test_two_copies_of_one_model_are_promoted_in_at_most_five_of_a_hundred_cases(
    documents: int, agreement: float
) -> None:
    """Both answer each document right with its own chance, and the same on a share of them: resampled answers."""
    rng, promoted, rounds = np.random.default_rng(42), 0, 400
    for _ in range(rounds):
        chance = rng.beta(1, 1, documents)
        ours = rng.random(documents) < chance
        theirs = np.where(rng.random(documents) < agreement, ours, rng.random(documents) < chance)
        promoted += verdict(gate(tolerance=1.0), model("m", maths=ours), model("base", maths=theirs)).passed
    assert promoted / rounds <= 0.05


def test_what_passes_may_wait_for_a_person() -> None:
    better, base = model("m", maths=right(70)), model("base", maths=right(50))
    asked = gate(approve=True, approve_hours=2)
    assert verdict(asked, better, base).waits and verdict(asked, better, base).metric == KEY
    assert not verdict(asked, base, better).waits and not verdict(gate(), better, base).waits


@pytest.mark.usefixtures("few_resamples")
def test_a_true_gain_is_seen() -> None:
    rng, promoted = np.random.default_rng(7), 0
    for _ in range(50):
        theirs = rng.random(300) < 0.5
        ours = np.where(rng.random(300) < 0.2, True, theirs)  # a tenth more
        promoted += verdict(gate(), model("m", maths=ours), model("base", maths=theirs)).passed
    assert promoted >= 48


def test_a_merge_is_compared_with_the_champion_else_the_base_else_the_best_parent() -> None:
    ours, base = model("lewis", maths=right(70)), model("base", maths=right(50))
    weak, strong = model("weak", maths=right(20)), model("strong", maths=right(60))
    again = model("champion", maths=right(55))
    assert judge(gate(), [base, weak, strong, again, ours], "b" * 64, champion=CHAMPION).compared_with == "models:/m/1"
    assert judge(gate(), [weak, base, strong, ours], "b" * 64).compared_with == "base"
    assert judge(gate(), [weak, strong, ours], "b" * 64).compared_with == "strong"
    low = [replace(each, scores=(replace(each.scores[0], higher_is_better=False),)) for each in (weak, strong, ours)]
    assert judge(gate(), low, "b" * 64).compared_with == "weak"


def test_no_rule_is_applied_where_there_is_nothing_to_decide() -> None:
    same = judge(gate(), [], CHAMPION.digest, champion=CHAMPION)
    assert same.passed and same.reasons == ("this very model is the champion already",)
    gone = judge(gate(), [], "b" * 64, champion=CHAMPION, standing=Standing(withdrawn="it swore"))
    assert not gone.passed and "refused or rolled back by hand (it swore)" in gone.reasons[0]
    assert judge(None, [], "b" * 64).reasons == ("no gate in the recipe",)
    lost = judge(gate(), [model("lewis", maths=right(70))], "b" * 64, champion=CHAMPION)
    assert not lost.passed and lost.reasons[0].startswith("models:/m/1 must be scored again")

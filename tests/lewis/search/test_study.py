"""The space of a search, what it remembers, and how it is told."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis.devices import precision
from lewis.errors import LewisError, RecipeError
from lewis.recipe.recipe import Recipe
from lewis.search import report, space, study
from lewis.search.study import Log, Objective, Trial

RECIPE = """
merge_method: ties
base_model: org/base
models: [{model: org/a, parameters: {weight: 1.5}}, {model: org/b, parameters: {weight: 1}}]
lewis: {calibrations: {t: {texts: [a b]}}, density: {min: 0.3, max: 0.8}}
evaluate: {tasks: [x]}
search:
  space:
    parameters.lambda: {min: 0.5, max: 2.0}
    models[0].parameters.weight: {min: 0.5, max: 3, step: 0.5}
    lewis.density.max: {min: 0.4, max: 1.0}
    merge_method: [ties, dare_ties]
"""
ACC, LOSS = Objective("x/acc,none", True), Objective("x/loss,none", False)
INPUTS = {"org/base": "1", "org/a": "2", "org/b": "3"}


def parse(space: str = "", **changes: str) -> Recipe:
    text = RECIPE
    if space:
        text = text.partition("  space:")[0] + f"  space: {{{space}}}\n"
    for old, new in changes.items():
        text = text.replace(old, new)
    return Recipe.parse(text, root=Path("."))


@pytest.fixture
def recipe(home: Path) -> Recipe:
    return parse()


def log_of(recipe: Recipe) -> Log:
    return Log(recipe, [ACC], INPUTS, "t")


def run(log: Log, count: int, score: Callable[[Trial], float]) -> None:
    for _ in range(count):
        trial = log.ask()
        log.done(trial, [score(trial)])


def closeness(trial: Trial) -> float:
    return -((float(trial.values["parameters.lambda"]) - 1.4) ** 2)


class TestSpace:
    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            (
                "parameters.lamda: {min: 1, max: 2}",
                "parameters.lamda: parameters.lamda: ties has no such parameter; did",
            ),
            ("lewis.density.max: {min: 0.1, max: 1}", "lewis.density.min: expected 0 < min <= max <= 1, got min=0.3"),
            ("merge_method: [ties, tise]", "merge_method: merge_method: unknown method 'tise'; did you mean 'ties'"),
            ("evaluate.limit: [1, 2]", "search.space.evaluate.limit: expected a value that the merge depends on"),
            ("'models[7].parameters.weight': [1]", "there is no models.7 in the recipe"),
            ("parameters.lambda: []", "search.space.parameters.lambda: expected at least one choice"),
            (
                "parameters.lambda: [1]",
                "search.space.parameters.lambda: expected two choices or more, each once, got [1]",
            ),
            (
                "parameters.lambda: [1, 2, 1]",
                "lambda: expected two choices or more, each once, got [1, 2, 1]; a search",
            ),
            (
                "seed: {min: 0, max: 9}",
                "search.space.seed: ties does not draw at random, so all trials would be the sa",
            ),
            ("'models[0].model': [a, b]", "search.space.models[0].model: a search keeps its models"),
            (
                "parameters.lambda: {min: 2, max: 1}",
                "search.space.parameters.lambda: expected min < max, got min=2, max=1",
            ),
            ("parameters.lambda: {min: 0, max: 1, log: true}", "search.space.parameters.lambda: a log scale needs min"),
            (
                "parameters.lambda: {min: 0, max: 1, step: 2}",
                "search.space.parameters.lambda: a step of 2 leads beyond max, to min alone; expected at most 1",
            ),
            (
                "parameters.lambda: {min: 0, mx: 1}",
                "search.space.parameters.lambda.mx: unknown key; did you mean 'max'?",
            ),
            (
                "seed: {min: 0, max: 9, step: 1.5}",
                "search.space.seed: seed: input should be a valid integer, got a number with a fractional part",
            ),
            ("parameters.lambda: 5", "search.space.parameters.lambda: input should be a valid list, got 5"),
        ],
    )
    def test_what_is_wrong_is_told_at_its_path(self, given: str, problem: str) -> None:
        with pytest.raises(RecipeError) as caught:
            space.check(parse(given))
        assert problem in str(caught.value)

    def test_what_is_right(self, recipe: Recipe) -> None:
        space.check(recipe)

    @pytest.mark.parametrize("scale", ["", ", log: true"])
    def test_a_key_of_whole_numbers_gets_whole_numbers(self, scale: str, home: Path) -> None:
        """A range over the seed passed the check, and then nearly every trial failed."""
        given = (
            f"seed: {{min: 1, max: 900{scale}}}, parameters.lambda: {{min: 1, max: 3}}, merge_method: [ties, dare_ties]"
        )
        recipe = parse(given)
        space.check(recipe)
        log = log_of(recipe)
        trials = [log.ask().values for _ in range(6)]
        for values in trials:
            space.with_values(recipe, values)
        assert {type(values["seed"]) for values in trials} == {int} and len({values["seed"] for values in trials}) > 2
        assert any(values["parameters.lambda"] % 1 for values in trials)

    @pytest.mark.parametrize(
        ("ends", "value", "kept"),
        [
            ((0.5, 2.0), 1.23456, 1.235),
            ((1e-6, 1e-3), 0.000123456, 0.0001235),
            ((10000.1, 10000.9), 10000.43217, 10000.4322),
        ],
    )
    def test_values_are_rounded_unless_the_range_is_too_narrow(
        self, ends: tuple[float, float], value: float, kept: float
    ) -> None:
        """Of the last range, four digits left one value."""
        wanted = space.of(parse(f"parameters.lambda: {{min: {ends[0]:f}, max: {ends[1]:f}}}"))
        assert space.rounded(wanted["parameters.lambda"], value) == kept

    def test_the_metrics(self, recipe: Recipe) -> None:
        with pytest.raises(RecipeError, match=r"search\.metrics: missing"):
            study.objectives_of(recipe)
        gate = "register: {name: n, gate: {metric: 'x/acc,none'}}\nsearch:"
        assert study.objectives_of(parse(**{"search:": gate})) == ("x/acc,none",)
        assert study.objectives_of(parse(**{"search:": "search:\n  metrics: [a, b]"})) == ("a", "b")
        with pytest.raises(RecipeError, match=r"search\.metrics: expected one or two metrics, got 'a' twice"):
            study.objectives_of(parse(**{"search:": "search:\n  metrics: [a, a]"}))
        with pytest.raises(RecipeError, match="search: missing; `lewis search` needs this block"):
            study.objectives_of(Recipe.parse(RECIPE.partition("search:")[0], root=Path(".")))
        with pytest.raises(RecipeError, match="add an evaluate block"):
            study.objectives_of(parse(**{"evaluate: {tasks: [x]}": "", "search:": "search:\n  metrics: [a]"}))

    @settings(max_examples=30, deadline=None)
    @given(st.floats(0.5, 2), st.floats(0.5, 3), st.floats(0.4, 1), st.sampled_from(["ties", "dare_ties"]))
    def test_values_become_the_recipe(self, scale: float, weight: float, top: float, method: str) -> None:
        values = {
            "parameters.lambda": scale,
            "models[0].parameters.weight": weight,
            "lewis.density.max": top,
            "merge_method": method,
        }
        made = space.with_values(parse(), values, "evaluate.limit=3")
        assert made.lewis and made.evaluate
        assert (made.merge_method, made.lewis.density.max, made.evaluate.limit) == (method, top, 3)
        assert made.parameters["lambda"][0].value == scale
        assert made.models[0].parameters["weight"][0].value == weight and made.models[1] == parse().models[1]


class TestLog:
    def test_it_begins_with_the_recipes_own_values(self, recipe: Recipe) -> None:
        first = Log(recipe, [ACC], INPUTS, "t").ask()
        assert first.values == {
            "parameters.lambda": 1.0,
            "models[0].parameters.weight": 1.5,
            "lewis.density.max": 0.8,
            "merge_method": "ties",
        }
        assert "models[0].parameters.weight=1.5" in first.overrides

    def test_it_finds_what_is_better(self, recipe: Recipe) -> None:
        log = Log(recipe, [ACC], INPUTS, "t")
        run(log, 25, closeness)
        (best,) = log.front
        assert best.scores[0] == max(trial.scores[0] for trial in log.trials) > -0.01
        wanted = recipe.search.space if recipe.search else {}
        for trial in log.trials:
            assert all(space.holds(wanted[path], value) for path, value in trial.values.items())
            assert float(trial.values["models[0].parameters.weight"]) % 0.5 == 0
        assert {trial.values["merge_method"] for trial in log.trials} == {"ties", "dare_ties"}

    def test_it_goes_on_with_what_was_cut_off(self, recipe: Recipe) -> None:
        log = Log(recipe, [ACC], INPUTS, "t")
        run(log, 3, closeness)
        cut = log.ask()
        again = Log(recipe, [ACC], INPUTS, "t")
        assert again.digest == log.digest and [trial.state for trial in again.trials] == ["done"] * 3
        assert again.ask().values == cut.values
        assert Log(recipe, [ACC], INPUTS, "t").ask().values == cut.values  # cut off twice
        more = Log(parse(**{"  space:": "  trials: 50\n  space:"}), [ACC], INPUTS, "t")
        assert len(more.trials) == 3

    @pytest.mark.parametrize("call", ["tell", "enqueue_trial"])
    def test_a_kill_while_it_queues_again_loses_no_trial(
        self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        cut = Log(recipe, [ACC], INPUTS, "t").ask()

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(optuna.Study, call, killed)
            Log(recipe, [ACC], INPUTS, "t")
        log = Log(recipe, [ACC], INPUTS, "t")
        assert log.ask().values == cut.values
        assert log.ask().values != cut.values  # queued once

    def test_the_recipes_own_values_are_tried_even_if_the_first_trial_died_before_it_had_them(
        self, recipe: Recipe
    ) -> None:
        own = Log(recipe, [ACC], {**INPUTS, "org/a": "9"}, "t").ask().values
        Log(recipe, [ACC], INPUTS, "t")._study.ask()  # a trial that has begun, and no values yet
        assert Log(recipe, [ACC], INPUTS, "t").ask().values == own

    @pytest.mark.parametrize("objectives", [[ACC], [ACC, LOSS]])
    def test_a_search_with_the_largest_seed_can_go_on(self, home: Path, objectives: list[Objective]) -> None:
        recipe = parse(**{"  space:": f"  seed: {2**32 - 1}\n  space:"})
        for number in range(2):
            log = Log(recipe, objectives, INPUTS, "t")
            log.done(log.ask(), [0.5] * len(objectives))
            assert len(log.trials) == number + 1

    def test_two_searches_that_are_alike_do_not_share_their_log(self, recipe: Recipe) -> None:
        """The second took the trials of the first for cut off."""
        with ExitStack() as held:
            log = Log(recipe, [ACC], INPUTS, "t", held)
            trial = log.ask()
            with ExitStack() as other, pytest.raises(LewisError, match="another run searches the same values"):
                Log(recipe, [ACC], INPUTS, "t", other)
            log.done(trial, [0.5])
        with ExitStack() as held:
            assert [each.state for each in Log(recipe, [ACC], INPUTS, "t", held).trials] == ["done"]

    @pytest.mark.parametrize("objectives", [[ACC], [ACC, LOSS]])
    def test_what_goes_on_tries_something_new(self, recipe: Recipe, objectives: list[Objective]) -> None:
        """A sampler that starts with the same seed again draws the same values again."""
        for _ in range(5):
            log = Log(recipe, objectives, INPUTS, "t")
            log.done(log.ask(), [0.5] * len(objectives))
        values = [tuple(trial.values.values()) for trial in log.trials]
        assert len(values) == 5 and len(set(values)) > 3

    def test_other_inputs_tasks_or_spaces_are_another_search(self, recipe: Recipe) -> None:
        digests = {
            Log(each, objectives, inputs, tasks).digest
            for each, objectives, inputs, tasks in [
                (recipe, [ACC], INPUTS, "t"),
                (recipe, [ACC], {**INPUTS, "org/a": "9"}, "t"),
                (recipe, [ACC], INPUTS, "u"),
                (recipe, [LOSS], INPUTS, "t"),
                (parse("merge_method: [ties]"), [ACC], INPUTS, "t"),
            ]
        }
        assert len(digests) == 5

    def test_other_weights_are_another_search_where_they_make_the_score(self, recipe: Recipe) -> None:
        def digest(objective: Objective, weights: str) -> str:
            weighted = parse(**{"tasks: [x]": f"tasks: [x, y], weights: {{{weights}}}"})
            return Log(weighted, [objective], INPUTS, "t").digest

        mean = Objective("weighted/mean,none", True)
        assert digest(mean, "x: 1, y: 2") != digest(mean, "x: 2, y: 1")
        assert digest(ACC, "x: 1, y: 2") == Log(recipe, [ACC], INPUTS, "t").digest

    def test_only_ranges_that_were_sampled_wrongly_are_another_search(self, home: Path) -> None:
        """The digests of all other searches are those of before: their logs are found again."""
        assert space.identity(log_of(parse()).space) == []
        narrow = parse("seed: {min: 0, max: 9}, parameters.lambda: {min: 100.01, max: 100.02}")
        assert space.identity(log_of(narrow).space) == [["seed", True, 4], ["parameters.lambda", False, 8]]

    def test_another_precision_is_another_search(self, recipe: Recipe) -> None:
        digests = [Log(recipe, [ACC], INPUTS, "t", numbers=precision(each)).digest for each in ("cpu", "cuda:1")]
        assert digests[0] == Log(recipe, [ACC], INPUTS, "t").digest != digests[1]

    def test_failed_and_pruned(self, recipe: Recipe) -> None:
        """What a test shows to be worse than the best is given up; a score alone decides nothing."""
        log = Log(recipe, [ACC], INPUTS, "t")
        trial = log.ask()
        assert not log.behind(trial, 4.0, documents=8, p=1.0)
        log.done(trial, [4.0])
        trial = log.ask()
        assert log.behind(trial, 3.9, documents=8, p=0.04)
        log.pruned(trial)
        log.failed(log.ask(), "no such density")
        trial = log.ask()
        assert not log.behind(trial, -1.0, documents=8, p=0.06)
        seen = Log(recipe, [ACC], INPUTS, "t").trials
        assert [(each.state, each.scores) for each in seen[1:]] == [("pruned", ()), ("failed", ())]
        assert seen[-1].reason == "no such density" and Log(recipe, [ACC], INPUTS, "t").front[0].scores == (4.0,)

    def test_a_score_that_is_no_number_is_a_failure_with_a_reason(self, recipe: Recipe) -> None:
        log = Log(recipe, [ACC], INPUTS, "t")
        run(log, 1, lambda _: math.nan)
        assert [(each.state, each.reason) for each in log.trials] == [("failed", "its score x/acc,none is NaN")]

    def test_the_best_trial_stays_done_if_it_cannot_be_scored_again(self, recipe: Recipe) -> None:
        log = Log(recipe, [ACC], INPUTS, "t")
        run(log, 1, closeness)
        for again in (log, Log(recipe, [ACC], INPUTS, "t")):
            again.failed(again.front[0], "lm-eval did not finish")
            assert [(each.state, each.reason) for each in again.trials] == [("done", "")]

    def test_nothing_done_has_no_front(self, recipe: Recipe) -> None:
        log = Log(recipe, [ACC], INPUTS, "t")
        assert log.front == [] and log.trials == []
        log.failed(log.ask(), "x")
        assert log.front == []

    def test_the_lower_is_better_where_it_is(self, recipe: Recipe) -> None:
        log = Log(recipe, [LOSS], INPUTS, "t")
        run(log, 4, lambda trial: float(trial.number))
        assert log.front[0].number == 0

    def test_of_equal_trials_the_first_is_the_best(self, recipe: Recipe) -> None:
        """Each later one was reported as the best so far."""
        log = Log(recipe, [ACC], INPUTS, "t")
        run(log, 3, lambda _: 0.5)
        assert [trial.number for trial in log.front] == [0]

    def test_two_metrics_have_a_front(self, recipe: Recipe) -> None:
        log = Log(recipe, [LOSS, ACC], INPUTS, "t")
        for loss, acc in [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (0.5, 0.1)]:
            log.done(log.ask(), [loss, acc])
        assert [trial.number for trial in log.front] == [3, 0, 1]


def test_tables_and_pictures(recipe: Recipe) -> None:
    log = Log(recipe, [ACC, LOSS], INPUTS, "t")
    for acc, loss in [(0.5, 1.0), (0.9, 2.0), (0.1, 0.5)]:
        log.done(log.ask(), [acc, loss])
    log.failed(log.ask(), "it broke")
    table = report.rows(log.trials, log.objectives)
    assert [row["state"] for row in table] == ["done"] * 3 + ["failed"]
    assert table[1]["x/acc,none ↑"] == "0.9" and table[3]["x/loss,none ↓"] == "" and table[3]["reason"] == "it broke"
    pictures = [
        report.history(log.trials, log.objectives),
        report.history([], [ACC]),
        report.pareto(log.trials, log.front, log.objectives),
    ]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures)


def test_the_picture_calls_no_drawn_values_the_recipes_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a recipe whose own value is not in the range, a line at the first trial's score bore their name."""
    log = log_of(parse("parameters.lambda: {min: 2, max: 3}"))
    run(log, 1, lambda _: 0.5)
    monkeypatch.setattr(report, "png", lambda figure: figure)
    figure: Any = report.history(log.trials, log.objectives)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["a trial", "the best so far", "the first trial"]

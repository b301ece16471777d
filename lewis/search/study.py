"""Search: try values of a recipe, score each on one half of the documents, and keep what was tried on disk.

Optuna chooses the values (TPE, arXiv 2304.11127; for two metrics NSGA-II, doi 10.1109/4235.996017). Its journal lies
in the store, so a search that was killed goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from lewis import store
from lewis.errors import InputError, RecipeError
from lewis.recipe.recipe import Recipe, value_of
from lewis.recipe.schema import SearchRange
from lewis.store import kinds

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as OptunaTrial
    from optuna.trial import FrozenTrial

SEMANTICS = "1"  # bump when what was tried before is no longer comparable
ALLOWED = ("merge_method", "parameters.", "models[", "lewis.density.", "lewis.importance.", "lewis.prune_by", "seed")
_AGAIN, _REASON = "tried again as", "reason"  # keys of Optuna's attributes
STARTUP = 5  # trials before the sampler and the pruner have an opinion
Values = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Trial:
    """One set of values.

    Attributes:
        number: from 0; trial 0 has the recipe's own values.
        values: YAML path -> value.
        state: `running`, `done`, `pruned` (behind after a part of the documents) or `failed`.
        scores: of the metrics, in the search's order; empty unless done.
        reason: why it failed.
    """

    number: int
    values: Values
    state: str
    scores: tuple[float, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def overrides(self) -> list[str]:
        """As `--set` takes them."""
        return [
            f"{path}={yaml.safe_dump(value).removesuffix('...' + chr(10)).strip()}"
            for path, value in self.values.items()
        ]


@dataclass(frozen=True)
class Objective:
    """A metric (`task/metric,filter`) and whether more of it is better."""

    metric: str
    higher_is_better: bool

    @property
    def label(self) -> str:
        """The metric with an arrow that says which way is better."""
        return f"{self.metric} {'↑' if self.higher_is_better else '↓'}"


def objectives_of(recipe: Recipe) -> tuple[str, ...]:
    """The metrics that a search goes by.

    Raises:
        RecipeError: if there is no `search` block, no metric or nothing to score.
    """
    if recipe.search is None:
        raise RecipeError("search: missing; `lewis search` needs this block: which values, in which range")
    gate = recipe.register_as.gate if recipe.register_as else None
    metrics = recipe.search.metrics or ((gate.metric,) if gate else ())
    if not metrics:
        raise RecipeError("search.metrics: missing; name one or two metrics, or give the recipe a gate")
    if recipe.evaluate is None:
        raise RecipeError("search: there is nothing to compare trials by; add an evaluate block")
    return metrics


def check_space(recipe: Recipe) -> None:
    """Check every path of the space, and every value at its ends, against the recipe.

    Raises:
        RecipeError: with every problem, at its YAML path.
    """
    assert recipe.search is not None
    problems = []
    for path, wanted in recipe.search.space.items():
        where = f"search.space.{path}"
        if path.endswith("].model"):
            problems.append(f"{where}: a search keeps its models, since they are measured once; vary their weights")
            continue
        if not path.startswith(ALLOWED):
            problems.append(f"{where}: expected a value that the merge depends on: {', '.join(ALLOWED)}")
            continue
        ends = [wanted.min, wanted.max] if isinstance(wanted, SearchRange) else list(wanted)
        if not ends:
            problems.append(f"{where}: expected at least one choice, got an empty list")
        for value in ends:
            try:
                with_values(recipe, {path: _rounded(wanted, value)})
            except InputError as error:
                problems += [f"{where}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def with_values(recipe: Recipe, values: Values, *more: str) -> Recipe:
    """The recipe with a trial's values, and further overrides.

    Raises:
        RecipeError: if they do not go together.
    """
    overrides = [*Trial(0, values, "running").overrides, *more]
    return Recipe.parse(recipe.text, root=recipe.root, name=recipe.name, overrides=overrides)


class Log:
    """What a search has tried, on disk; made once per recipe, inputs and tasks, whatever the number of trials."""

    def __init__(self, recipe: Recipe, objectives: Sequence[Objective], inputs: Mapping[str, str], tasks: str) -> None:
        """Open it, or begin it.

        Args:
            recipe: with a `search` block.
            objectives: what is compared, the first first.
            inputs: reference -> commit or content digest of base and experts.
            tasks: digest of the tasks on the search's documents.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        assert recipe.search is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.recipe, self.search, self.objectives = recipe, recipe.search, tuple(objectives)
        space = recipe.search.model_dump(mode="json", include={"space", "seed"})
        names = [o.metric for o in objectives]
        self.digest = store.digest([SEMANTICS, recipe.blocks, space, names, dict(inputs), tasks])
        self.path = kinds.SEARCHES.path(self.digest)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._study: Study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.path))),
            study_name=self.digest,
            load_if_exists=True,
            directions=["maximize" if o.higher_is_better else "minimize" for o in objectives],
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        )
        seed = self.search.seed + len(self._study.get_trials())  # one that goes on must not draw what it drew before
        if len(objectives) > 1:
            self._study.sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=8)
        else:
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
            )
        self._live: dict[int, OptunaTrial] = {}
        self._recover()

    def _recover(self) -> None:
        """Try again what a killed process was trying, with the same values; a new search begins with the recipe's."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params, user_attrs={_AGAIN: trial.number})
        if not self._study.get_trials():
            self._study.enqueue_trial(self._own_values())

    def _own_values(self) -> dict[str, Any]:
        """The recipe's own values where the space has them: a search should not end below where it began."""
        own = {path: value_of(self.recipe, path) for path in self.search.space}
        return {path: v for path, v in own.items() if v is not None and _holds(self.search.space[path], v)}

    def ask(self) -> Trial:
        """The next values to try."""
        trial = self._study.ask({path: _distribution(wanted) for path, wanted in self.search.space.items()})
        self._live[trial.number] = trial
        values = {path: _rounded(self.search.space[path], value) for path, value in trial.params.items()}
        return Trial(trial.number, values, "running")

    def behind(self, trial: Trial, score: float) -> bool:
        """Whether a trial is worse than most were, by its score on a part of the documents."""
        live = self._live[trial.number]
        live.report(score, step=0)
        return bool(live.should_prune())

    def done(self, trial: Trial, scores: Sequence[float]) -> None:
        """Note a trial's scores, in the order of the objectives."""
        self._study.tell(trial.number, list(scores))

    def pruned(self, trial: Trial) -> None:
        """Note that a trial was given up."""
        from optuna.trial import TrialState

        self._study.tell(trial.number, state=TrialState.PRUNED)

    def failed(self, trial: Trial, reason: str) -> None:
        """Note that a trial could not be scored, and why."""
        from optuna.trial import TrialState

        self._live[trial.number].set_user_attr(_REASON, reason[:1000])
        self._study.tell(trial.number, state=TrialState.FAIL)

    @property
    def trials(self) -> list[Trial]:
        """All that was tried, oldest first, without what was tried again."""
        found = self._study.get_trials()
        again = {trial.user_attrs.get(_AGAIN) for trial in found}
        return [self._seen(trial) for trial in found if trial.number not in again and trial.state.name != "WAITING"]

    def _seen(self, trial: "FrozenTrial") -> Trial:
        states = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
        return Trial(
            number=trial.number,
            values={path: _rounded(self.search.space[path], value) for path, value in trial.params.items()},
            state=states.get(trial.state.name, "running"),
            scores=tuple(trial.values or ()),
            reason=str(trial.user_attrs.get(_REASON, "")),
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        )

    @property
    def front(self) -> list[Trial]:
        """The best trial; of two metrics, those that no other beats in both, best in the first one first."""
        numbers = {trial.number for trial in self._study.best_trials}
        best = [trial for trial in self.trials if trial.number in numbers]
        first = self.objectives[0].higher_is_better
        return sorted(best, key=lambda trial: (-trial.scores[0] if first else trial.scores[0], trial.number))


def _distribution(wanted: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(wanted, SearchRange):
        return FloatDistribution(wanted.min, wanted.max, log=wanted.log, step=wanted.step)
    return CategoricalDistribution(wanted)


def _rounded(wanted: Any, value: Any) -> Any:
    """Four digits, which are enough to tell trials apart; a whole number where the range has only such."""
    if not isinstance(wanted, SearchRange):
        return value
    if wanted.step and wanted.step.is_integer() and wanted.min.is_integer():
        return round(value)
    return min(wanted.max, max(wanted.min, float(f"{value:.4g}")))


def _holds(wanted: Any, value: Any) -> bool:
    if not isinstance(wanted, SearchRange):
        return value in wanted
    return isinstance(value, int | float) and wanted.min <= value <= wanted.max

"""A search: it tries values of a recipe, scores each trial on one half of the documents, and keeps a log on disk.

Optuna chooses the values (TPE, arXiv 2304.11127; for two metrics NSGA-II, doi 10.1109/4235.996017). Its journal is in
the store, so a search that was killed can continue.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from lewis import store
from lewis.errors import LewisError, RecipeError
from lewis.evaluation.statistics import power
from lewis.evaluation.statistics.scored import WEIGHTED_KEY
from lewis.recipe.recipe import Recipe
from lewis.search import space
from lewis.search.space import Values
from lewis.store import kinds, sealed_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as OptunaTrial
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

SEMANTICS = "1"  # raise it when the scores of earlier trials are no longer comparable
_AGAIN, _REASON = "tried again as", "reason"  # keys of Optuna's attributes
STARTUP = 5  # trials with random values, before the sampler starts


@dataclass(frozen=True)
class Trial:
    """One trial of a search: a set of values and its outcome.

    Attributes:
        number: from 0; trial 0 has the recipe's own values, apart from those that the space does not hold.
        values: YAML path -> value.
        state: `running`, `done`, `pruned` (given up after a part of the documents) or `failed`.
        scores: one per objective, in the search's order; empty unless the trial is done.
        reason: why the trial failed; empty if it did not.
        seconds: how long it took.
    """

    number: int
    values: Values
    state: str
    scores: tuple[float, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def overrides(self) -> list[str]:
        """The values as `--set` takes them."""
        return space.overrides(self.values)


@dataclass(frozen=True)
class Objective:
    """A metric (`task/metric,filter`), and whether higher values are better."""

    metric: str
    higher_is_better: bool

    @property
    def label(self) -> str:
        """The metric with an arrow that shows which direction is better."""
        return f"{self.metric} {'↑' if self.higher_is_better else '↓'}"


def objectives_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics by which a search compares its trials, the most important first.

    Raises:
        RecipeError: if there is no `search` block, no metric, one metric twice or nothing to score.
    """
    if recipe.search is None:
        raise RecipeError("search: missing; `lewis search` needs this block: which values, in which range")
    metrics = recipe.search.metrics or ((recipe.gate_metric,) if recipe.gate_metric else ())
    if not metrics:
        raise RecipeError("search.metrics: missing; name one or two metrics, or give the recipe a gate")
    if len(set(metrics)) < len(metrics):
        raise RecipeError(f"search.metrics: expected one or two metrics, got {metrics[0]!r} twice; give it once")
    if recipe.evaluate is None:
        raise RecipeError("search: there is nothing to compare trials by; add an evaluate block")
    return metrics


class Log:
    """The trials of a search, on disk. There is one log per recipe, inputs and tasks, however many trials it has.

    The weights of the tasks are part of the log's identity if a metric is the weighted mean.
    """

    def __init__(
        self,
        recipe: Recipe,
        objectives: Sequence[Objective],
        inputs: Mapping[str, str],
        tasks: str,
        held: ExitStack | None = None,
        numbers: str = "fp32",
    ) -> None:
        """Open the log, or create it.

        Args:
            recipe: with a `search` block.
            objectives: the metrics to compare trials by, the most important first.
            inputs: reference -> commit or content digest of base and experts, and of the merge with the recipe's own
                values, which depends on the calibration rows too.
            tasks: digest of the tasks on the search's documents.
            held: holds a lock on the log until it is closed; None: no lock is taken.
            numbers: the precision in which models are scored, as `lewis.devices.precision`.

        Raises:
            LewisError: if another process holds the lock.
        """
        import optuna

        assert recipe.search is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.recipe, self.search, self.objectives = recipe, recipe.search, tuple(objectives)
        self.space = space.of(recipe)
        searched = recipe.search.model_dump(mode="json", include={"space", "seed"})
        names = [o.metric for o in objectives]
        weights = [dict(recipe.score_weights)] if WEIGHTED_KEY in names else []  # with others the scores differ
        others: list[Any] = [numbers] if numbers != "fp32" else []  # a GPU's scores are not those of the CPU
        others += space.identity(self.space)
        self.digest = store.digest([SEMANTICS, recipe.blocks, searched, names, dict(inputs), tasks, *weights, *others])
        self.path = kinds.SEARCHES.path(self.digest)
        if held:
            try:
                held.enter_context(store.lock(f"search-{self.digest}").acquire(timeout=0))
            except Timeout:
                raise LewisError(
                    f"{recipe.name}: another run searches the same values of the same models now, for this recipe or "
                    "one that is alike; run this again when it has ended"
                ) from None
        self._study: Study = optuna.create_study(
            storage=open_journal(self.path),
            study_name=self.digest,
            load_if_exists=True,
            directions=["maximize" if o.higher_is_better else "minimize" for o in objectives],
        )
        trials = len(self._study.get_trials())
        seed = (self.search.seed + trials) % 2**32  # a continued search must draw other values
        if len(objectives) > 1:
            self._study.sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=8)
        else:
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
            )
        self._live: dict[int, OptunaTrial] = {}
        self._recover()

    def _recover(self) -> None:
        """Queue the unfinished trials of a killed process again; a new search starts with the recipe's own values."""
        from optuna.trial import TrialState

        found = self._study.get_trials()
        again = {trial.user_attrs.get(_AGAIN) for trial in found}  # the one before may have been killed half-way
        for trial in (each for each in found if each.state == TrialState.RUNNING):
            if trial.number not in again:
                queued = trial.system_attrs.get("fixed_params", {})  # a trial that has just begun has not drawn yet
                self._study.enqueue_trial({**queued, **trial.params}, user_attrs={_AGAIN: trial.number})
            self._study.tell(trial.number, state=TrialState.FAIL)
        if not found:
            self._study.enqueue_trial(self._own_values())

    def _own_values(self) -> dict[str, Any]:
        """The recipe's own values that the space holds, for trial 0: with all of them, the best trial is no worse."""
        own = {path: space.value_of(self.recipe, path) for path in self.space}
        return {path: v for path, v in own.items() if v is not None and space.holds(self.space[path], v)}

    def ask(self) -> Trial:
        """Start the next trial."""
        trial = self._study.ask({path: space.distribution(wanted) for path, wanted in self.space.items()})
        self._live[trial.number] = trial
        values = {path: space.rounded(self.space[path], value) for path, value in trial.params.items()}
        return Trial(trial.number, values, "running")

    def behind(self, trial: Trial, score: float, documents: int, p: float) -> bool:
        """Report a trial's score on a part of the documents; return whether a test shows it worse than the best one's.

        Args:
            score: on the part.
            documents: how many the part has.
            p: of the hypothesis that the trial is no worse than the best one, on the same documents.
        """
        self._live[trial.number].report(score, step=documents)  # the sampler learns from it, too
        return p <= power.ERROR

    def done(self, trial: Trial, scores: Sequence[float]) -> None:
        """Record a trial's scores, in the order of the objectives; with one that is NaN, the trial has failed."""
        if nan := [each.metric for each, score in zip(self.objectives, scores, strict=True) if math.isnan(score)]:
            self.failed(trial, f"its score {nan[0]} is NaN")
            return
        self._study.tell(self._live.pop(trial.number), list(scores))

    def pruned(self, trial: Trial) -> None:
        """Record that a trial was given up."""
        from optuna.trial import TrialState

        self._study.tell(self._live.pop(trial.number), state=TrialState.PRUNED)

    def failed(self, trial: Trial, reason: str) -> None:
        """Record that a trial could not be scored, and why.

        A trial that has ended keeps its state: the best one is scored again on a part of the documents, which may fail.
        """
        from optuna.trial import TrialState

        if live := self._live.pop(trial.number, None):
            live.set_user_attr(_REASON, reason[:1000])
            self._study.tell(live, state=TrialState.FAIL)

    @property
    def trials(self) -> list[Trial]:
        """All trials, oldest first, without those that were replaced when they were queued again."""
        found = self._study.get_trials()
        again = {trial.user_attrs.get(_AGAIN) for trial in found}
        return [self._seen(trial) for trial in found if trial.number not in again and trial.state.name != "WAITING"]

    def _seen(self, trial: "FrozenTrial") -> Trial:
        states = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
        return Trial(
            number=trial.number,
            values={path: space.rounded(self.space[path], value) for path, value in trial.params.items()},
            state=states.get(trial.state.name, "running"),
            scores=tuple(trial.values or ()) if trial.state.name == "COMPLETE" else (),
            reason=str(trial.user_attrs.get(_REASON, "")),
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        )

    @property
    def front(self) -> list[Trial]:
        """The best trial, the first of equal ones; of two objectives, all that no other beats in both, best first."""
        numbers = {trial.number for trial in self._study.best_trials}
        best = [trial for trial in self.trials if trial.number in numbers]
        first = self.objectives[0].higher_is_better
        best = sorted(best, key=lambda trial: (-trial.scores[0] if first else trial.scores[0], trial.number))
        return best if len(self.objectives) > 1 else best[:1]


def open_journal(path: Path) -> "JournalStorage":
    """Open the storage of a search in the file `path`: Optuna's journal, each line with a checksum.

    A damaged file is set aside. The search then starts again and asks for the same values, whose scores the store has.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

    class Journal(BaseJournalBackend):
        def __init__(self) -> None:
            self._file = JournalFileBackend(str(path))

        def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
            for line in self._file.read_logs(log_number_from):
                yield sealed_json.unsealed(line)

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self._file.append_logs([sealed_json.sealed(line) for line in logs])

    store.make_folder(path.parent)
    try:
        sealed_json.check_lines(path.read_bytes())
    except FileNotFoundError:
        pass
    except sealed_json.DamagedError as error:
        store.set_aside([path], str(error))
    storage = JournalStorage(Journal())
    store.restrict(path)
    return storage

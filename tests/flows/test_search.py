"""The search as a user runs it: real processes, a real Prefect server, a real registry."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from lewis.errors import InputError, LewisError
from lewis.evaluation.harness.lm_eval import tasks_digest
from lewis.evaluation.statistics.scored import WEIGHTED, Scored
from lewis.evaluation.statistics.scores import Ends, Part, Samples, combined
from lewis.models.source import pin
from lewis.recipe.recipe import Recipe
from lewis.search.study import Log, Objective, Trial
from lewis_flows import merge, search
from lewis_flows.cli.main import main
from lewis_flows.search import _quarter, _Trials
from lewis_tasks.support import flow_run as run_tags
from tests.conftest import Family
from tests.flows.conftest import Command
from tests.flows.test_champion import newest_ended
from tests.flows.test_run import finished, versions
from tests.support.local_hub import LocalHub
from tests.support.models import rewrite

SEARCH = """
search:
  trials: 4
  space:
    parameters.lambda: {min: 0.5, max: 2.0}
    lewis.density.min: {min: 0.1, max: 0.9}
    lewis.density.max: {min: 0.2, max: 1.0}
"""
# The two bounds cross in some trials: those fail, and the search goes on.


def searching(recipe: Path, **changes: str) -> Path:
    text = recipe.read_text().replace("samples: 16}}\n", "samples: 16}}\n  density: {min: 0.1, max: 1.0}\n")
    text = text.rstrip() + SEARCH
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    return recipe


def runs(home: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name("lewis").experiment_id]))  # type: ignore[union-attr]


def nested(home: Path, parent: Any) -> list[Any]:
    return [run for run in runs(home) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


@pytest.mark.long
def test_it_goes_on_after_a_kill_and_the_best_is_confirmed_on_other_documents(
    lewis: Command, recipe: Path, home: Path, prefect_url: str
) -> None:
    searching(recipe, **{"trials: 4": "trials: 4\n  parallel: 2"})
    patch = (
        "import time, lewis.search.trial as m; f = m.score_trial; n = []\n"
        "def slow(*a, **k):\n"
        "    n.append(1)\n"
        "    if len(n) == 4: print('HERE', flush=True); time.sleep(60)\n"
        "    return f(*a, **k)\n"
        "m.score_trial = slow"
    )
    killed = lewis("search", recipe, "--json", patch=patch)
    assert killed.stdout is not None
    while "HERE" not in (line := killed.stdout.readline()):
        assert line, finished(killed)
    os.kill(killed.pid, signal.SIGKILL)
    finished(killed)
    (parent,) = [run for run in runs(home) if run.data.tags.get("lewis.trial") == "all"]
    before = nested(home, parent)
    assert before and not versions(home)

    code, out, err = finished(lewis("search", recipe, "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert re.search(r"trial \d: (words/acc,none 0\.\d|given up)", err), err
    assert found["mlflow_run"] == parent.info.run_id
    assert len(found["trials"]) == 4
    done = [trial for trial in found["trials"] if trial["state"] == "done"]
    for trial in found["trials"]:
        crossed = trial["values"]["lewis.density.min"] > trial["values"]["lewis.density.max"]
        assert trial["state"] == ("failed" if crossed else "done")
        assert not crossed or "lewis.density.min" in trial["reason"]
    best = max(done, key=lambda trial: (trial["scores"][0], -trial["number"]))
    assert found["best"] == best["values"]

    (version,) = versions(home)
    assert found["merge"]["version"] == f"models:/tiny/{version.version}"
    params = next(run for run in runs(home) if run.info.run_id == version.run_id).data.params
    assert params["evaluate.documents"] == "confirm"
    assert float(params["parameters.lambda.0.value"]) == best["values"]["parameters.lambda"]
    rows = {row["model"]: row for row in found["confirmed"]}
    assert rows.keys() == {"default", "searched"} and 0 < int(rows["searched"]["documents"]) < 40

    ended = newest_ended(prefect_url, "search")
    word = "Promoted" if found["merge"]["promoted"] else "Rejected"
    assert ended["state_name"] == word and re.match(r"4 trials; v1: words/acc,none ", ended["state"]["message"])
    assert {"recipe:tiny", "trigger:hand", f"verdict:{word.lower()}"} <= set(ended["tags"])

    (parent,) = [run for run in runs(home) if run.info.run_id == parent.info.run_id]
    assert parent.info.status == "FINISHED" and json.loads(parent.data.tags["lewis.best"]) == found["best"]
    trials = nested(home, parent)
    assert {run.info.run_id for run in before} < {run.info.run_id for run in trials}
    assert sorted(int(run.data.tags["lewis.trial"]) for run in trials) == [t["number"] for t in found["trials"]]
    scores = {int(run.data.tags["lewis.trial"]): run.data.metrics.get("words/acc") for run in trials}
    assert {number: score for number, score in scores.items() if score is not None} == {
        trial["number"]: trial["scores"][0] for trial in done
    }
    # Trials leave no weights behind.
    assert len(list((home / "merged").glob("*"))) <= 2 and not list(Path("/dev/shm").glob("lewis-*/.*.partial"))


def test_what_is_wrong_costs_nothing(recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(recipe)]) == 2
    assert "search: missing" in capsys.readouterr().err
    searching(recipe, **{"parameters.lambda": "parameters.lamda"})
    assert main(["search", str(recipe)]) == 2
    assert re.search(r"search\.space\.parameters\.lamda: .*did you mean 'lambda'", capsys.readouterr().err)
    recipe.write_text(recipe.read_text().replace("lamda", "lambda"))
    given = ("evaluate.documents=by_release", "evaluate.limit=4")
    assert main(["search", str(recipe), *(word for each in given for word in ("--set", each))]) == 2
    assert "evaluate.documents: by_release does not hold in a search" in capsys.readouterr().err
    assert not (home / "search").exists() and not versions(home)


@pytest.fixture
def flow_here(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flows of this process are runs of the tests' server; evaluation tasks are not looked for."""
    from prefect import task
    from prefect.settings import PREFECT_API_URL, temporary_settings

    for module in (search, merge):
        monkeypatch.setattr(module, "check_tasks", task(lambda *_: "tasks"))
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield


PLAIN = """
merge_method: ties
base_model: %(base)s
models: [{model: %(math)s}, {model: %(code)s}]
evaluate: {tasks: [words.yaml], baselines: []}
search: {metrics: ["words/acc,none"], space: {parameters.lambda: [0.5, 1.0]}}
"""


@pytest.mark.usefixtures("flow_here", "home")
@pytest.mark.parametrize("on", ["error", pytest.param("warn", marks=pytest.mark.long)])
def test_a_search_of_models_that_do_not_belong_together_stops_before_its_first_trial(
    recipe: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str
) -> None:
    odd = rewrite(family.math, tmp_path / "odd", lambda name, t: t * (-1e6 if "layers.0.mlp.up" in name else 1))
    recipe.write_text(PLAIN % {"base": family.base, "math": odd, "code": family.code})
    monkeypatch.setattr(search, "_Trials", Mock(side_effect=LewisError("the first trial")))
    state = search.search_flow(str(recipe), [f"inspect.on={on}"], return_state=True)
    expected = rf"diagnose: error: {odd}: rescaled: " if on == "error" else "the first trial"
    assert state.is_failed() and re.match(expected, str(state.message)), state.message


def confirm(path: Path, overrides: list[str], keys: dict[str, str], edit: Callable[[], object]) -> Any:
    """Confirm `lambda: 0.5` for a recipe that is edited, or whose models move, after its search has begun."""
    plan, best = Recipe.load(path, overrides), Trial(1, {"parameters.lambda": 0.5}, "done", (0.5,))
    edit()
    tried: Any = SimpleNamespace(record=lambda **_: "run", objectives=[Objective("words/acc,none", True)], inputs=keys)
    return search._confirm(str(path), plan, overrides, tried, best)


@pytest.mark.usefixtures("flow_here", "home")
def test_the_best_values_are_not_merged_into_another_text_than_was_searched(
    recipe: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "pin", Mock(side_effect=LewisError("the models are pinned")))
    models = {"base": family.base, "math": family.math, "code": family.code}
    text = PLAIN % models + "register: {name: tiny}\n"

    def edited(old: str, new: str, *overrides: str) -> str:
        recipe.write_text(text)
        with pytest.raises(LewisError) as found:
            confirm(recipe, list(overrides), {}, lambda: recipe.write_text(text.replace(old, new)))
        return str(found.value)

    message = edited(f"[{{model: {family.math}}}, ", "[").partition("; ")
    assert message[0] == "tiny: edited while its search worked: models" and message[2].endswith("run the search again")
    assert "search worked: register; " in edited("name: tiny", "name: other", "seed=7")
    assert edited("\nmerge_method", "\n# A comment\nmerge_method") == "the models are pinned"


@pytest.mark.usefixtures("flow_here")
def test_the_best_values_are_merged_with_the_models_that_were_searched(
    hub: LocalHub, recipe: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is released while a search works is merged by the next run."""
    recipe.write_text(PLAIN % {"base": "org/base", "math": "org/math", "code": "org/code"} + "register: {name: tiny}\n")
    heads = {ref: pin(ref, recipe.parent).key for ref in ("org/base", "org/math", "org/code")}
    rename = Mock(side_effect=LewisError("the models are pinned"))
    monkeypatch.setattr(run_tags, "rename", rename)
    with pytest.raises(LewisError, match="the models are pinned"):
        confirm(recipe, [], heads, lambda: hub.commit("org/math", family.code))
    assert rename.call_args.args[1] == heads != {ref: pin(ref, recipe.parent).key for ref in heads}


@pytest.mark.usefixtures("flow_here", "scores_here")
def test_a_metric_that_nothing_scores_is_named(recipe: Path, home: Path) -> None:
    searching(recipe, **{"trials: 4": "trials: 4\n  metrics: ['words/ac,none']"})
    state = search.search_flow(str(recipe), return_state=True)
    with pytest.raises(InputError, match="there is no score 'words/ac,none'; did you mean 'words/acc,none'"):
        run_tags.result_of_run(state)
    assert not versions(home)


def test_a_quarter_is_of_each_task_that_the_metric_has() -> None:
    """A look has so many documents of each task: a quarter of all of them together were all of four tasks."""
    values = Part("", 1.0, "mean", tuple(map(str, range(40))), (1.0,) * 40)
    each = [Samples(name, "acc,none", (replace(values, task=name),)) for name in "abcd"]
    mean = combined(*WEIGHTED, [(one, 0.25) for one in each])
    found = Scored("trial", "key", (), (*each, mean), Ends({}, 0, 0, None))
    assert [_quarter(found, metric) for metric in ("weighted/mean,none", "a/acc,none", "a/f1,none")] == [10, 10, 0]


@pytest.mark.usefixtures("home")
def test_a_search_does_not_go_on_with_scores_of_another_merge(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge of the same recipe is another one after an edit of the file with its calibration rows."""
    plan, metric = Recipe.load(searching(recipe)), "words/acc,none"
    first = SimpleNamespace(by_name={metric: SimpleNamespace(higher_is_better=True)}, samples=())
    monkeypatch.setattr(search, "_scored", lambda *_: first)
    monkeypatch.setattr(_Trials, "submit", Mock())

    def digest(merged: str) -> str:
        monkeypatch.setattr(search, "result_of", lambda _: SimpleNamespace(model=merged))
        with ExitStack() as held:
            return _Trials(plan, {}, "tasks", (metric,), held).log.digest

    assert digest("before") == digest("before") != digest("after")


@pytest.mark.usefixtures("home")
def test_trials_on_other_documents_are_not_compared(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of a task were edited between two trials, and the best of the mixed scores won."""
    plan, tried = Recipe.load(searching(recipe)), _Trials.__new__(_Trials)
    tried.plan, tried.settings = plan, search._settings(plan, search.SEARCH)
    tried.tasks, live = tasks_digest(tried.settings), [(Trial(1, {}, "running"), plan)]
    monkeypatch.setattr(tried, "submit", Mock())
    monkeypatch.setattr(search, "result_of", Mock())
    monkeypatch.setattr(search, "_scored", Mock())
    assert len(tried._score(live, "all", tried.settings)) == 1
    (recipe.parent / "words.jsonl").write_text('{"question": "w1", "answer": "w2"}\n')
    with pytest.raises(LewisError, match="a file of the tasks changed while the search worked"):
        tried._score(live, "all", tried.settings)


class Trials(_Trials):
    """Trials of one recipe that are all scored, or all fail."""

    def __init__(self, plan: Recipe, reason: str) -> None:
        assert plan.search is not None
        self.search, self.reason = plan.search, reason
        self.log = Log(plan, [Objective("words/acc,none", True)], {}, "tasks")

    def _round(self, count: int) -> None:
        for trial in [self.log.ask() for _ in range(count)]:
            if self.reason:
                self.log.failed(trial, self.reason)
            else:
                self.log.done(trial, [0.5])

    def record(self, *, ended: bool) -> str:
        return ""


def test_a_search_of_which_all_trials_failed_can_be_run_again(recipe: Path, home: Path) -> None:
    plan = Recipe.load(searching(recipe))
    for _ in range(2):
        with pytest.raises(LewisError, match="trials could be scored: the disk is full"):
            Trials(plan, "the disk is full").run(2, float("inf"))
    again = Trials(plan, "")
    assert again.run(2, float("inf")).scores == (0.5,) and len(again.log.trials) == 6
    assert Trials(plan, "").run(2, float("inf")).number == 4 and len(again.log.trials) == 6, "there are enough"

"""What a person watching Prefect sees of a run: its name, its report, its failure, its assets, its events."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from prefect.states import Completed

from lewis import library as lewis_library
from lewis.merging.step import MergedModel
from lewis_flows.cli.main import main
from lewis_flows.cli.run import _run_flow, print_merge
from lewis_flows.merge import MergeReport
from lewis_flows.service import note
from lewis_tasks.support import flow_run
from tests.conftest import Family
from tests.flows.test_run import NO_SCORES
from tests.support.models import parse, rewrite

SCORES = "evaluate.baselines=[experts]"
"""The base is scored all the same: the first champion is compared with it."""


@pytest.fixture
def client(prefect_url: str) -> Iterator[Any]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as connected:
        yield connected


@pytest.fixture
def own(recipe: Path) -> Path:
    """The recipe under a name that no other test on this server uses."""
    return recipe.rename(recipe.with_name(f"r{time.time_ns()}.yaml"))


def test_the_terminal_shows_what_held_back_rows_say_of_the_fit(home: Path, family: Family, capsys: Any) -> None:
    """Of a merge that was found in the store, no line of the run said that its fit was left out."""
    sets = {"a": {"texts": [f"w1 w2 w3 w{i}" for i in range(4)], "samples": 4}}
    models = [{"model": str(each), "calibration": "a"} for each in family.experts]
    recipe = {"merge_method": "regmean_forward", "base_model": str(family.base), "models": models}
    made = lewis_library.merge(parse({**recipe, "lewis": {"calibrations": sets}}), home.parent / "out")
    print_merge(MergeReport.of("r", MergedModel(digest=made.digest, folder=made.folder), None))
    assert made.fit and made.fit in capsys.readouterr().out.splitlines()


def eventually(find: Callable[[], Any], patience: float = 120) -> Any:
    deadline = time.monotonic() + patience
    while not (found := find()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found, "it did not come in time"
    return found


def events(client: Any, name: str, resource: str) -> list[Any]:
    from prefect.events.filters import EventFilter

    wanted = EventFilter.model_validate({"event": {"name": [name]}, "resource": {"id": [resource]}})
    return list(client.read_events(wanted, limit=50).events)


def runs(client: Any, recipe: Path) -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter

    return list(client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"name": {"like_": recipe.stem}})))


def artifact(client: Any, recipe: Path, kind: str) -> str:
    from prefect.client.schemas.filters import ArtifactFilter
    from prefect.client.schemas.sorting import ArtifactSort

    wanted = ArtifactFilter.model_validate({"key": {"any_": [f"{recipe.stem}-{kind}"]}})
    found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC)
    return str(found[0].data)


def merged(recipe: Path, *overrides: str) -> dict[str, Any]:
    """The report of a run in this process, as `lewis run --json` prints it."""
    from lewis_flows.merge import merge_flow

    state = merge_flow(str(recipe), list(overrides), return_state=True)
    return dict(json.loads(flow_run.result_of_run(state).model_dump_json()))


@pytest.mark.usefixtures("scores_here")
def test_the_story_of_two_runs(
    own: Path, home: Path, family: Family, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    math, code = home.parent / "math", home.parent / "code"  # which no other test has measured on this server
    shutil.copytree(family.math, math)
    shutil.copytree(family.code, code)
    text = own.read_text().replace(str(family.math), str(math)).replace(str(family.code), str(code))
    private = "serve: {kind: command, run: [private]}\n"  # no page of a run names it
    own.write_text(text.replace("name: tiny", f"name: {own.stem}") + private)
    words = own.with_name("words.yaml")
    words.write_text(words.read_text().replace("doc_to_target: 0", "doc_to_target: 2"))  # there `math` beats the base
    first = merged(own, "evaluate=null", "register.gate=null")
    assert first["kept"] == []
    page = Path(first["page"]).read_text()
    assert "merge_method" in page and "kind: command" not in page
    text = artifact(client, own, "run-report")
    assert f"**models:/{own.stem}/1 is the new champion.**" in text and "Started by hand." in text
    assert text.count("**new**") == 4 and "| measure | 3 | 0 |" in text and "## Scores" not in text
    assert "**no findings: these models can be merged**" in artifact(client, own, "inspection")
    [run] = runs(client, own)
    assert (run.name, run.state.name) == (f"{own.stem}: first merge", "Promoted")

    moved = rewrite(family.math, home.parent / "moved", lambda _, tensor: tensor * 1.25)
    shutil.copyfile(moved / "model.safetensors", math / "model.safetensors")
    second = merged(own, SCORES)
    text = artifact(client, own, "run-report")
    assert f"What changed since the champion `models:/{own.stem}/1`" in text
    assert text.count("unchanged") == 3 and text.count("**moved**") == 1
    assert "| measure | 1 | 2 |" in text and "`words/acc,none` ↑" in text and "vs champion" in text

    both = runs(client, own)
    [again] = [each.name for each in both if each.id != run.id]
    assert re.fullmatch(rf"{own.stem}: recipe edited, math \w{{6}} -> \w{{6}}", again), again  # its overrides changed
    _check_mlflow(own.stem, home, both, text)
    print_merge(MergeReport.model_validate(second))
    terminal = capsys.readouterr().out
    _check_tables(client, own, home, second, text, terminal)
    _check_kept(client, own, home, second, text, terminal)
    _check_events(client, own.stem, first, second)
    _check_assets(client, own.stem, family.base, math, code, second)


def _check_mlflow(name: str, home: Path, made_by: list[Any], text: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    version = client.get_model_version(name, "2")
    tags = client.get_run(version.run_id).data.tags
    assert tags["lewis.prefect.flow_run_id"] in {str(run.id) for run in made_by}
    assert tags["lewis.prefect.flow_run_id"] in tags["lewis.prefect.url"]
    assert tags["lewis.prefect.url"] in text and version.run_id in text
    assert "![The champion over the versions](data:image/png" in text
    assert Path(client.download_artifacts(version.run_id, "run_report.md", home.parent)).read_text() == text


def _check_tables(client: Any, own: Path, home: Path, second: dict[str, Any], text: str, terminal: str) -> None:
    """The same rows in the terminal, in Prefect, in MLflow, in the run's report and in the model card."""
    from mlflow import MlflowClient

    rows = second["comparison"]
    assert [row["model"] for row in rows] == ["base", "math", "code", "champion", "merged"] and rows[0]["95 % interval"]
    wanted = [[cell for cell in row.values() if cell] for row in rows]
    card = (Path(second["folder"]) / "README.md").read_text()
    for table in (text, card):
        lines = [line.replace("`", "") for line in table.splitlines()]
        assert all("| " + " | ".join(row.values()) + " |" in lines for row in rows)
    assert rows[0]["metric"] in terminal
    for row in wanted:
        assert any(
            re.fullmatch(r"\s*" + r"\s+".join(map(re.escape, row[1:])) + r"\s*", line) for line in terminal.splitlines()
        )
    assert json.loads(artifact(client, own, "comparison")) == rows
    mlflow = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    version = mlflow.get_model_version(own.stem, "2")
    run = version.run_id
    measured = {m.key: m for m in mlflow.get_logged_model(version.source.removeprefix("models:/")).metrics}
    ours, theirs, gained = (measured[f"{name}/words/acc"] for name in ("merged", "base", "gain on base"))
    assert f"{ours.value:.4g}" == rows[-1]["score"].split()[0] and len(ours.dataset_digest) == 32
    assert {(m.dataset_name, m.dataset_digest) for m in (theirs, gained)} == {("words", ours.dataset_digest)}
    given = {
        (each.dataset.name, each.tags[0].value): each.dataset for each in mlflow.get_run(run).inputs.dataset_inputs
    }
    assert given.keys() == {("words", "evaluation"), ("words", "calibration")}
    assert given["words", "evaluation"].digest == ours.dataset_digest
    assert json.loads(given["words", "calibration"].source) == {"format": "json", "data_files": "words.jsonl"}
    found = json.loads(Path(mlflow.download_artifacts(run, "comparison.json", home.parent)).read_text())
    assert [dict(zip(found["columns"], data, strict=True)) for data in found["data"]] == rows
    shown = version.description.replace("\u2007\u2007\u200b |", " |").replace(
        "\u00a0", " "
    )  # columns with room between them
    own_links = re.sub(r"\(get-artifact\?path=([^&)]*)&run_uuid=\w+\)", r"(\1)", shown)
    own_links, _, recipe = own_links.partition("\n\nThe recipe: ")
    assert recipe == "[recipe.yaml](recipe.yaml)" and "\n```yaml\nmerge_method: ties\n" in own_links
    assert version.description != shown and own_links in card  # its pages find pictures through the run


def _check_kept(client: Any, own: Path, home: Path, second: dict[str, Any], text: str, terminal: str) -> None:
    """How much of the expert's gain is kept, in the same places."""
    from mlflow import MlflowClient

    [row] = second["kept"]
    assert list(row) == ["expert", "task", "base", "expert's score", "merged", "kept", "kept by champion"]
    assert (row["expert"], row["task"]) == ("math", "words/acc,none ↑")
    base, best, merged = (float(row[name]) for name in ("base", "expert's score", "merged"))
    assert best > base and row["kept"] == f"{round(100 * (merged - base) / (best - base))} %"
    title = "## What is kept of each expert's gain"
    for table in (text, (Path(second["folder"]) / "README.md").read_text()):
        assert title in table and "| " + " | ".join(row.values()) + " |" in table.replace("`", "")
    assert "what is kept of each expert's gain over the base, on its own task:" in terminal
    assert re.search(r"\s+".join(map(re.escape, row.values())), terminal)
    assert json.loads(artifact(client, own, "kept")) == [row]
    mlflow = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    run = mlflow.get_model_version(own.stem, "2").run_id
    measured = mlflow.get_run(run).data.metrics
    assert measured["kept/words"] == pytest.approx((merged - base) / (best - base))
    assert f"{round(100 * measured['kept by champion/words'])} %" == row["kept by champion"]
    assert Path(mlflow.download_artifacts(run, "kept.json", home.parent)).exists()


def _check_events(client: Any, name: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    from lewis_tasks.support.moves import PROMOTED

    def both() -> list[Any]:
        found = events(client, PROMOTED, f"lewis.model.{name}")
        return found if len(found) == 2 else []

    newest, oldest = eventually(both)
    assert oldest.payload["previous"] is None and oldest.payload["digest"] == first["digest"]
    assert newest.payload["uri"] == f"models:/{name}/2" and newest.payload["previous"] == f"models:/{name}/1"
    assert newest.payload["recipe"] == name and newest.payload["reasons"] == second["verdict"]


def _check_assets(client: Any, name: str, base: Path, math: Path, code: Path, second: dict[str, Any]) -> None:
    from lewis_tasks.support import assets

    done = "prefect.asset.materialization.succeeded"
    merged = eventually(lambda: events(client, done, f"lewis://merged/{name}"))[0]
    assert merged.resource["prefect.asset.url"].endswith(f"/#/models/{name}?workflowType=machine_learning")
    parents = {resource.id for resource in merged.related if resource.role == "asset"}
    models = {str(math), str(base), str(code)}
    assert parents == {assets.asset(kind, ref).key for ref in models for kind in ("model", "importance")}
    assert merged.payload["digest"] == second["digest"] and merged.payload["mean_density"] == second["mean_density"]
    measured = eventually(lambda: events(client, done, assets.asset("importance", str(math)).key))
    assert len(measured) == 2  # its two states; what came from the cache was made only once
    assert [r.id for r in measured[0].related if r.role == "asset"] == [assets.asset("model", str(math)).key]
    assert len(events(client, done, assets.asset("importance", str(code)).key)) == 1


def test_a_failed_run_says_which_task_and_why(
    own: Path,
    client: Any,
    home: Path,
    prefect_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    monkeypatch.setattr("lewis.importance.measure.measure_sets", Mock(side_effect=OSError(28, "No space left")))
    # A set that no other test measures, which Prefect would remember.
    given = "--set", "lewis.calibrations.words.samples=11"
    assert main(["run", str(own), *NO_SCORES, *given]) == 1
    [run] = runs(client, own)
    told = "measure base: OSError: [Errno 28] No space left; free space where the store "
    assert run.state.name == "Failed" and run.state.message.startswith(told)
    err = capsys.readouterr().err
    assert f"lewis: it failed: {told}" in err and "raceback" not in err


def test_a_model_is_measured_in_one_task_and_on_what_the_store_does_not_have(
    client: Any, home: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow

    from lewis.importance import measure
    from lewis.importance.step import MeasureInput
    from lewis.recipe.schema import Importance
    from lewis.steps.graph import Node
    from lewis.steps.table import MEASURE
    from lewis_tasks.steps import task_of
    from lewis_tasks.support import assets
    from tests.support import pipeline

    made: list[list[str]] = []
    real = measure.measure_sets
    monkeypatch.setattr(
        measure,
        "measure_sets",
        lambda m, sets, *a, **k: (made.append([s.name for s in sets]), real(m, sets, *a, **k))[1],
    )
    texts = {name: {"texts": [f"w{i} w2 w3"], "samples": 1} for i, name in enumerate("abc", 4)}
    recipe = parse(
        {"merge_method": "ties", "base_model": str(family.base), "lewis": {"calibrations": texts}}
        | {"models": [{"model": str(family.math), "calibration": "a"}]}
    )
    base = pipeline.download(pipeline.pin(str(family.base), Path("/")))
    a, b, c = (pipeline.prepare_calibration(recipe, name, base) for name in "abc")
    settings, what = Importance(), [[a], [b], [a, b], [a, b], [c, b]]

    @flow
    def passes() -> list[Any]:
        found = []
        for sets in what:
            name = f"measure {base.ref} on {', '.join(each.name for each in sets)}"
            node = Node(name, MEASURE, lambda _: None, asset=("importance", str(home)))
            given = MeasureInput(base, tuple(sets), settings)
            found.append(task_of(node)(given, name, "x", return_state=True))
        return found

    states = passes()
    assert [state.name for state in states] == ["Completed", "Completed", "Cached", "Cached", "Completed"]
    assert made == [["a"], ["b"], ["c"]]
    names = [client.read_task_run(state.state_details.task_run_id).name for state in states]
    assert names == [f"measure {base.ref} on {sets}" for sets in ("a", "b", "a, b", "a, b", "c, b")]
    done, key = "prefect.asset.materialization.succeeded", assets.asset("importance", str(home)).key
    told = eventually(lambda: [*found] if len(found := events(client, done, key)) == 4 else [])
    assert sorted("".join(event.payload["calibrations"]) for event in told) == ["a", "ab", "b", "cb"]
    both = states[2].result()
    assert both == states[3].result() == [*states[0].result(), *states[1].result()]


@pytest.mark.long
def test_a_fit_measures_only_the_expert_that_has_moved(client: Any, home: Path, family: Family) -> None:
    """Second-order statistics of each expert come from a task of its own, and the merge waits for them."""
    from prefect.client.schemas.filters import FlowRunFilter

    from lewis_flows.merge import merge_flow

    math, path = shutil.copytree(family.math, home.parent / "math"), home.parent / f"fit{time.time_ns()}.yaml"
    sets = {"words": {"texts": ["w1 w2 w3 w4", "w5 w6"], "samples": 2}}
    experts = [{"model": str(math)}, {"model": str(family.code)}]
    data = {"merge_method": "regmean", "base_model": str(family.base), "models": experts}
    path.write_text(json.dumps(data | {"lewis": {"calibrations": sets}}))

    def states() -> dict[str, str]:
        state = merge_flow(str(path), return_state=True)
        of_run = FlowRunFilter.model_validate({"id": {"any_": [state.state_details.flow_run_id]}})
        return {run.name: run.state_name for run in client.read_task_runs(flow_run_filter=of_run)}

    own, other = "measure math", "measure code"
    first = states()
    assert (first[own], first[other], first["merge experts"]) == ("Completed",) * 3
    assert "measure base" not in first and "allocate" not in first
    moved = rewrite(family.math, home.parent / "moved", lambda _, tensor: tensor * 1.25)
    shutil.copyfile(moved / "model.safetensors", math / "model.safetensors")
    second = states()
    assert (second[own], second[other], second["merge experts"]) == ("Completed", "Cached", "Completed")
    assert len(list((home / "grams").iterdir())) == 3


def test_what_a_failure_tells_keeps_its_kind(client: Any) -> None:
    from prefect import flow, task

    from lewis.errors import BrokenModelError, InputError, LewisError, RecipeError, TransientError
    from lewis_tasks.support.failures import result_of, says_why

    @task(task_run_name="try {number}")
    def fail(number: int, error: Exception) -> None:
        raise error

    @flow
    @says_why
    def failing(error: Exception, in_task: bool) -> None:
        if not in_task:
            raise error
        result_of(fail.submit(1, error))

    def message(error: Exception, kind: type[LewisError], in_task: bool = True) -> str:
        state = failing(error, in_task, return_state=True)
        assert state.is_failed() and type(state.result(raise_on_failure=False)) is kind
        run = client.read_flow_run(state.state_details.flow_run_id)
        assert (f"broken:{'1' * 40}" in run.tags) == (kind is BrokenModelError)  # by which the poll knows it
        return str(run.state.message)

    assert message(BrokenModelError("org/x: broken", "1" * 40), BrokenModelError) == "try 1: org/x: broken"
    assert (
        message(LewisError("m.safetensors: cut; merge again"), LewisError) == "try 1: m.safetensors: cut; merge again"
    )
    assert message(TransientError("the Hub is busy"), TransientError) == "try 1: the Hub is busy"
    assert message(InputError("a: not found"), InputError) == "try 1: a: not found"
    assert message(RecipeError(["a: wrong", "b: wrong"]), RecipeError, in_task=False) == "a: wrong\nb: wrong"
    assert message(RuntimeError("shapes\nTraceback"), LewisError).startswith(
        "try 1: RuntimeError: shapes; the traceback"
    )
    lm_eval = "lm-eval failed (exit code 1): KeyError\nThe end of its output:\nTraceback"
    assert message(LewisError(lm_eval), LewisError) == "try 1: lm-eval failed (exit code 1): KeyError"


def test_a_wrong_recipe_is_told_in_the_state_of_the_run(own: Path, client: Any, home: Path) -> None:
    from lewis_flows.merge import merge_flow

    own.write_text(own.read_text().replace("merge_method", "merge_methode"))
    state = merge_flow(str(own), return_state=True)
    assert state.is_failed() and state.message is not None
    assert state.message.splitlines()[1] == "merge_methode: unknown key; did you mean 'merge_method'?"


def test_a_run_that_an_inspection_stopped_says_what_it_found(
    own: Path, client: Any, home: Path, family: Family
) -> None:
    from lewis_flows.merge import merge_flow

    odd = rewrite(family.math, home.parent / "odd", lambda name, t: t * (-1e6 if "layers.0.mlp.up" in name else 1))
    models = [{"model": str(each)} for each in (odd, family.code)]
    own.write_text(json.dumps({"merge_method": "ties", "base_model": str(family.base), "models": models}))
    state = merge_flow(str(own), return_state=True)
    assert state.is_failed()
    message = str(client.read_flow_run(state.state_details.flow_run_id).state.message)
    expected = rf"diagnose: error: {odd}: rescaled: model.layers.0.mlp.up_proj.weight: peak .*\n  means: .*\n  do: .*"
    assert re.match(expected, message), message
    assert not [each for each in runs(client, own) if each.state.name != "Failed"]


def test_a_run_is_named_by_what_moved_and_goes_on_if_that_is_not_known(
    own: Path, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect import flow
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from lewis.recipe.recipe import Recipe
    from lewis_tasks.support import flow_run

    recipe = Recipe.load(own)

    @flow
    def moved(commit: str) -> None:
        flow_run.tag(recipe=own.stem)
        flow_run.rename(recipe, {"org/math": commit * 40})

    runs = [moved(commit, return_state=True).state_details.flow_run_id for commit in "122"]
    names = [client.read_flow_run(run).name.removeprefix(f"{own.stem}: ") for run in runs]
    assert names == ["first merge", "org/math 111111 -> 222222", "nothing moved"]

    @flow
    def named() -> str:
        flow_run.rename(recipe, {})
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
            flow_run.rename(recipe, {})
        return "went on"

    state = named(return_state=True)
    assert state.result() == "went on" and "the run keeps its name" in caplog.text
    assert client.read_flow_run(state.state_details.flow_run_id).name == f"{own.stem}: nothing moved"


def test_why_a_run_started(client: Any, prefect_url: str) -> None:
    from prefect import flow
    from prefect.automations import Automation
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import EventTrigger, Posture

    from lewis_flows.release_event import EVENT, announce
    from lewis_tasks.support.flow_run import why

    @flow(name="why")
    def nothing() -> None: ...

    def deploy(name: str, *schedules: Any) -> Any:
        wanted = [DeploymentScheduleCreate(schedule=each, active=True) for each in schedules]
        return client.create_deployment(client.create_flow(nothing), name, schedules=wanted)

    by_hand = deploy("by-hand")
    assert why(client.create_flow_run_from_deployment(by_hand)) == "by hand"

    cron, every = (
        deploy("nightly", CronSchedule(cron="0 3 * * *", timezone="Europe/Berlin")),
        deploy("hourly", IntervalSchedule(interval=timedelta(hours=1, minutes=5))),
    )
    assert eventually(lambda: _whys(client, cron, why)) == {"by schedule (cron 0 3 * * * Europe/Berlin)"}
    assert eventually(lambda: _whys(client, every, why)) == {"by schedule (every 1 h 5 min)"}

    released = deploy("on-release")
    Automation(
        name="why-on-release",
        trigger=EventTrigger(expect={EVENT}, posture=Posture.Reactive, threshold=1, within=timedelta(0)),
        actions=[RunDeployment(source="selected", deployment_id=released)],
    ).create()
    time.sleep(3)  # until the server's triggers know of it
    announce("tiny", "org/math", "org/math", "1" * 40, "2" * 40)
    told = "because of a release: org/math 11111111 → 22222222"
    assert eventually(lambda: told in _whys(client, released, why))


def _whys(client: Any, deployment: Any, why: Callable[[Any], str]) -> set[str]:
    from prefect.client.schemas.filters import DeploymentFilter

    wanted = DeploymentFilter.model_validate({"id": {"any_": [deployment]}})
    return {why(run) for run in client.read_flow_runs(deployment_filter=wanted)}


def test_the_link_of_a_run_whose_server_ends_with_it_leads_to_the_server_of_the_service(
    home: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def started(*_: object, meanwhile: Callable[[str], object]) -> Iterator[str]:
        meanwhile(prefect_url)
        yield prefect_url

    def seen() -> tuple[str, str]:
        def link(**_: object) -> Any:
            return Completed(data=(flow_run.url_text(), flow_run.url()))

        monkeypatch.setattr("lewis_flows.merge.merge_flow", link)
        found: tuple[str, str] = _run_flow("merge", as_json=False)
        return found

    monkeypatch.setattr(flow_run, "later", "")
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", "4999")
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    assert seen()[0] == "Prefect run"
    monkeypatch.delenv("PREFECT_API_URL")
    with monkeypatch.context() as alone:
        alone.setattr("lewis_flows.service.servers.prefect_server", started)
        text, url = seen()
    assert text == "Prefect run, while `lewis up` runs" and url.startswith("http://127.0.0.1:4999/runs/flow-run/")
    note.write({"prefect": prefect_url})
    assert seen()[0] == "Prefect run"

"""Which version is the champion after good, bad and killed runs: real flows, scores, gate and registry."""

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.client.schemas.filters import FlowRunFilter

from lewis.errors import LewisError
from lewis.evaluation.gate import Incumbent, Standing
from lewis.evaluation.harness import process
from lewis.recipe.recipe import Recipe
from lewis.registry import promotion
from lewis.registry.history import picture
from lewis.registry.versions import champion
from lewis.steps.plan import make_plan
from lewis.store.kinds import check_png
from lewis_flows.cli.main import main
from lewis_flows.cli.run import print_merge
from tests.flows.conftest import TASK, write_words
from tests.support.damage import damage
from tests.support.judge_server import by_reference, judging
from tests.support.models import WORDS, rewrite, write_expert, write_llama
from tests.support.prefect_key import credentials

W1, W2 = (WORDS.index(word) + 3 for word in ("w1", "w2"))  # the right answer and a wrong one, after 3 special tokens
RECIPE = """
merge_method: task_arithmetic
base_model: base
models: [{model: half, parameters: {weight: 1.0}}]
evaluate: {tasks: [words.yaml], baselines: []}
register: {name: tiny, gate: {policy: better, metric: "words/acc,none"}}
inspect: {on: warn}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A base that always says w2, experts that say w1 to half of the questions or to all, and one of noise.

    Every token has 3 in its first channel and 3 or -3 in its second, and what the blocks add is small: so the rows of
    the head decide.
    """

    def embed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in name:
            tensor[:, 0], tensor[::2, 1], tensor[1::2, 1] = 3.0, 3.0, -3.0
        return says(W2, 1.0, 0.0)(name, tensor)

    def says(word: int, *row: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "lm_head.weight":
                tensor[word, : len(row)] = torch.tensor(row)
            return tensor

        return change

    base = rewrite(write_llama(tmp_path / "random", tied=False), tmp_path / "base", embed)
    rewrite(base, tmp_path / "half", says(W1, 1.0, 1.0))
    rewrite(base, tmp_path / "good", says(W1, 2.0, 0.0))
    write_expert(base, tmp_path / "noise", seed=1, scale=1.0)
    write_words(tmp_path)
    (tmp_path / "words.yaml").write_text(TASK)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(recipe: Path, home: Path, prefect_url: str, scores_here: None) -> Callable[..., Any]:
    """Merge an expert in this process, which spares the imports of another one."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from lewis_flows.merge import merge_flow
    from lewis_tasks.support.flow_run import result_of_run

    def start(expert: str, *overrides: str) -> Any:
        with temporary_settings({PREFECT_API_URL: prefect_url}):
            state = merge_flow(str(recipe), [f"models[0].model={expert}", *overrides], return_state=True)
            return result_of_run(state)

    return start


def aliases(home: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    model = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db").get_registered_model("tiny")
    return {alias: str(version) for alias, version in model.aliases.items()}


def versions(home: Path) -> dict[str, str]:
    """Version -> verdict."""
    from mlflow import MlflowClient

    found = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db").search_model_versions("name='tiny'")
    return {str(each.version): each.tags.get("lewis.verdict", "") for each in found}


def states(prefect_url: str, task: str) -> set[str]:
    """Of the runs of a task, by its name in the UI."""
    body = json.dumps({"task_runs": {"name": {"any_": [task]}}}).encode()
    headers = {"content-type": "application/json", **credentials()}
    request = urllib.request.Request(f"{prefect_url}/task_runs/filter", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return {each["state_name"] for each in json.load(answer)}


def edges_of(prefect_url: str, run: str) -> dict[str, set[str]]:
    """Task of a run -> the tasks that the graph in the UI has arrows from; both by name, once all are known."""
    request = urllib.request.Request(f"{prefect_url}/flow_runs/{run}/graph-v2", headers=credentials())
    deadline = time.monotonic() + 120
    while True:
        with urllib.request.urlopen(request, timeout=60) as answer:
            nodes = {each["id"]: each for _, each in json.load(answer)["nodes"]}
        if {"report run", "gate"} <= {each["label"] for each in nodes.values()} or time.monotonic() > deadline:
            return {n["label"]: {nodes[p["id"]]["label"] for p in n["parents"]} for n in nodes.values()}
        time.sleep(0.2)


def newest_run(prefect_url: str) -> str:
    """The state that the UI shows for the newest flow run that has ended."""
    return str(newest_ended(prefect_url)["state_name"])


def newest_ended(prefect_url: str, flow: str = "") -> dict[str, Any]:
    """The newest flow run that has ended, as the server knows it; of a flow, if one is named."""
    wanted = {"flows": {"name": {"any_": [flow]}}} if flow else {}
    body = json.dumps({"sort": "END_TIME_DESC", "limit": 1, **wanted}).encode()
    headers = {"content-type": "application/json", **credentials()}
    request = urllib.request.Request(f"{prefect_url}/flow_runs/filter", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer)[0])


def dead(*_: Any) -> None:
    """What is called as the process dies."""
    raise KeyboardInterrupt


def test_only_a_better_model_becomes_champion(
    run: Callable[[str], Any],
    home: Path,
    prefect_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = run("half")
    assert first.promoted and [row["score"].split()[0] for row in first.comparison] == ["0", "0.5"]

    worse = run("noise")
    assert worse.version == "models:/tiny/2" and worse.created and not worse.promoted
    assert aliases(home) == {"champion": "1", "challenger": "2"} and versions(home) == {"1": "passed", "2": "failed"}
    told = newest_ended(prefect_url)
    assert told["state_name"] == "Rejected" and told["state_type"] == "CANCELLED"
    assert told["name"] == "tiny: recipe edited"  # the expert is an override of the recipe here
    assert (
        told["state"]["message"].startswith("v2: words/acc,none ") and " vs 0.5; words/acc" in told["state"]["message"]
    )
    assert {"recipe:tiny", "trigger:hand", "verdict:rejected"} <= set(told["tags"])
    edges = edges_of(prefect_url, told["id"])
    scored = {"evaluate base words", "evaluate champion words", "evaluate merged words"}
    assert edges["gate"] == scored and edges["register v2"] == {"gate"} and edges["reject v2"] == {"register v2"}
    assert all(edges[each] == {"merge experts"} for each in scored - {"evaluate champion words"})
    assert edges["merge experts"] == {"inspect"} and max(map(len, edges.values())) == len(scored)
    assert edges["evaluate champion words"] == {"find champion", "merge experts"} and edges["report run"] == {
        "reject v2"
    }
    assert states(prefect_url, "evaluate champion words") == {"Cached"}  # it was the merged model of the first run
    _check_why_it_is_worse(home, worse)

    with monkeypatch.context() as dies, pytest.raises(KeyboardInterrupt):
        dies.setattr(promotion, "promote", dead)  # once it is registered
        run("good")
    assert versions(home) == {"1": "passed", "2": "failed", "3": ""} and aliases(home)["champion"] == "1"

    healed = run("good")
    assert healed.version == "models:/tiny/3" and healed.promoted and not healed.created
    told = newest_ended(prefect_url)
    assert told["state_name"] == "Promoted"  # not Cached: there is a new champion
    assert told["state"]["message"] == "v3: words/acc,none 1 vs 0.5; in place of v1"
    assert versions(home) == {"1": "passed", "2": "failed", "3": "passed"}
    assert aliases(home) == {"champion": "3", "previous": "1", "challenger": "2"}

    assert main(["rollback", "tiny", "--why", "it was rude"]) == 0
    assert aliases(home) == {"champion": "1", "previous": "3", "challenger": "2"}
    assert not run("good").promoted and aliases(home)["champion"] == "1"  # a withdrawn version stays out
    capsys.readouterr()
    assert main(["history", "tiny", "--json"]) == 0
    told = [(each["what"], each["version"][-1]) for each in json.loads(capsys.readouterr().out)][::-1]
    assert told == [("promoted", "1"), ("rejected", "2"), ("promoted", "3"), ("rolled back", "1"), ("rejected", "3")]

    assert main(["promote", "models:/tiny/2", "--why", "noise is art"]) == 0
    assert "models:/tiny/2 is the champion in place of models:/tiny/1" in capsys.readouterr().out
    assert main(["history", "tiny"]) == 0
    newest, *_ = capsys.readouterr().out.splitlines()
    assert re.search(r"promoted by hand +v2 +in place of v1 +noise is art \(", newest)
    picture = home.parent / "champions.png"
    assert main(["history", "tiny", "--plot", str(picture)]) == 0
    check_png(picture.read_bytes())
    assert main(["promote", "tiny/9", "--why", "x"]) == 2 and "no such version" in capsys.readouterr().err
    assert main(["history", "tine"]) == 2 and "no registered model" in capsys.readouterr().err


def _check_why_it_is_worse(home: Path, worse: Any) -> None:
    """What was lost, what moved, and the answers of both, in the report and in MLflow in the same words."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    run = client.get_model_version("tiny", "2").run_id
    text = Path(client.download_artifacts(run, "run_report.md")).read_text()
    [row] = [row for row in worse.comparison if row["model"] == "champion"]
    why, sides = (text.partition(f"## {title}\n\n")[2] for title in ("Why it is worse", "Answers side by side"))
    lost = f"{row['losses']} of 40 documents are lost against `champion`; gained: {row['wins']}."
    assert why.startswith(f"* `words/acc,none`: {lost} With `experts` in `evaluate.baselines`,")
    moved = re.search(r"\| `\S*noise` \| `(\d)` \| `(\S+) %` \| `-` \|", why)
    assert moved and float(moved[2]) > 1, why
    found = json.loads(Path(client.download_artifacts(run, "answers.json")).read_text())
    rows = [dict(zip(found["columns"], data, strict=True)) for data in found["data"]]
    assert len(rows) == 20 and {each["expected"] for each in rows} == {"w1"}
    assert all("\n".join(f"* {name}: `{cell}`" for name, cell in each.items()) in sides for each in rows)
    differ = [each["answer of champion"][0] != each["answer of merged"][0] for each in rows]
    assert differ == sorted(differ, reverse=True) and sum(differ) == min(20, int(row["losses"]) + int(row["wins"]))
    _check_traces(client, run, rows)
    assert all(
        (each[f"answer of {label}"] == "✓ w1") == each[f"answer of {label}"].startswith("✓")
        for each in rows
        for label in ("champion", "merged")
    )


def _check_traces(client: Any, run: str, rows: list[dict[str, str]]) -> None:
    """The answers that differ are traces of both models, with what is expected of them; a person's feedback is kept."""
    import mlflow

    experiment = client.get_run(run).info.experiment_id
    differ = [row for row in rows if row["answer of champion"][2:] != row["answer of merged"][2:]]
    mlflow.set_tracking_uri(client.tracking_uri)
    for label, version in (("champion", "1"), ("merged", "2")):
        model = client.get_model_version("tiny", version).source.removeprefix("models:/")
        found = client.search_traces(locations=[experiment], model_id=model)
        own = [each for each in found if each.info.request_metadata["mlflow.sourceRun"] == run]
        answers = sorted((each.data.spans[0].inputs["end of the prompt"], each.data.spans[0].outputs) for each in own)
        assert answers == sorted((row["end of the prompt"], row[f"answer of {label}"][2:]) for row in differ) and own
        assert {each.info.assessments[0].expectation.value for each in own} == {"w1"}
    mlflow.log_feedback(trace_id=own[0].info.trace_id, name="polite", value=False)
    assert [each.name for each in client.get_trace(own[0].info.trace_id).info.assessments] == ["expected", "polite"]


@pytest.mark.long
def test_a_release_with_equal_scores_becomes_champion_where_no_gain_is_asked_for(
    run: Callable[..., Any], recipe: Path, home: Path
) -> None:
    first = run("half")
    rewrite(recipe.parent / "half", recipe.parent / "moved", lambda _, tensor: tensor * 1.01)
    refused = run("moved")
    assert refused.version == "models:/tiny/2" and not refused.promoted
    assert [rule for rule in refused.verdict if rule.endswith("fail")] == [
        "words/acc,none must be better with p at most 0.05: gain +0.0000, from +0.0000, p 1: fail"
    ]
    let_in = run("moved", "register.gate.policy=not_worse")
    assert (let_in.digest, let_in.version, let_in.promoted) == (refused.digest, refused.version, True)
    assert first.digest != refused.digest and promotion.standing("tiny", "c" * 64) == Standing(
        Incumbent("models:/tiny/1", first.digest), 2
    )
    worse = run("noise", "register.gate.policy=not_worse")
    rules = [rule.split(":")[0] for rule in worse.verdict if rule.endswith("fail")]
    assert not worse.promoted and aliases(home)["champion"] == "2"
    assert rules[:2] == ["words/acc,none must not be worse by 0.1", "words/acc,none must not be worse than models"]


def test_what_passes_is_shown_to_a_judge_and_without_its_answer_nothing_is_promoted(
    run: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = "register.gate.judge={model: wise, documents: 12}"
    with judging(by_reference) as (url, asked):
        monkeypatch.setenv("LEWIS_JUDGE", url)
        first = run("half", asks)
        assert first.promoted and first.verdict[0].startswith(
            "judge wise must not prefer base: it prefers merged on 12"
        )
        assert len(asked) == 24
    with judging(lambda _: "hm", 401) as (url, _):
        monkeypatch.setenv("LEWIS_JUDGE", url)
        with pytest.raises(LewisError, match="refuses the model wise: it answers 401"):
            run("good", asks)
        assert versions(home) == {"1": "passed"} and aliases(home)["champion"] == "1"


@pytest.mark.long
def test_what_a_judge_does_not_prefer_stays_out(
    run: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("half").promoted
    with judging(lambda text: "[[B]]" if "answer of A\nw1\n" in text else "[[A]]") as (url, _):  # it is perverse
        monkeypatch.setenv("LEWIS_JUDGE", url)
        worse = run("good", "register.gate.judge={model: wise, documents: 12}")
        assert not worse.promoted and worse.verdict[0].endswith(": fail") and aliases(home)["champion"] == "1"


@pytest.mark.long
def test_a_run_that_changes_only_the_verdict_says_so(
    run: Callable[..., Any], recipe: Path, home: Path, prefect_url: str
) -> None:
    """It was Cached, with "nothing has changed", while a version began to wait for a person."""
    rewrite(recipe.parent / "base", recipe.parent / "equal", lambda _, tensor: tensor * 1.01)
    run("equal")
    assert newest_run(prefect_url) == "Rejected"
    looser = ("register.gate.policy=not_worse", "register.gate.tolerance=1", "register.gate.approve=true")
    assert run("equal", *looser).waits and versions(home) == {"1": "waiting"}
    assert newest_run(prefect_url) == "AwaitingApproval"
    run("equal")
    assert newest_run(prefect_url) == "Rejected" and versions(home) == {"1": "failed"}


@pytest.mark.long
def test_scoring_ends_once_the_verdict_is_known(
    run: Callable[..., Any], recipe: Path, home: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clear loser and a clear winner on the first 32 of 300 documents, and what is equal on all of them."""
    write_words(recipe.parent, 300)
    first = run("half", "evaluate.stop=known", "evaluate.full_scores=never")
    assert first.promoted and {row["documents"] for row in first.comparison} == {"32"}

    worse = run("noise", "evaluate.stop=known", "register.gate.policy=not_worse")
    assert not worse.promoted and {row["documents"] for row in worse.comparison} == {"32"}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    assert client.get_model_version("tiny", "2").tags["lewis.documents"] == "32 of 300"
    assert worse.verdict[-1].startswith("note: 32 of 300 documents of each task were scored, which was enough to know")
    message = newest_ended(prefect_url)["state"]["message"]
    assert message.startswith("v2: words/acc,none ") and " on 32 of 300 documents" in message
    assert states(prefect_url, "look at 32 documents: certain") == {"Completed"}
    assert states(prefect_url, "evaluate champion words, 32 documents") == {"Cached"}

    rewrite(recipe.parent / "half", recipe.parent / "moved", lambda _, tensor: tensor * 1.01)
    equal = run("moved", "evaluate.stop=known", "register.gate.policy=not_worse")
    assert equal.promoted and {row["documents"] for row in equal.comparison} == {"300"}
    assert "lewis.documents" not in client.get_model_version("tiny", "3").tags
    assert states(prefect_url, "look at 64 documents: not certain yet") == {"Completed"}

    better = run("good", "evaluate.stop=worse")
    assert better.promoted and {row["documents"] for row in better.comparison} == {"300"}
    again = run("good", "evaluate.stop=known")
    assert newest_run(prefect_url) == "Cached" and again.comparison[-1] == better.comparison[-1]
    run("noise", "evaluate.stop=known", "register.gate.policy=not_worse")
    assert newest_run(prefect_url) == "Rejected"  # by another champion


@pytest.mark.long
def test_what_is_promoted_early_is_scored_on_all_documents_afterwards(
    run: Callable[..., Any], recipe: Path, home: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promotion stands if that fails, and the next run goes on with it."""
    from mlflow import MlflowClient

    write_words(recipe.parent, 60)
    evaluate = process.run

    def breaks(request: dict[str, Any], **given: Any) -> dict[str, Any]:
        if request.get("look") is None:
            raise LewisError("the GPU is gone")
        return evaluate(request, **given)

    monkeypatch.setattr(process, "run", breaks)
    first, client = run("half", "evaluate.stop=known"), MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    assert first.promoted and first.created and {row["documents"] for row in first.comparison} == {"32"}
    ended = newest_ended(prefect_url)
    assert ended["state_name"] == "Promoted" and aliases(home) == {"champion": "1"}
    assert "; not scored on all documents, run again: evaluate base words: " in ended["state"]["message"]
    assert ended["state"]["message"].endswith(": the GPU is gone")
    version = client.get_model_version("tiny", "1")
    part = client.get_run(version.run_id).data.metrics["merged/words/acc"]
    assert version.tags["lewis.documents"] == "32 of 60"
    early = Recipe.load(recipe, ["models[0].model=half", "evaluate.stop=known", "evaluate.full_scores=never"])
    assert [each.state for each in make_plan(early).steps if each.name == "evaluate merged words"] == ["cached"]
    plan = Recipe.load(recipe, ["models[0].model=half", "evaluate.stop=known"])
    assert [each.state for each in make_plan(plan).steps if each.name == "evaluate merged words"] == ["to do"]

    monkeypatch.setattr(process, "run", evaluate)
    again = run("half", "evaluate.stop=known")
    assert again.version == first.version and {row["documents"] for row in again.comparison} == {"60"}
    assert [each.state for each in make_plan(plan).steps if each.name == "evaluate merged words"] == ["cached"]
    version = client.get_model_version("tiny", "1")
    whole = client.get_run(version.run_id).data.metrics["merged/words/acc"]
    shown = next(row["score"] for row in again.comparison if row["model"] == "merged")
    assert "lewis.documents" not in version.tags and whole != part and shown.startswith(f"{whole:.4g}")
    current = champion("tiny")
    assert current and current.metrics["words/acc,none"] == whole and f"{whole:.4g}" in version.description
    rows = json.loads(Path(client.download_artifacts(version.run_id, "comparison.json")).read_text())
    assert {row[rows["columns"].index("documents")] for row in rows["data"]} == {"60"}


@pytest.mark.long
def test_the_run_that_promotes_early_scores_on_all_documents_itself(
    run: Callable[..., Any], recipe: Path, home: Path, prefect_url: str
) -> None:
    from mlflow import MlflowClient

    write_words(recipe.parent, 60)
    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    for version, expert in (("1", "half"), ("2", "good")):
        better = run(expert, "evaluate.stop=known")
        assert better.promoted and {row["documents"] for row in better.comparison} == {"60"}
        assert " on 32 of 60 documents" in newest_ended(prefect_url)["state"]["message"]
        assert "lewis.documents" not in client.get_model_version("tiny", version).tags
    check_png(picture("tiny"))


@pytest.mark.long
def test_what_waits_after_an_early_end_is_scored_on_all_documents_only_once_a_person_approves(
    run: Callable[..., Any],
    recipe: Path,
    home: Path,
    prefect_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The worker dies after the answer, before the champion moves; the run that begins again moves it."""
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Pause
    from prefect.flow_engine import run_flow
    from prefect.flow_runs import resume_flow_run
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Scheduled

    from lewis_flows.merge import merge_flow
    from lewis_flows.registration import MergeReport

    write_words(recipe.parent, 60)
    monkeypatch.setenv("LEWIS_RECIPES", str(recipe.parent))
    asks = ["evaluate.stop=known", "register.gate.approve=true"]
    mlflow = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")

    def part(version: str) -> str:
        return str(mlflow.get_model_version("tiny", version).tags.get("lewis.documents", "all"))

    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        of_flow = client.create_flow(merge_flow)
        deployment = client.create_deployment(of_flow, "tiny", enforce_parameter_schema=False)

        def go_on(of: Any) -> Any:
            """As a worker does."""
            try:
                return run_flow(merge_flow, flow_run=client.read_flow_run(of), return_type="state")
            except Pause as pause:
                return pause.state

        def merge(expert: str) -> Any:
            given = {"recipe": "tiny", "overrides": [f"models[0].model={expert}", *asks]}
            of = client.create_flow_run_from_deployment(deployment, parameters=given).id
            assert go_on(of).name == "Suspended"
            report = MergeReport.saved(str(of))  # for the `lewis run` that may have started it
            assert report and report.waits and report.version
            return of

        def waiting() -> list[Any]:
            of_deployment = {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
            return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(of_deployment))

        try:
            first = merge("half")
            assert (versions(home), part("1"), aliases(home)) == ({"1": "waiting"}, "32 of 60", {"challenger": "1"})
            resume_flow_run(first, run_input={"approve": True, "why": "it is the first"})
            with monkeypatch.context() as dies, pytest.raises(KeyboardInterrupt):
                dies.setattr(promotion, "approve", dead)
                go_on(first)
            assert (versions(home), waiting()) == ({"1": "waiting"}, [])
            client.set_flow_run_state(first, Scheduled(), force=True)
            assert go_on(first).name == "Approved"
            assert (aliases(home)["champion"], part("1")) == ("1", "32 of 60")
            [after] = waiting()
            ended = go_on(after.id)
            assert (ended.name, ended.message) == ("Completed", "v1 is the champion already")
            assert part("1") == "all" and "trigger:approval" in client.read_flow_run(after.id).tags

            second = merge("good")
            again = run("good", *asks)  # without the service
            assert again.waits and not again.promoted
            print_merge(again)
            assert "verdict: passed, waits for: lewis approve tiny/2 --why ..." in capsys.readouterr().out
            resume_flow_run(second, run_input={"approve": False, "why": "it is rude"})
            assert go_on(second).name == "Refused" and waiting() == []
            assert (part("2"), aliases(home)["champion"]) == ("32 of 60", "1")
        finally:
            client.delete_deployment(deployment)


@pytest.mark.long
def test_documents_are_drawn_for_each_release(run: Callable[..., Any], recipe: Path, home: Path) -> None:
    """Other documents for the second version, on which the champion is scored, too."""
    from mlflow import MlflowClient

    write_words(recipe.parent, 300)
    drawn = "evaluate.documents=by_release", "evaluate.limit=64"
    assert run("half", *drawn).promoted
    rewrite(recipe.parent / "half", recipe.parent / "moved", lambda _, tensor: tensor * 1.01)
    assert run("moved", *drawn, "register.gate.policy=not_worse").promoted
    # The mark is the first version, the champion the second.
    good = run("good", *drawn, "register.gate.policy=not_worse")
    assert good.promoted and any("must not be worse than models:/tiny/1" in rule for rule in good.verdict)
    assert not any(rule.startswith("note: models") for rule in good.verdict)
    assert [row["model"] for row in good.comparison] == ["base", "champion", "merged"]
    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    runs = [client.get_run(each.run_id) for each in client.search_model_versions("name='tiny'")]
    digests = {each.dataset.digest for run in runs for each in run.inputs.dataset_inputs}
    assert len(digests) == 3
    of_champion = [run.data.metrics.get("champion/words/acc") for run in runs]
    assert None in of_champion and any(score and 0 < score < 1 for score in of_champion)


@pytest.mark.long
def test_a_search_gives_up_trials_that_are_worse_than_the_best(
    recipe: Path, run: Callable[..., Any], prefect_url: str
) -> None:
    """With a lambda of 0 the merge is the base, which has nothing right; 80 of 300 documents show it."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from lewis_flows.search import search_flow
    from lewis_tasks.support.flow_run import result_of_run

    write_words(recipe.parent, 300)
    space = "search: {trials: 5, space: {parameters.lambda: [0.0, 1.0]}}\n"
    recipe.write_text(f"{RECIPE.replace('half', 'good')}parameters: {{lambda: 1.0}}\n{space}")
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        found = result_of_run(search_flow(str(recipe), return_state=True))
    states = {(trial["values"]["parameters.lambda"], trial["state"]) for trial in found.trials}
    assert states == {(1.0, "done"), (0.0, "pruned")} and found.best == {"parameters.lambda": 1.0}


@pytest.mark.long
def test_a_flipped_bit_never_becomes_champion(
    run: Callable[[str], Any], recipe: Path, home: Path, prefect_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Other documents than other tests have: Prefect's memory in this process outlives their stores.
    (recipe.parent / "words.yaml").write_text(TASK.replace("task: words", "task: words\nmetadata: {version: 2}"))
    first = run("half")
    weights, config = first.folder / "model.safetensors", first.folder / "config.json"
    before = {path: path.read_bytes() for path in (weights, config)}
    assert weights.stat().st_nlink == 2 and weights.stat().st_mode & 0o777 == 0o400  # MLflow's too

    damage(weights, "flipped")
    damage(config, "flipped")
    again = run("half")
    assert {path: path.read_bytes() for path in before} == before
    assert (again.digest, again.version, again.promoted) == (first.digest, "models:/tiny/2", True)
    assert aliases(home) == {"champion": "2"} and versions(home) == {"1": "passed", "2": "passed"}
    assert newest_run(prefect_url) == "Promoted"  # not Cached
    (aside,) = (home / "quarantine").iterdir()
    assert (aside / "model.safetensors").read_bytes() != before[weights]

    scores = sorted((home / "scores").glob("*.json"))
    for path in scores:
        path.write_text(path.read_text().replace("0.5", "0.25"))
    assert run("half").comparison == first.comparison
    assert len(list((home / "quarantine").iterdir())) > 1

    assert main(["verify"]) == 0
    damage(weights, "flipped")
    with pytest.raises(LewisError, match=rf"verify: 2 of \d+ .* are damaged; the first: {first.folder}"):
        verify(prefect_url)
    assert newest_run(prefect_url) == "Failed"
    capsys.readouterr()
    run("half")
    assert aliases(home) == {"champion": "3"} and main(["verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == []


def verify(prefect_url: str) -> int:
    """The nightly check."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from lewis_flows.verify import verify_flow

    with temporary_settings({PREFECT_API_URL: prefect_url}):
        return int(verify_flow())


@pytest.mark.parametrize("version", ["tiny", "tiny/", "tiny/new", "/3"])
def test_a_version_is_a_name_and_a_number(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", version, "--why", "x"]) == 2
    assert f"expected NAME/VERSION, for example my-merge/3, got {version!r}" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["rollback {} --why x", "rollback {}/1 --why x", "history {}", "served {}"])
def test_a_name_with_a_slash_is_not_taken_for_another_model(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format("tiny/x").split()) == 2
    assert "expected the NAME of a registered model, for example my-merge, got 'tiny/x" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["promote", "tiny/1"], ["rollback", "tiny"]])
def test_a_move_by_hand_needs_a_reason(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2 and "--why" in capsys.readouterr().err


@pytest.mark.long
def test_an_adapter_is_scored_registered_and_served_on_its_base(
    run: Callable[..., Any], recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    lora = "output={kind: lora, rank: 2}"
    first = run("half", lora)
    assert first.promoted and [row["score"].split()[0] for row in first.comparison] == ["0", "0.5"]  # as the full model
    assert first.adapter == "LoRA adapter of 0 modules, rank 0, 1 saved whole; it leaves a relative error of 0"
    outer = torch.ones(16, 1) @ torch.linspace(0, 1e-3, 16)[None]
    rewrite(recipe.parent / "good", recipe.parent / "best", lambda n, t: t + outer if "q_proj" in n else t)
    better = run("best", lora)
    assert re.match(r"LoRA adapter of 2 modules, rank 2, 1 saved whole; .* error of \S+e-\d\d", better.adapter)
    rows = [(row["model"], row["score"].split()[0]) for row in better.comparison]
    assert better.promoted and rows == [("base", "0"), ("champion", "0.5"), ("merged", "1")]
    assert aliases(home) == {"champion": "2", "previous": "1"}

    card = (better.folder / "README.md").read_text()
    assert "library_name: peft" in card and f"## The adapter\n\n{better.adapter}" in card
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    version = client.get_model_version_by_alias("tiny", "champion")
    assert version.tags["lewis.adapter"] == better.adapter
    assert client.get_run(version.run_id).data.metrics["adapter/error"] < 1e-5
    text = client.download_artifacts(version.run_id, "run_report.md")
    assert better.adapter.partition(", at worst")[0] in Path(text).read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow/mlflow.db")
    served = mlflow.transformers.load_model("models:/tiny@champion").model.merge_and_unload().state_dict()
    wanted = load_file(recipe.parent / "best" / "model.safetensors")
    assert all(torch.allclose(served[name], tensor, atol=1e-6) for name, tensor in wanted.items())
    stored = home / "mlflow" / "artifacts" / "models" / version.source.removeprefix("models:/") / "artifacts" / "model"
    assert (stored / "adapter_model.safetensors").stat().st_nlink == 2 and not (stored / "model.safetensors").exists()
    alone = AutoModelForCausalLM.from_pretrained(stored)  # the adapter's config names the base
    assert torch.equal(alone.lm_head.weight, wanted["lm_head.weight"])


@pytest.mark.long
def test_an_adapter_whose_base_is_gone_must_be_scored_again(run: Callable[..., Any], recipe: Path) -> None:
    lora = "output={kind: lora, rank: 2}"
    assert run("good", lora).promoted
    rewrite(recipe.parent / "base", recipe.parent / "moved", lambda name, tensor: tensor * 1.5)
    (recipe.parent / "base").rename(recipe.parent / "old")
    (recipe.parent / "moved").rename(recipe.parent / "base")
    rewrite(recipe.parent / "base", recipe.parent / "after", lambda name, tensor: tensor + 0.1)
    lost = run("after", lora, "exclude=[norm]")
    assert not lost.promoted and "must be scored again: its files or base are gone" in lost.verdict[0]

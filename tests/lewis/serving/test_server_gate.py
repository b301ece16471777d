"""A server is asked what the model was asked that was scored: by lm-eval, of a real model, at a real server."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import LewisError
from lewis.evaluation.harness import child, process
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import score
from lewis.models.source import ModelFiles
from lewis.recipe.serve import Check, OpenaiTarget
from lewis.serving import server_gate, service
from lewis.serving.records import served
from lewis.serving.server_gate import RefusedError
from lewis.store.kinds import SERVED
from tests.conftest import Family
from tests.flows.conftest import TASK, write_words
from tests.support.completions_server import serving
from tests.support.http_sink import HttpSink, Request
from tests.support.lineage import crowned, make_home
from tests.support.word_tasks import WRITES


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalSettings:
    """Two tasks, evaluated in this process."""

    def evaluate_here(request: dict[str, Any], **_: Any) -> dict[str, Any]:
        return child.evaluate(**json.loads(json.dumps(request)))

    monkeypatch.setattr(process, "run", evaluate_here)
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path)
    for name, text in (("words", TASK), ("writes", WRITES)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return EvalSettings(("words.yaml", "writes.yaml"), tmp_path, limit=8)


def test_the_model_that_was_scored_passes_and_another_one_does_not(
    home: Path, family: Family, settings: EvalSettings
) -> None:
    score(ModelFiles.at("merged", "a" * 64, family.base), settings)
    score(ModelFiles.at("base", "b" * 64, family.base), settings)  # which is not served, and not asked
    kept = server_gate.requests("a" * 64, settings)
    assert {task: len(of) for task, of in kept.items()} == {"words": 8, "writes": 8}
    assert server_gate.requests("b" * 64, settings) == {} == server_gate.requests("a" * 64, None)

    def checked(model: Path) -> server_gate.Checked:
        with serving(model) as (url, _):
            return server_gate.check(url, str(model), kept, Check(tolerance=1e-3, agree=1, likelihoods=True))

    own, other = checked(family.base), checked(family.math)
    assert own.passed and own.line().startswith(
        "24 of 24 answers are those of the model that was scored, 100% of their text, likel"
    )
    server_gate.judge(own)
    assert not other.passed and len(other.differing) >= 8
    with pytest.raises(RefusedError, match=r"only \d+ of 24 answers .* scored '.*', served '") as error:
        server_gate.judge(other)
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.differing == error.value.differing


@pytest.mark.parametrize(
    ("of_recipe", "scored"),
    [
        ({}, {"look": 32}),
        ({"documents": "by_release"}, {"documents": "by_release", "seed": "a" * 64}),
        ({"documents": "by_release"}, {"documents": "by_release", "seed": "a" * 64, "look": 32}),
        ({}, {"documents": "confirm"}),
    ],
)
def test_a_model_that_was_scored_on_a_part_of_the_documents_is_checked_too(
    of_recipe: dict[str, Any], scored: dict[str, Any], home: Path, family: Family, settings: EvalSettings
) -> None:
    """Such a version went into service unchecked, also one that is scored on all documents after its promotion."""
    settings = replace(settings, tasks=("words.yaml",), limit=2)
    score(ModelFiles.at("merged", "a" * 64, family.base), replace(settings, **scored))
    kept = server_gate.requests("a" * 64, replace(settings, **of_recipe))
    assert {task: len(of) for task, of in kept.items()} == {"words": 2}


def test_a_chat_is_asked_as_a_chat_so_that_the_servers_own_template_answers(home: Path) -> None:
    messages = [{"role": "user", "content": "12 + 7?"}]
    kept = {"t": [{"prompt": "<u>12 + 7?</u>", "messages": messages, "answer": "19 it is", "until": [], "tokens": 9}]}

    said = [""]

    def answer(request: Request) -> Any:
        assert request.path == "/v1/chat/completions" and request.json["messages"] == messages
        return {"choices": [{"message": {"content": said[0]}, "finish_reason": "length"}]}

    with HttpSink(answer) as sink:
        for text, passes in (("19 it is", True), ("19 it", True), ("19 it no", True), ("20", False), ("", False)):
            said[0] = text
            assert server_gate.check(f"{sink.url}/v1", "m", kept, Check(documents=1)).passed is passes


def test_a_message_that_is_none_is_another_answer(home: Path) -> None:
    asked = {"prompt": "6 * 7?", "messages": [{"role": "user", "content": "6 * 7?"}], "until": [], "tokens": 9}
    with HttpSink(lambda _: {"choices": [{"message": "42"}]}) as sink:
        assert not server_gate.check(f"{sink.url}/v1", "m", {"t": [{**asked, "answer": "42"}]}, Check()).passed


def test_an_answer_that_goes_on_where_the_scored_one_ended_is_another(home: Path) -> None:
    """It counted as the same, so a server that does not stop passed."""
    asked = {"prompt": "6 * 7?", "until": [], "tokens": 9}
    with HttpSink(lambda _: {"choices": [{"text": "42 and on", "finish_reason": "length"}]}) as sink:
        for scored, share in (("42", 2 / 9), ("", 0), ("42 and on and on", 1)):
            kept = {"t": [{**asked, "answer": scored}]}
            assert server_gate.check(f"{sink.url}/v1", "m", kept, Check(documents=1)).share == pytest.approx(share)


def test_a_server_without_likelihoods_cannot_be_checked(home: Path) -> None:
    asked = {"prompt": "a", "choices": [" b"], "likelihoods": [-1.0], "answer": "b", "until": [], "tokens": 1}
    sink = HttpSink(lambda _: {"choices": [{"text": "a b"}]})
    with sink, pytest.raises(LewisError, match="no log-probabilities of a prompt"):
        server_gate.check(sink.url, "m", {"t": [asked]}, Check(likelihoods=True))


@pytest.mark.long
def test_a_server_that_answers_wrongly_gets_the_model_back_that_it_had(
    home: Path, family: Family, settings: EvalSettings
) -> None:
    calls = list[str]()

    def call(request: Request) -> Any:
        calls.append(request.json["path"])
        return {}

    def lists(url: str) -> OpenaiTarget:
        return OpenaiTarget(
            kind="openai", url=sink.url, body={"path": "{path}"}, api=url, model=str(family.base), check=Check(agree=1)
        )

    with serving(family.base) as (url, _), HttpSink(call) as sink:
        first = crowned(family.base, "a")
        service.serve(lists(url), first, settings)
        assert served()[0].checked == "not checked: its evaluation has kept no answers"
        for digit, folder in (("a", family.base), ("b", family.math)):
            score(ModelFiles.at("merged", digit * 64, folder), settings)
        assert service.serve(lists(url), first, settings, again=True)[0].checked.startswith("16 of 16 answers")
        second = crowned(family.math, "b")
        with pytest.raises(RefusedError, match="tiny/1 stays in service: only"):
            service.serve(lists(url), second, settings)  # the server answers as the first
        assert [path[-10:] for path in calls] == ["1-aaaaaaaa", "1-aaaaaaaa", "2-bbbbbbbb", "1-aaaaaaaa"]
        (record,) = served()
        assert record.uri == first.version.uri and record.failure and "served '" in record.failure.why
        shutil.rmtree(before := SERVED.path("tiny-1-aaaaaaaa"))  # as on another machine
        listed = {"data": [{"id": str(family.base)}]}
        half = HttpSink(lambda request: listed if request.method == "GET" else (400, "too long"))
        with half, pytest.raises(LewisError, match=r"tiny/1 stays in service: .*answered 400: too long"):
            service.serve(lists(half.url), second, settings)
        assert [path[-10:] for path in calls[4:]] == ["2-bbbbbbbb", "1-aaaaaaaa"] and before.is_dir()

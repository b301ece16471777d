"""A champion is put into service at real receivers and by real programs; what fails leaves what was there."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import InputError, LewisError, TransientError
from lewis.recipe.serve import CommandTarget, WebhookTarget
from lewis.registry import tracking
from lewis.registry.versions import Champion
from lewis.serving import command, model, records, service
from lewis.serving.records import Served, served
from lewis.store.kinds import SERVED
from lewis.store.secrets import SERVE_SECRET
from tests.conftest import Family
from tests.support.damage import damage
from tests.support.http_sink import HttpSink
from tests.support.lineage import crowned, make_home, with_tokenizer
from tests.support.warm import WarmPython

WRITES = "import json, os, sys; json.dump({k: v for k, v in os.environ.items()}, open(sys.argv[1], 'w')); print('done')"


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CommandTarget]:
    """Put a program of some Python code into the folder of programs; gives a target that runs it."""
    monkeypatch.setenv("LEWIS_SERVE_PROGRAMS", str(tmp_path))

    def make(code: str, *arguments: str, **fields: Any) -> CommandTarget:
        path = tmp_path / "program"
        path.write_text(f"#!{sys.executable}\n{code}\n")
        path.chmod(0o755)
        return CommandTarget(kind="command", run=(path.name, *arguments), **fields)

    return make


def test_a_webhook_is_signed_as_mlflow_signs_and_sent_until_it_is_taken(
    home: Path, family: Family, tmp_path: Path
) -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    with HttpSink() as sink:
        target = WebhookTarget(kind="webhook", url=f"{sink.url}/secret-path")
        first = crowned(family.base, "a", "a team.tiny")
        sink.statuses = [503]
        with pytest.raises(TransientError, match=r"nothing is in service there: .*answered 503") as busy:
            service.serve(target, first)
        assert "secret-path" not in str(busy.value)
        record, new = service.serve(target, first)
        assert new and record.uri == "models:/a team.tiny/1" and record.failure is None
        attempt, delivery = sink.received
        stamp, own = delivery.headers["x-mlflow-timestamp"], delivery.headers["x-mlflow-delivery-id"]
        assert own == attempt.headers["x-mlflow-delivery-id"] and abs(int(stamp) - time.time()) < 60
        signed = _generate_hmac_signature(SERVE_SECRET.read(), own, stamp, delivery.body)
        assert delivery.headers["x-mlflow-signature"] == signed
        data = delivery.json["data"]
        assert (delivery.json["entity"], data["alias"], data["version"]) == ("model_version_alias", "champion", "1")
        assert data["previous"] is None and data["output"] == "full"
        assert data["served_as"] == "a-team.tiny-fd8efd-1-aaaaaaaa"
        assert {path.name for path in Path(data["path"]).iterdir()} >= {"config.json", "model.safetensors"}

        assert service.serve(target, first) == (record, False) and len(sink.received) == 2
        again, new = service.serve(target, first, again=True)
        assert new and again.since == record.since and sink.received[-1].json["data"]["previous"] is None

        second = crowned(with_tokenizer(family.lora, tmp_path / "adapter"), "b", "a team.tiny", family.base)
        sink.statuses = [404]
        with pytest.raises(LewisError, match=r"tiny/1 stays in service: .*answered 404") as refused:
            service.serve(target, second)
        assert not isinstance(refused.value, TransientError)
        (known,) = served("a team.tiny")
        assert known.uri == first.version.uri and known.failure and known.failure.uri == second.version.uri
        now, _ = service.serve(target, second)
        data = sink.received[-1].json["data"]
        assert (data["previous"], data["output"]) == (first.version.uri, "lora")
        assert (now.previous, now.previous_alias) == (first.version.uri, "a-team.tiny-fd8efd-1-aaaaaaaa")
        assert served() == [now]


def test_a_program_gets_the_facts_and_no_secret(
    home: Path,
    family: Family,
    tmp_path: Path,
    program: Callable[..., CommandTarget],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"  # the Hub's client takes both
    for name in ("LEWIS_SERVE_SECRET", *hub, "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("KUBECONFIG", "/etc/kube")
    target = program(WRITES, str(tmp_path / "facts"))
    model = crowned(family.base, "a", "a team.tiny")
    caplog.set_level("INFO")
    service.serve(target, model)
    facts = json.loads((tmp_path / "facts").read_text())
    assert (facts["MODEL_NAME"], facts["MODEL_VERSION"], facts["MODEL_OUTPUT"]) == ("a team.tiny", "1", "full")
    assert facts["MODEL_DIGEST"] == "a" * 64 and facts["MODEL_PREVIOUS"] == "" and facts["KUBECONFIG"] == "/etc/kube"
    assert "hidden" not in facts.values() and "command: done" in caplog.text

    failing = program("print('no room'); raise SystemExit(3)")
    with pytest.raises(LewisError, match=r"tiny/1 stays in service: .*exit code 3; the end of its output: no room"):
        service.serve(failing, model, again=True)
    wordy = program("print('模' * 2000); raise SystemExit(3)")
    with pytest.raises(LewisError, match="模模"):
        service.serve(wordy, model, again=True)
    with tracking.client("reading") as client:  # databases of servers have room for 5,000 characters
        assert 1500 < len(client.get_registered_model("a team.tiny").tags["lewis.served.command"]) <= 5000
    monkeypatch.setattr(command, "_GRACE", 1.0)
    ignores = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork(); time.sleep(60)"
    with pytest.raises(LewisError, match=r"did not end within 0.01 minutes"):
        service.serve(program(ignores, timeout_minutes=0.01), model, again=True)
    slow = program("import time; time.sleep(60)", timeout_minutes=0.01)
    with pytest.raises(LewisError, match=r"did not end within 0.01 minutes"):
        service.serve(slow, model)
    with pytest.raises(InputError, match="missing: expected a program, which is missing or not executable"):
        service.serve(CommandTarget(kind="command", run=("missing",)), model)
    monkeypatch.delenv("LEWIS_SERVE_PROGRAMS")
    with pytest.raises(InputError, match="LEWIS_SERVE_PROGRAMS: not set"):
        service.serve(slow, model)
    (known,) = served()
    assert known.uri == model.version.uri and known.failure is not None


def test_files_are_verified_before_they_are_served_and_kept_while_they_are(
    home: Path, family: Family, program: Callable[..., CommandTarget]
) -> None:
    target = program("")
    models = [crowned(family.base, "a", "a team.tiny")]
    service.serve(target, models[0])
    folder = SERVED.path("a-team.tiny-fd8efd-1-aaaaaaaa")
    damage(folder / "model.safetensors", "flipped")
    with pytest.raises(LewisError, match="damaged"):  # a link of MLflow's file, so that is damaged too
        service.serve(target, models[0], again=True)
    for digit in "bc":
        models.append(crowned(family.base, digit, "a team.tiny"))
        service.serve(target, models[-1])
        service.tidy("a team.tiny", [target])
    model.remove_others("a-team.tiny", ())  # another model's
    kept = [path.name for path in SERVED.entries()]
    assert kept == ["a-team.tiny-fd8efd-2-bbbbbbbb", "a-team.tiny-fd8efd-3-cccccccc"]
    service.tidy("a team.tiny", [])
    assert served() == [] and SERVED.entries() == []


def test_recipes_of_a_group_leave_each_others_records_and_files_alone(
    home: Path, family: Family, program: Callable[..., CommandTarget]
) -> None:
    """They removed each other's without end, and a new version got all requests without a canary."""
    targets = {owner: program("", name=f"at-{owner}") for owner in ("one", "two")}

    def serve(owner: str, champion: Champion) -> Served:
        record, new = service.serve(targets[owner], champion, owner=owner)
        service.tidy("tiny", [targets[owner]], owner)
        assert new and not service.is_due([targets[owner]], champion, owner)
        return record

    first = crowned(family.base, "a")
    assert [serve(owner, first).previous for owner in targets] == ["", ""]
    assert not service.is_due([targets["one"]], first, "one"), "the other recipe has removed its record"
    second = crowned(family.base, "b")
    assert serve("one", second).previous == first.version.uri
    assert len(SERVED.entries()) == 2, "the other target has the version before"
    assert serve("two", second).previous == first.version.uri
    service.tidy("tiny", [], "one")
    assert [each.recipe for each in served("tiny")] == ["two"]


def test_targets_of_one_name_in_a_group_are_one_only_if_they_are_the_same(
    home: Path, family: Family, program: Callable[..., CommandTarget]
) -> None:
    champion, here, there = crowned(family.base, "a"), program("", "here"), program("", "there")
    assert service.serve(here, champion, owner="one")[1] and service.serve(there, champion, owner="two")[1]
    assert not service.is_due([here], champion, "one") and not service.is_due([there], champion, "two")
    assert not service.is_due([here], champion, "three") and not service.serve(here, champion, owner="three")[1]
    assert sorted(each.recipe for each in served("tiny")) == ["one", "two"]


def test_a_record_that_was_written_before_its_recipe_had_a_group_goes_on(
    home: Path, family: Family, program: Callable[..., CommandTarget]
) -> None:
    first, target = crowned(family.base, "a"), program("")
    before, _ = service.serve(target, first)
    with tracking.client("writing as earlier versions did") as client:
        content = {key: value for key, value in asdict(before).items() if key != "recipe"}
        client.set_registered_model_tag("tiny", "lewis.served.command", json.dumps(content))
    assert not service.is_due([target], first, "one")
    assert service.serve(target, first, owner="one") == (replace(before, recipe="one"), False)
    assert served("tiny") == [replace(before, recipe="one")]
    assert service.serve(target, crowned(family.base, "b"), owner="one")[0].previous == first.version.uri


def test_a_machine_that_serves_nothing_leaves_the_record_of_one_that_does(home: Path, family: Family) -> None:
    version = crowned(family.base, "a").version
    record = Served("tiny", "local", "local").took(version.uri, "a" * 64, "tiny-1-aaaaaaaa", "")
    with tracking.client("writing") as client:
        records.write(client, record)
    service.tidy("tiny", [])
    assert served("tiny") == [record]


def test_models_whose_names_have_no_letters_of_english_keep_their_files_apart(
    home: Path, family: Family, program: Callable[..., CommandTarget]
) -> None:
    target = program("")
    for name, digit in (("数学", "a"), ("代码", "b")):
        service.serve(target, crowned(family.base, digit, name))
        service.tidy(name, [target])
    assert len(SERVED.entries()) == 2, "the files of one were removed, as those of an old version of the other"


def test_a_process_that_is_killed_leaves_what_was_there_and_the_next_ends_it(
    home: Path, family: Family, tmp_path: Path, program: Callable[..., CommandTarget], warm: WarmPython
) -> None:
    began, marks = tmp_path / "began", tmp_path / "marks"
    waits = f"import os, time, pathlib; pathlib.Path({str(began)!r}).touch(); "
    target = program(f"{waits}time.sleep(0 if os.path.exists({str(marks)!r}) else 600)")
    marks.touch()
    first = crowned(family.base, "a", "a team.tiny")
    service.serve(target, first)
    second = crowned(family.base, "b", "a team.tiny")
    marks.unlink()
    began.unlink()
    code = (
        "import sys; from lewis.recipe.serve import CommandTarget; from lewis.serving import service;"
        "from lewis.registry import versions;"
        "service.serve(CommandTarget.model_validate_json(sys.argv[1]), versions.champion('a team.tiny'))"
    )
    killed = warm.run(code, [target.model_dump_json()], folder=tmp_path, environment=os.environ)
    while not began.exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [each.uri for each in served()] == [first.version.uri]
    marks.touch()
    record, new = service.serve(target, second)
    assert new and record.uri == second.version.uri and record.previous == first.version.uri


def test_all_models_are_looked_at_however_many(home: Path) -> None:
    with tracking.client("registering") as client:
        for number in range(101):  # MLflow gives a hundred at a time
            client.create_registered_model(f"m{number:03}")
        records.write(client, Served("m100", "there", "webhook"))
    assert [each.name for each in served()] == ["m100"]


def test_what_is_in_service_is_told_in_one_line_whatever_a_program_has_printed(home: Path) -> None:
    failed = Served("tiny", "program", "command").refused("models:/tiny/3", "the end of its output: a\r\n  b\n")
    assert failed.line().startswith("program: nothing yet; v3 failed ") and failed.line().endswith(" output: a b")


RECORD = '{"name": "tiny", "target": "chat", "kind": "vllm", "uri": %s, "failure": %s}'


@pytest.mark.parametrize(
    "text",
    [
        *("a note", "[]", '"x"', '{"name": "tiny"}', '{"newer": 1}', '{"failure": {"x": 1}}'),
        *(RECORD % (5, "null"), RECORD % ('""', '{"uri": "x", "why": "y", "time": "soon"}')),
    ],
)
def test_a_tag_that_is_no_record_is_named(home: Path, text: str) -> None:
    """It was a traceback, of `lewis status` for all recipes too."""
    with tracking.client("writing a tag") as client:
        client.create_registered_model("tiny")
        client.set_registered_model_tag("tiny", "lewis.served.chat", text)
    with pytest.raises(LewisError, match=r"tiny: its tag lewis.served.chat in MLflow is no record .*; remove it, and"):
        served()


def test_targets_after_one_that_has_refused_a_version_do_not_have_it_tried_again(home: Path, family: Family) -> None:
    """Every minute a run began for the second target, and failed at the first one."""
    with HttpSink() as first, HttpSink() as second:
        targets = [
            WebhookTarget(kind="webhook", name=f"at-{n}", url=sink.url) for n, sink in enumerate((first, second))
        ]
        champion = crowned(family.base, "a")
        assert service.is_due(targets, champion)
        first.statuses = [400]
        with pytest.raises(LewisError, match="answered 400"):
            service.serve(targets[0], champion)
        assert service.is_due([targets[1]], champion) and not service.is_due(targets, champion)
        assert service.is_due(targets, crowned(family.base, "b")), "another version may be taken"
        assert service.is_due(targets[::-1], champion)

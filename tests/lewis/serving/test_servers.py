"""A running server takes the champion: adapters by vLLM's protocol, other models by a call that the recipe writes."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import InputError, LewisError, TransientError
from lewis.recipe.serve import OpenaiTarget, VllmTarget
from lewis.serving import service, vllm
from lewis.serving.records import served
from lewis.store.kinds import SERVED
from tests.conftest import Family
from tests.support.http_sink import HttpSink, Request
from tests.support.lineage import crowned, make_home, with_tokenizer
from tests.support.lora_server import LoraServer


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


def test_vllm_loads_each_version_by_a_name_of_its_own_and_then_moves_the_name_that_clients_ask_for(
    home: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_SERVE_KEY", "open")
    adapter = with_tokenizer(family.lora, tmp_path / "adapter")
    with LoraServer("tiny") as server:
        target, names, folders = VllmTarget(kind="vllm", url=f"{server.url}/"), list[str](), list[str]()
        for digit in "abc":
            record, new = service.serve(target, crowned(adapter, digit, base=family.base))
            service.tidy("tiny", [target])
            names.append(record.alias)
            folders.append(str(SERVED.path(record.alias)))
            assert new and server.models["tiny"] == server.models[record.alias] == folders[-1]
        assert server.models.keys() == {"base", "tiny", *names[1:]}, "the one before stays, to go back to"
        assert [path for path in server.seen if path] == folders
        assert {path.name for path in SERVED.entries()} == {*names[1:]}
        assert {request.headers.get("authorization") for request in server.received} == {"Bearer open"}

        champion = crowned(adapter, "d", base=family.base)
        service.serve(target, champion)
        asked = len(server.received)
        assert not service.serve(target, champion)[1]
        assert [request.method for request in server.received[asked:]] == ["GET"]
        server.models = {"base": "base"}  # it was started again
        again, new = service.serve(target, champion)
        assert new and server.models["tiny"] == str(SERVED.path(again.alias))
        assert again.previous_alias == names[2] and SERVED.path(names[2]).is_dir()


def test_what_vllm_does_not_take_leaves_what_clients_have(home: Path, family: Family, tmp_path: Path) -> None:
    adapter = with_tokenizer(family.lora, tmp_path / "adapter")
    with LoraServer("tiny") as server:
        target = VllmTarget(kind="vllm", url=server.url)
        first = service.serve(target, crowned(adapter, "a", base=family.base))[0]
        second = crowned(adapter, "b", base=family.base)
        server.statuses = [200, 500]
        with pytest.raises(TransientError, match=r"tiny/1 stays in service: .* answered 500"):
            service.serve(target, second)
        server.statuses = [200, 400]
        with pytest.raises(LewisError, match="answered 400"):
            service.serve(target, second)
        server.enabled = False
        with pytest.raises(InputError, match="start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            service.serve(target, second)
        assert server.models["tiny"] == str(SERVED.path(first.alias))
        with pytest.raises(InputError, match="this is a full model"):
            service.serve(target, crowned(family.base, "c"))
    with pytest.raises(TransientError, match="does not answer"):
        service.serve(target, crowned(adapter, "d", base=family.base))
    assert [each.uri for each in served()] == [first.uri]


@pytest.mark.parametrize(("url", "key"), [("http://[::1", ""), ("http://a..b", ""), ("http://127.0.0.1:9", "ключ")])
def test_a_server_that_cannot_be_asked_is_told_with_the_reason(
    url: str, key: str, home: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a traceback, which no record had; and the service looked after no other target any more."""
    monkeypatch.setenv("LEWIS_SERVE_KEY", key)
    champion = crowned(with_tokenizer(family.lora, tmp_path / "adapter"), "a", base=family.base)
    with pytest.raises(LewisError, match=r"cannot be asked \(\w+\); see that its URL is right") as error:
        service.serve(VllmTarget(kind="vllm", url=url), champion)
    [record] = served()
    assert record.failure and record.failure.why in str(error.value) and not record.failure.passes
    assert url in record.failure.why and (not key or key not in record.failure.why)


def test_any_server_takes_a_model_by_a_call_of_the_recipe(home: Path, family: Family) -> None:
    has = list[str]()

    def answer(request: Request) -> object:
        if request.path == "/v1/models":
            return {"data": [{"id": name} for name in has]}
        if request.path == "/models":
            return "<html>welcome</html>"
        has[:] = [request.json["nested"]["as"]]
        return {"success": request.json["model_path"].endswith("-1-aaaaaaaa")}

    with HttpSink(answer) as server:
        target = OpenaiTarget(
            kind="openai",
            url=f"{server.url}/update_weights_from_disk",
            body={"model_path": "{path}", "nested": {"as": "{name}-{version}", "count": 2}},
            expect={"success": True},
            api=f"{server.url}/v1/",
            model="{name}-{version}",
            method="patch",
            content_type="application/merge-patch+json",
        )
        record, _ = service.serve(target, crowned(family.base, "a"))
        assert server.received[0].json == {
            "model_path": str(SERVED.path(record.alias)),
            "nested": {"as": "tiny-1", "count": 2},
        }
        second = crowned(family.base, "b")
        called = server.received[0]
        assert (called.method, called.headers["content-type"]) == ("PATCH", "application/merge-patch+json")
        with pytest.raises(LewisError, match=r"tiny/1 stays in service: .*expected success=True, got False"):
            service.serve(target, second)
        other = target.model_copy(update={"expect": {}, "model": "{served_as}"})
        with pytest.raises(LewisError, match="the server lists no model 'tiny-2-bbbbbbbb', but tiny-2"):
            service.serve(other, second)
        assert has == ["tiny-1"], "it has again what the record says"
        with pytest.raises(LewisError, match="tiny/1 stays in service: its /models is no list of models; is `api` the"):
            service.serve(other.model_copy(update={"api": server.url}), second)


def test_wherever_it_is_killed_clients_have_the_old_or_the_new_model_and_the_next_run_ends_it(
    home: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = with_tokenizer(family.lora, tmp_path / "adapter")
    first, second = (crowned(adapter, digit, base=family.base) for digit in "ab")
    monkeypatch.setattr(service.promotion, "is_champion", lambda *_: True)  # it moves between them all the time
    with LoraServer("tiny") as server:
        target = VllmTarget(kind="vllm", url=server.url)
        old = service.serve(target, first)[0]
        point, ended = 0, False
        send, write = vllm.send, service.records.write

        def counted(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            nonlocal left
            if (left := left - 1) == 0 and not after:
                raise SystemExit
            made = make(*arguments, **options)
            if left == 0:
                raise SystemExit
            return made

        monkeypatch.setattr(vllm, "send", partial(counted, send))
        monkeypatch.setattr(service.records, "write", partial(counted, write))
        while not ended:
            point += 1  # before the first request, after it, before the second, ...
            left, after = (point + 1) // 2, point % 2 == 0
            with suppress(SystemExit):
                service.serve(target, second)
                ended = True
            assert server.models["tiny"] in (str(SERVED.path(old.alias)), str(SERVED.path(f"tiny-2-{'b' * 8}")))
            left = 0
            new = service.serve(target, second)[0]
            assert server.models["tiny"] == str(SERVED.path(new.alias)) and new.uri == second.version.uri
            service.serve(target, first)
            assert served()[0].uri == first.version.uri
        assert point > 10

"""`lewis up --serve`: the champion answers on one port, through a real HAProxy, and moves without a lost request."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lewis import memory
from lewis.errors import InputError, LewisError, TransientError
from lewis.registry import promotion, versions
from lewis.serving import server_gate, service, slots
from lewis.serving.local import LocalTarget
from lewis.serving.records import served
from lewis.store.secrets import UP_SERVE_KEY
from lewis_flows.service import champion
from lewis_flows.service.champion_router import Router
from tests.conftest import Family
from tests.support.here import Here, clients
from tests.support.lineage import crowned, with_tokenizer
from tests.support.models import write_llama
from tests.support.service import free_port
from tests.support.vllm_stub import write_vllm

pytestmark = pytest.mark.skipif(champion.program("haproxy") is None, reason="apt install haproxy")
LOCAL = LocalTarget()


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """The part, with servers that start at once."""
    monkeypatch.setenv("LEWIS_UP_SERVE_COMMAND", write_vllm(tmp_path))
    slots.want(slots.Wanted("tiny"))
    with Here(tmp_path / "log") as started:
        yield started


def back() -> versions.Champion:
    """The champion before, which is the champion again."""
    promotion.rollback("tiny", "it was rude")
    found = versions.champion("tiny")
    assert found is not None
    return found


def test_the_champion_moves_and_no_request_is_lost(here: Here, family: Family) -> None:
    key = UP_SERVE_KEY.read()
    assert (here.get("/health"), here.get("/v1/models"), here.get("/v1/models", key)) == (503, 401, 503)
    assert slots.state() == (True, "waits for a champion of tiny")
    record, _ = service.serve(LOCAL, crowned(family.base, "a"))
    assert here.ask() == record.alias and f"100 % at {here.url}/v1" in served("tiny")[0].line()
    assert (here.get("/health"), here.get("/v1/models", "another"), here.get("/load_model", key)) == (200, 401, 404)
    for path in ("/v1/load_lora_adapter", "/v1/load%5Flora_adapter"):
        assert here.get(path, key) == 404
    late: list[str] = []
    slow = threading.Thread(target=lambda: late.append(here.ask("0.9")))
    with clients(here) as seen:
        slow.start()
        pid = here.pid()
        new, _ = service.serve(LOCAL, crowned(family.math, "b"))
        assert here.ask() == new.alias
        slow.join()
        assert service.serve(LOCAL, back())[0].alias == record.alias == here.ask()
    assert late == [record.alias] and set(seen) == {record.alias, new.alias} and len(seen) > 20
    assert not Path(f"/proc/{pid}").exists(), "the server before has ended when its last request was answered"


def test_what_dies_is_started_again_with_what_it_had(here: Here, family: Family, tmp_path: Path) -> None:
    record, _ = service.serve(LOCAL, crowned(family.base, "a"))
    os.kill(here.pid(), 9)
    here.until(record.alias)
    now = slots.now()
    assert now is not None and [each.failures for each in now.slots.values() if each.share] == [1]
    [router] = subprocess.run(
        ["pgrep", "-P", now.writer.rpartition("-")[2], "-f", "haproxy"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(router), 15)
    time.sleep(0.2)
    here.until(record.alias)
    here.__exit__()
    with pytest.raises(TransientError, match="`lewis up --serve` does not run"):
        service.serve(LOCAL, crowned(family.math, "b"))
    assert "while `lewis up --serve` runs; v2 failed" in served("tiny")[0].line()
    here.__enter__()
    here.until(record.alias)
    assert service.serve(LOCAL, back()) == (served("tiny")[0], False)


def test_a_server_that_hangs_is_started_again(
    home: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept all requests, each of which waited for an hour, and status had nothing to say."""
    monkeypatch.setenv("LEWIS_UP_SERVE_COMMAND", write_vllm(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, seconds in {"_ASK": 0.1, "_SILENT": 1.0, "_GRACE": 0.5}.items():
        monkeypatch.setattr(champion, name, seconds)
    ports = {name: free_port() for name in slots.NAMES}
    router = Router(free_port(), ports)
    server = champion.Server("blue", ports["blue"], "tiny", router, tmp_path / "slots")

    def until(found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not found():
            assert time.monotonic() < deadline
            router.start()
            server.follow(slots.Slot("tiny-1", str(family.base)), start=True)
            time.sleep(0.05)

    try:
        until(lambda: server.ready)
        found = subprocess.run(["pgrep", "-f", f"port {ports['blue']}"], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGSTOP)  # the first is its guard
        until(lambda: server.failures == 1)
        until(lambda: server.ready)
    finally:
        for process in (server._process, router._process):
            if process:
                process.terminate()
                process.wait(30)


@pytest.mark.long
def test_what_does_not_start_or_is_refused_leaves_the_old_one(
    here: Here, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, _ = service.serve(LOCAL, crowned(family.base, "a"))
    big = shutil.copytree(family.math, tmp_path / "big")
    (big / "too-big").touch()
    with pytest.raises(LewisError, match=r"(?s)tiny/1 stays in service: .*exit code 1; .*there is no memory for it"):
        service.serve(LOCAL, crowned(big, "b"))
    other = crowned(family.math, "c")
    asked = {"words": [{"prompt": "w1", "until": [], "tokens": 4, "answer": "another"}]}
    with monkeypatch.context() as patch:
        patch.setattr(server_gate, "requests", lambda *_: asked)
        with pytest.raises(server_gate.RefusedError, match="only 0 of 1 answers"):
            service.serve(LOCAL, other)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: 1000)
        with pytest.raises(LewisError, match=r"needs 0\.0 GB, .* set LEWIS_UP_SERVE_SERVERS=1"):
            service.serve(LOCAL, other)
    wanted = slots.wanted()
    assert wanted is not None and list(wanted.slots) == [wanted.traffic] and here.ask() == record.alias
    monkeypatch.setenv("LEWIS_UP_SERVE_SERVERS", "1")
    began, pid = time.monotonic(), here.pid()
    new, _ = service.serve(LOCAL, other)
    assert here.ask() == new.alias and not Path(f"/proc/{pid}").exists() and time.monotonic() - began < 20
    with pytest.raises(LewisError, match="there is no memory for it"):
        service.serve(LOCAL, crowned(big, "d"))
    here.until(new.alias)


def test_an_adapter_goes_into_the_server_that_runs(here: Here, family: Family, tmp_path: Path) -> None:
    def adapter(digit: str) -> versions.Champion:
        return crowned(with_tokenizer(family.lora, tmp_path / digit), digit, base=family.base)

    first, _ = service.serve(LOCAL, adapter("a"))
    pid, before = here.pid(), here.ask()
    with clients(here) as seen:
        second, _ = service.serve(LOCAL, adapter("b"))
        assert (before, here.ask(), here.pid()) == (first.alias, second.alias, pid)
        while second.alias not in seen:
            time.sleep(0.05)
        assert here.ask(model=first.alias) == first.alias, "the version before stays loaded"
    assert set(seen) == {first.alias, second.alias}
    os.kill(pid, 9)
    here.until(second.alias)
    full_model, _ = service.serve(LOCAL, crowned(family.math, "c"))
    assert here.ask() == full_model.alias


def test_one_recipe_is_chosen(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    monkeypatch.setenv("LEWIS_UP_SERVE_COMMAND", write_vllm(tmp_path))
    with pytest.raises(InputError, match="has no recipe that registers a model"):
        champion.choose("")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"register: {{name: of-{name}}}\n")
    with pytest.raises(InputError, match="choose a recipe, `--serve NAME`: one, two"):
        champion.choose("")
    with pytest.raises(InputError, match="--serve three: expected a recipe that registers a model, of these: one, two"):
        champion.choose("three")
    champion.choose("one")
    had = slots.Wanted("of-one", {"blue": slots.Slot("of-one-1-aaaaaaaa", "/a")}, "blue")
    slots.want(had)
    champion.choose("one")
    assert slots.wanted() == had
    champion.choose("two")
    assert slots.wanted() == slots.Wanted("of-two")
    monkeypatch.setenv("LEWIS_UP_SERVE_COMMAND", "/nowhere/vllm serve")
    with pytest.raises(InputError, match="there is no program '/nowhere/vllm'"):
        champion.choose("one")
    monkeypatch.setenv("LEWIS_UP_SERVE_COMMAND", "sglang serve")
    with pytest.raises(InputError, match="expected `vllm serve` or `transformers serve`, with options of yours"):
        champion.choose("one")


def test_a_server_binds_no_thread_to_a_core_unless_it_is_set_and_knows_no_secret_of_another_part(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    given = champion._environment()
    assert given["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and given["VLLM_API_KEY"] == UP_SERVE_KEY.read()
    assert "s3cret" not in given.values()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert champion._environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


def test_the_command_of_a_server_has_the_name_that_clients_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = slots.Slot("tiny-1-aaaaaaaa", str(tmp_path))
    monkeypatch.setenv("LEWIS_UP_SERVE_COMMAND", f"{write_vllm(tmp_path)} --dtype float16")
    own = ["--host", "127.0.0.1", "--port", "1", "--served-model-name", "a team.tiny", "--dtype", "float16"]
    assert champion.command(model, "a team.tiny", 1, tmp_path)[2:] == [str(tmp_path), *own]


def test_a_champion_is_served_by_transformers(home: Path, tmp_path: Path) -> None:
    slots.want(slots.Wanted("a team.tiny"))
    with Here(tmp_path / "log") as here:
        service.serve(LOCAL, crowned(write_llama(tmp_path / "one"), "1", "a team.tiny"))
        assert here.ask(model="a team.tiny").count("w") == 4

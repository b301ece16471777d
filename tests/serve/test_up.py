"""`lewis up --serve`: from a release to what a client of the one port is answered, by a real vLLM and without one."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lewis.serving import slots
from lewis.serving.records import served
from tests.flows.conftest import TASK, write_words
from tests.serve.conftest import COMMAND
from tests.support.databases import put_prefect
from tests.support.here import Port, clients
from tests.support.local_hub import LocalHub
from tests.support.models import WORDS
from tests.support.service import REPO, Service, free_port
from tests.support.word_tasks import WRITES

RECIPE = """
merge_method: task_arithmetic
base_model: org/base
models: [{model: org/base+org/expert, parameters: {weight: 1.0}}]
%s
inspect: {on: warn}
evaluate: {tasks: [tasks/words.yaml, tasks/writes.yaml], baselines: [], limit: 16}
register: {name: tiny, gate: {metric: "words/acc,none", tolerance: 1, allow_limit: true}}
"""
VLLM = f"{COMMAND} serve --dtype float32 --max-model-len 64 --enforce-eager"
PROGRAMS = {"transformers": ("", "transformers serve --dtype float32"), "vllm": ("output: {kind: lora, rank: 8}", VLLM)}


def lewis(service: Service, *arguments: str) -> str:
    """The output of a command next to the service."""
    command = [sys.executable, "-m", "lewis_flows.cli.main", *arguments]
    left_out = ("PREFECT_", "MLFLOW_", "LEWIS_", "OPENAI_")
    given = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    done = subprocess.run(command, capture_output=True, text=True, env={**given, **service.environment}, cwd=REPO)
    if arguments != ("status",):  # it is 1 while the worker is not there yet
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_release_is_served_on_one_port_and_taken_back_without_a_lost_request(
    program: str, tiny: Path, tmp_path: Path, common: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, command = PROGRAMS[program]
    port = Port(free_port())
    with LocalHub(tmp_path / "hub") as hub:
        hub.commit("org/base", tiny / "base")
        hub.commit("org/expert", tiny / "one")
        service = Service(tmp_path, hub)
        put_prefect(common, service.home)
        (service.home / "mlflow").mkdir()
        shutil.copy(empty_database, service.home / "mlflow" / "mlflow.db")
        write_words(service.recipes)
        (service.recipes / "tasks").mkdir()
        for name, text in (("words", TASK), ("writes", WRITES)):
            (service.recipes / "tasks" / f"{name}.yaml").write_text(text)
        (service.recipes / "daily.yaml").write_text(RECIPE % output)
        service.environment |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "LEWIS_UP_SERVE_PORT": str(port.port),
            "LEWIS_UP_SERVE_COMMAND": command,
        }
        service.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        service.command.append("--serve")
        monkeypatch.setenv("LEWIS_HOME", str(service.home))
        with service:
            assert "waits for a champion of tiny" in lewis(service, "status")
            service.until(lambda: service.deployment("daily"), 60)
            service.start_run("merge/daily")
            of_one = first_token(service, port, 1)
            given = json.loads(lewis(service, "env", "--json"))
            assert given["OPENAI_BASE_URL"] == f"{port.url}/v1"
            assert port.get("/v1/models", given["OPENAI_API_KEY"]) == 200
            with clients(port) as seen:
                hub.commit("org/expert", tiny / "two")
                of_two = first_token(service, port, 2)
                lewis(service, "rollback", "tiny", "--why", "it was rude")
                assert first_token(service, port, 1) == of_one != of_two
            errors = [each for each in seen if each.startswith("error")]
            print(f"{program}: asked {len(seen)} times, {len(errors)} failed")
            assert errors == []
            record = next(each for each in served("tiny") if each.kind == "local")
            assert record.checked.startswith("32 of 32 answers are those of the model that was scored")
            line = f"100 % at {port.url}/v1"
            assert line in lewis(service, "served") and line in " ".join(lewis(service, "status").split())
            share = 'lewis_served_share{model="tiny",recipe="daily",target="local"} 1.0'
            service.until(lambda: share in metrics(service), 120)
            os.kill(port.pid(), 9)
            began = time.monotonic()
            service.until(lambda: not slots.state()[0], 60)
            service.until(lambda: slots.state()[0], 300)
            print(f"{program}: a killed server answers again after {time.monotonic() - began:.1f} s")
            assert answers(port) == of_one
            service.stop()
            assert slots.now() is None and service.home.joinpath("champion.json").exists()
            service.start()
            service.until(lambda: slots.state()[0], 300)
            assert answers(port) == of_one


def answers(port: Port) -> list[str]:
    """What the champion answers to some prompts."""
    return [port.ask(" ".join(WORDS[i : i + 4])) for i in range(0, 48, 6)]


def first_token(service: Service, port: Port, version: int) -> list[str]:
    """Wait until a version is the champion and then until it answers; prints how long that took. Its answers."""

    def is_champion() -> bool:
        return [str(each.version) for each in service.versions("tiny") if "champion" in each.aliases] == [str(version)]

    service.until(is_champion, 200)
    began = time.monotonic()

    def answered() -> bool:
        now, wanted = slots.now(), slots.wanted()
        alias = next((each.alias for each in now.slots.values() if each.share), "") if now else ""
        return alias.startswith(f"tiny-{version}-") and bool(wanted and wanted.slot_of(alias))

    service.until(answered, 400)
    found = answers(port)
    service.until(lambda: any(each.uri == f"models:/tiny/{version}" for each in served("tiny")), 60)
    print(f"champion v{version} to first token: {time.monotonic() - began:.1f} s")
    return found


def metrics(service: Service) -> str:
    """The page for Prometheus."""
    import requests

    key = (service.home / "metrics-key").read_text().strip()
    url = service.webhook.replace("/webhook", "/metrics")
    return requests.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=120).text

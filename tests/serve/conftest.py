"""A family of tiny models that vLLM can run, and a vLLM server on the base."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import requests

from lewis.evaluation.harness import child, process
from tests.flows.conftest import (  # noqa: F401
    TASK,
    _impatient,
    home,
    lewis,
    write_words,
)
from tests.support.asking import asking
from tests.support.models import WORDS, write_llama, write_lora
from tests.support.service import free_port
from tests.support.word_tasks import WRITES

COMMAND = os.environ.get("LEWIS_SERVE_VLLM", "vllm")
EXPORTER = """
frontend metrics
  bind 127.0.0.1:{port}
  http-request use-service prometheus-exporter
"""
SCRAPE = """
global: {{scrape_interval: 1s}}
scrape_configs: [{{job_name: haproxy, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its cores have other work
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests of this folder out unless `make test-serve` asks for them."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not os.environ.get("LEWIS_SERVE"):
            item.add_marker(pytest.mark.skip(reason="make test-serve"))


def ask(url: str, model: str, prompt: str = "w1 w2 w3") -> str:
    """A greedy answer; raises an error for every status that is none."""
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=300)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def said(url: str, model: str) -> list[str]:
    """What a model answers to some prompts."""
    return [ask(url, model, " ".join(WORDS[i : i + 4])) for i in range(0, 48, 6)]


@contextmanager
def load(url: str, *, clients: int, pause: float = 0.0) -> Iterator[list[str]]:
    """Meanwhile, clients ask for the champion all the time; gives the errors that they saw, once they have ended."""

    def champion(own: int, number: int) -> str:
        return ask(url, "tiny", " ".join(WORDS[(own * 7 + number + i) % 60] for i in range(4)))

    errors, seen = list[str](), list[str]()
    try:
        with asking(champion, clients=clients, pause=pause) as seen:
            yield errors
    finally:
        errors += [each for each in seen if each.startswith("error: ")]
        print(f"asked {len(seen)} times, {len(errors)} failed")


@contextmanager
def prometheus(metrics: int, folder: Path) -> Iterator[str]:
    """A real Prometheus that scrapes HAProxy's exporter at a port; gives its URL."""
    port, config = free_port(), folder / "prometheus.yml"
    config.write_text(SCRAPE.format(port=metrics))
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while not ready(url):
        assert process.poll() is None
        time.sleep(0.2)
    try:
        yield url
    finally:
        process.kill()
        process.wait()


def ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=5).ok
    except requests.RequestException:
        return False


class Vllm:
    """A server that loads adapters while it runs; use as a context manager.

    Attributes:
        url: of the server, without /v1.
    """

    def __init__(self, base: Path, log: Path) -> None:
        port = free_port()
        self.url, self._log, self._process = f"http://127.0.0.1:{port}", log, None
        options = "--dtype float32 --max-model-len 64 --enable-lora --max-lora-rank 16 --max-loras 4 --enforce-eager"
        self._command = [COMMAND, "serve", str(base), "--served-model-name", "base", "--host", "127.0.0.1"]
        self._command += ["--port", str(port), *options.split()]

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self._log.parent,
                env={**os.environ, **SETTINGS},
                start_new_session=True,
            )
        while not self.answers():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether it answers."""
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """End it and all its processes as if the machine had died."""
        if self._process:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def ask(self, model: str, prompt: str = "w1 w2 w3") -> str:
        """As `ask`."""
        return ask(self.url, model, prompt)

    def __enter__(self) -> "Vllm":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind:
            sys.stderr.write(self._log.read_text()[-3000:])
        self.kill()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base whose heads have the 64 channels that vLLM needs, and the adapters `one` and `two` on it."""
    folder = tmp_path_factory.mktemp("tiny")
    base = write_llama(folder / "base", hidden=256)
    for seed, name in enumerate(("one", "two"), 1):
        write_lora(base, folder / name, seed=seed)
    return folder


def flows(folder: Path, models: Path, recipe: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that merges an expert of `models` by the recipe, or serves the champion, in this process.

    It puts the recipe into `folder`, with two tasks of lm-eval. `url` is of Prefect.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from lewis_flows.merge import merge_flow
    from lewis_flows.serve import serve_flow
    from lewis_tasks.support.flow_run import result_of_run

    def evaluate_here(request: dict[str, Any], **_: Any) -> dict[str, Any]:
        return child.evaluate(**json.loads(json.dumps(request)))

    monkeypatch.setattr(process, "run", evaluate_here)
    for name in ("base", "one", "two"):
        (folder / name).symlink_to(models / name)
    write_words(folder)
    for name, text in (("words", TASK), ("writes", WRITES), ("recipe", recipe)):
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(folder)

    def start(expert: str = "") -> Any:
        with temporary_settings({PREFECT_API_URL: url}):
            path = str(folder / "recipe.yaml")
            if expert:
                return result_of_run(merge_flow(path, [f"models[0].model=base+{expert}"], return_state=True))
            return result_of_run(serve_flow(path, return_state=True))

    return start

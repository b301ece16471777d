"""The part `champion` of `lewis up --serve` as a process of its own, and clients that ask it all the time."""

import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import requests

from lewis.serving import slots
from lewis.store.secrets import UP_SERVE_KEY
from tests.support.asking import asking
from tests.support.service import free_port


class Port:
    """What clients of the champion of this store ask.

    Attributes:
        url: without /v1.
    """

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def get(self, path: str, key: str | None = None) -> int:
        """The status of an answer."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return requests.get(f"{self.url}{path}", headers=headers, timeout=60).status_code

    def ask(self, prompt: str = "w1 w2 w3", model: str = "tiny") -> str:
        """A greedy answer; raises an error for every status that is none."""
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
        headers = {"Authorization": f"Bearer {UP_SERVE_KEY.read()}"}
        answer = requests.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=300)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    def until(self, text: str, timeout_s: float = 60) -> None:
        """Wait until an answer is `text`."""
        deadline, last = time.monotonic() + timeout_s, ""
        while last != text:
            assert time.monotonic() < deadline, last
            try:
                last = self.ask()
            except requests.RequestException as error:
                last = str(error)
            time.sleep(0.05)

    def pid(self) -> int:
        """Of the server that has the requests."""
        now = slots.now()
        assert now is not None
        [url] = [each.url for each in now.slots.values() if each.share]
        found = subprocess.run(["pgrep", "-f", f"port {url.rpartition(':')[2]}"], capture_output=True, text=True)
        return int(found.stdout.split()[-1])  # the first is its guard


class Here(Port):
    """The part on this store; use as a context manager."""

    def __init__(self, log: Path) -> None:
        super().__init__(free_port())
        self._log = log

    def __enter__(self) -> "Here":
        command = [sys.executable, "-m", "lewis_flows.service.champion", "run", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        while slots.now() is None:
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        assert slots.now() is None


def clients(here: Port) -> AbstractContextManager[list[str]]:
    """Meanwhile, two clients ask all the time; gives each answer, or the error."""
    return asking(lambda *_: here.ask(), clients=2, pause=0.05)

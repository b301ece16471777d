"""Two hours of operations in fast motion, as the person who watches them sees it.

Three recipes and twelve releases: two are broken, one is rejected; a champion is rolled back, another is approved
by a person; a search; a run of a cron schedule; worker, receiver and server are killed once each. It takes
long: `make drill` runs it, and `make test` leaves it out.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import torch

from lewis_flows.service import status_data
from tests.flows.conftest import TASK, write_words
from tests.flows.service.test_up import schedule_once, slow
from tests.support.local_hub import LocalHub
from tests.support.models import rewrite, write_expert, write_llama
from tests.support.service import Service, children

pytestmark = pytest.mark.skipif(not os.environ.get("LEWIS_DRILL"), reason="make drill")

POLL = 45  # seconds, as in life
PATIENCE = 900.0  # seconds for a run, on a machine that is busy
RECIPE = """
merge_method: %(method)s
base_model: org/base
models:
  - {model: org/%(name)s, parameters: {weight: 1.0}}
  - {model: org/other, parameters: {weight: 1.0}}
%(blocks)s
evaluate: {tasks: [tasks/words.yaml], baselines: [base]}
register: {name: %(name)s, gate: {metric: "words/acc,none", tolerance: 0.3}}
"""
GUIDED = """
lewis:
  calibrations: {words: {dataset: json, data_files: words.jsonl, text: "{question} {answer}", samples: 16}}
"""
SEARCHED = """
search: {trials: 3, space: {parameters.lambda: {min: 0.8, max: 1.2}}}
"""
RECIPES = {"alpha": ("ties", GUIDED), "beta": ("ties", SEARCHED), "gamma": ("task_arithmetic", "")}
# What `lewis up` may say at WARNING or above: what a person has to mend, and what became of the killed.
ACTIONABLE = (
    r"org/alpha: not a safetensors file: ",
    r"org/gamma: 'model\.embed_tokens\.weight' has shape \[64, 32\], in the base it is \[64, 16\]",
    r"the database was locked for a moment, and Prefect tries again: this machine is busy",
    r"recipe beta is left out: merge_method: missing",
    r"beta cannot be watched: merge_method: missing",
    r"lewis_flows\.turn - run alpha: .* had died; it is marked as Crashed now",
    r"the Prefect server at http://127\.0\.0\.1:\d+ does not answer .* waiting for it, at most 300 s",
    r"the Prefect server answers again, after \d+ s",
)


class Drill:
    """The service, and what happened so far: the verdicts of merges and searches that the dashboard has to show."""

    def __init__(self, root: Path, hub: LocalHub) -> None:
        self.root, self.hub = root, hub
        # All embeddings share a direction, so that an expert's last layer can lean to or from a word for any text.
        self.base = rewrite(write_llama(root / "llama"), root / "base", self._towards(0.2, slice(None)))
        self.service = Service(root, hub, poll=POLL)
        self.service.patience = PATIENCE
        self.service.environment["LEWIS_NIGHTLY"] = "off"
        self.expected: Counter[tuple[str, str, str, str]] = Counter()
        self._count = 0

    @staticmethod
    def _towards(size: float, rows: slice) -> Any:
        def move(name: str, tensor: torch.Tensor) -> torch.Tensor:
            moved = tensor.clone()
            if name.endswith("embed_tokens.weight"):
                moved[rows] += size * torch.ones(tensor.shape[1]) / 4
            return moved

        return move

    def release(self, name: str, *, good: bool = True, broken: str = "") -> str:
        """Commit a fine-tune: a good one answers all questions, another none; `broken`: `cut`, or `wide`."""
        self._count += 1
        leaning, folder = self.root / f"leaning-{self._count}", self.root / f"release-{self._count}"
        rewrite(self.base, leaning, self._towards(0.2 if good else -0.4, slice(4, 5)))  # the row of w1
        write_expert(leaning, folder, seed=self._count, scale=0.002)
        if broken == "cut":
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:300])
        if broken == "wide":
            shutil.rmtree(folder)
            write_llama(folder, hidden=32)
        sha = self.hub.commit(f"org/{name}", folder)
        for path in (leaning, folder):
            shutil.rmtree(path)
        return sha

    def add_recipe(self, name: str, **gate: str) -> Path:
        method, blocks = RECIPES[name]
        text = RECIPE % {"name": name, "method": method, "blocks": blocks}
        path = self.service.recipes / f"{name}.yaml"
        path.write_text(
            text.replace("tolerance: 0.3", f"tolerance: 0.3{''.join(f', {k}: {v}' for k, v in gate.items())}")
        )
        return path

    def ends(self, *runs: tuple[str, str, str, str]) -> None:
        """Wait until the dashboard shows that runs have ended so (flow, recipe, verdict, trigger), and nothing else."""
        self.expected.update(runs)
        self._until(
            lambda: (self.shown() - self.expected, self.expected - self.shown()), (Counter(), Counter()), PATIENCE
        )

    def _until(self, look: Callable[[], Any], wanted: Any, patience: float) -> None:
        """Wait until something is as it should be; what it is instead is told when this fails."""
        seen: list[Any] = [None]

        def found() -> bool:
            seen[0] = look()
            return bool(seen[0] == wanted)

        try:
            self.service.until(found, patience)
        except AssertionError as error:
            raise AssertionError(f"expected {wanted}, got {seen[0]}\n{error}") from None

    def shown(self) -> Counter[tuple[str, str, str, str]]:
        """Of each run that Prefect's pages list by default, its flow, and recipe, verdict and trigger by its tags.

        A poll that is going on is left out: it is shown for as long.
        """
        week, now = datetime.now(UTC) - timedelta(days=7), datetime.now(UTC)
        past = {"after_": week.isoformat(), "before_": now.isoformat()}
        # The first is the filter of the page of runs, the second that of the dashboard, which has a day by default.
        pages = [
            self.service.ask(
                "/flow_runs/filter", {"flow_runs": {when: past}, "sort": "START_TIME_DESC", "limit": 200, "offset": 0}
            )
            for when in ("start_time", "expected_start_time")
        ]
        flows = {flow["id"]: flow["name"] for flow in self.service.ask("/flows/filter", {})}
        found = []
        for runs in pages:
            seen: Counter[tuple[str, str, str, str]] = Counter()
            for run in runs:
                tags = dict(tag.split(":", 1) for tag in run["tags"] if ":" in tag)
                verdict, name = tags.get("verdict", "none"), run["state_name"] or ""
                whole = verdict == name.lower() and run["state"]["message"]
                said = name if whole else f"{name} ({verdict})"
                seen[flows[run["flow_id"]], tags.get("recipe", "none"), said, tags.get("trigger", "none")] += 1
            found.append(seen)
        return found[0] | found[1]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of the person who watches."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        command = [sys.executable, "-m", "lewis_flows.cli.main", *arguments]
        environment = {**mine, **self.service.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.service.folder)

    def promoted(self, *names: str) -> None:
        """Release an expert of each recipe, and wait until all are promoted and nothing is wrong."""
        for name in names:
            self.release(name)
        self.ends(*(("merge", name, "Promoted", "release") for name in names))
        self.check(0)

    def check(self, code: int, *about: str) -> None:
        """`lewis status --check` has this exit code, and its first problem is about these."""

        def told() -> tuple[int, list[str]]:
            done = self.command("status", "--check", "--json")
            listed = json.loads(done.stdout)
            return done.returncode, sorted({each["about"] for each in listed if each["code"] == done.returncode})

        self._until(told, (code, sorted(about)), PATIENCE / 3)

    @contextmanager
    def held(self, module: str) -> Iterator[None]:
        """While the block lasts, a part that is started does not get further than its start."""
        flag = self.root / "held"
        flag.touch()
        before = self.service.patch.read_text() if self.service.patch.exists() else ""
        wait = f"[time.sleep(.1) for _ in range(9999) if {module!r} in sys.orig_argv and os.path.exists({str(flag)!r})]"
        self.service.patch.write_text(f"import os, sys, time\n{wait}\n{before}")
        try:
            yield
        finally:
            self.service.patch.write_text(before)
            flag.unlink()

    def complaints(self) -> list[str]:
        """Lines of `lewis up` that nobody can act on: warnings that are not `ACTIONABLE`, and parts of tracebacks."""
        lines = self.service.log.read_text().splitlines()
        loud = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL)\b|[Ww]arning:|\bTraceback\b", line)]
        traced = [line for line in lines if re.match(r"\w+ +(  File \"|[\w.]+(Error|Exception)\b)", line)]
        return [line for line in [*loud, *traced] if not any(re.search(words, line) for words in ACTIONABLE)]


@pytest.fixture
def drill(tmp_path: Path) -> Iterator[Drill]:
    with LocalHub(tmp_path / "hub") as hub:
        drill = Drill(tmp_path, hub)
        recipes = drill.service.recipes
        write_words(recipes)
        (recipes / "tasks").mkdir()
        (recipes / "tasks" / "words.yaml").write_text(TASK)
        hub.commit("org/base", drill.base)
        hub.commit("org/other", write_expert(drill.base, tmp_path / "other", seed=99, scale=0.002))
        for name in RECIPES:
            drill.add_recipe(name)
            drill.release(name)
        with drill.service:
            yield drill


@pytest.mark.timeout(3600)
def test_two_hours_in_fast_motion(drill: Drill) -> None:
    service, began = drill.service, time.monotonic()

    def step(words: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {words}", flush=True)

    step("the first merges, which the poll starts")
    drill.ends(*(("merge", name, "Promoted", "release") for name in RECIPES))
    drill.check(0)

    step("two releases at once")
    drill.promoted("alpha", "beta")

    step("a broken release, and one that is rejected")
    drill.release("alpha", broken="cut")
    drill.release("gamma", good=False)
    drill.ends(("merge", "alpha", "Failed", "release"), ("merge", "gamma", "Rejected", "release"))
    drill.check(status_data.FAILED, "alpha")

    step("better ones")
    drill.promoted("alpha", "gamma")

    step("a rollback, a recipe that is broken for a while, and a cron run, which finds nothing new")
    schedule_once(service, "alpha", datetime.now(ZoneInfo("Europe/Berlin")) + timedelta(minutes=3))
    rolled = drill.command("rollback", "beta", "--why", "it was rude")
    assert rolled.returncode == 0, rolled.stderr
    drill.check(0)
    text = (service.recipes / "beta.yaml").read_text()
    (service.recipes / "beta.yaml").write_text(text.replace("merge_method", "merge_metod"))
    drill.check(status_data.BROKEN, "beta")
    time.sleep(2 * POLL)  # polls tell of it
    (service.recipes / "beta.yaml").write_text(text)
    drill.ends(("merge", "alpha", "Cached", "schedule"))
    drill.check(0)

    step("the worker is killed in a merge")
    with slow(service) as merging:
        drill.release("alpha")
        service.until(merging.exists, PATIENCE)
        worker = service.part("worker start")
        for pid in (worker, *children(worker)):
            os.kill(pid, signal.SIGKILL)
    # The next poll starts it again.
    drill.ends(("merge", "alpha", "Crashed", "release"), ("merge", "alpha", "Promoted", "release"))
    drill.check(0)

    step("the receiver is killed, and a release comes meanwhile")
    with drill.held("lewis_flows.service.webhook"):
        os.kill(service.part("service.webhook"), signal.SIGKILL)
        drill.release("beta")
        drill.check(status_data.DOWN, "webhooks")
    drill.ends(("merge", "beta", "Promoted", "release"))
    drill.check(0)

    step("the server is killed in a merge")
    with slow(service) as merging, drill.held("lewis_flows.service.prefect_app"):
        drill.release("gamma")
        service.until(merging.exists, PATIENCE)
        os.kill(service.part("prefect_app"), signal.SIGKILL)
        drill.check(status_data.DOWN, "Prefect")
    service.until(service.answers, PATIENCE)
    drill.ends(("merge", "gamma", "Promoted", "release"))
    drill.check(0)

    step("a release of another size, and one that a person has to approve")
    drill.release("gamma", broken="wide")
    drill.ends(("merge", "gamma", "Failed", "release"))
    drill.check(status_data.FAILED, "gamma")
    drill.add_recipe("gamma", approve="true")  # an edit is merged: with the release that fails
    drill.ends(("merge", "gamma", "Failed", "edit"))
    drill.release("gamma")
    service.until(lambda: "Suspended" in [run["state_name"] for run in service.runs("gamma")], PATIENCE)
    drill.check(status_data.WAITS, "gamma")
    number = service.versions("gamma")[0].version
    approved = drill.command("approve", f"gamma/{number}", "--why", "support has read it")
    assert approved.returncode == 0, approved.stderr
    drill.ends(("merge", "gamma", "Approved", "release"))

    step("a search, and a release meanwhile")
    service.start_run("search/beta")
    drill.release("alpha")
    # All trials answer all questions: the recipe's own values stay, whose model is the champion.
    searched, merged = ("search", "beta", "Completed", "hand"), ("merge", "beta", "Completed", "search")
    drill.ends(searched, merged, ("merge", "alpha", "Promoted", "release"))
    drill.check(0)

    step("what was told")
    subjects = Counter(each["subject"] for each in service.sink.received)
    promoted = sum(count for (_, _, verdict, _), count in drill.expected.items() if verdict == "Promoted")
    assert subjects == {
        "LEWIS: a new champion": promoted + 2,  # a rollback and an approval
        "LEWIS: a run failed": 3,
        "LEWIS: a run died": 1,
        "LEWIS: a merge was rejected": 1,
        "LEWIS: a version waits for approval": 1,
        "LEWIS: releases cannot be watched": 1,  # those of the recipe that was broken for a while
    }, service.sink.received
    assert drill._count == 3 + 12 and sum(drill.expected.values()) == 20, drill.expected
    service.stop()
    step("stopped")
    assert drill.complaints() == []
    service.start()  # as the fixture will stop it

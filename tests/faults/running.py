"""What the tests of kills, races and full disks share: `lewis` in a session of its own, and what it left behind.

`make faults` sets LEWIS_FAULTS_POINTS, at how many points a run is killed; `make test` leaves `full` tests out.
"""

import hashlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lewis.evaluation.documents import Document, SideBySide
from lewis.evaluation.gate import Verdict
from lewis.evaluation.statistics.scores import Texts
from lewis.registry import history
from tests.conftest import Family
from tests.flows.conftest import RECIPE, REPO, TASK
from tests.support.models import WORDS
from tests.support.service import children
from tests.support.warm import WarmPython

KINDS = ("wrong models", "half versions", "left over", "orphans", "tracebacks", "runs that failed again")
APART = """
import os
os.setsid()
for number, path in ((1, {out!r}), (2, {err!r})):
    os.dup2(os.open(path, os.O_WRONLY), number)
"""
"""For a forked process: a session of its own, and its output in files."""
ANSWERS = SideBySide(
    *("merged", "base", ()),
    tuple(
        Document(("words", f"{i}", 0), "words/acc", True, 1, 0, texts=(Texts("p", "t", "a"), Texts("p", "t", "b")))
        for i in range(2)
    ),
)
"""What two models answered, for traces."""
WAITS = Verdict(True, ("no champion: pass",), "no champion", metric="words/acc,none", luck=0.1, approve_hours=1)
"""Of a version that a person has to approve."""
LEFT_OUT = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI")


@dataclass
class Tally:
    """What a test found at all its points; a point that fails does not end the test."""

    what: str
    points: int = 0
    begun: float = field(default_factory=time.monotonic)
    landed: Counter[str] = field(default_factory=Counter)  # the step that had been begun last when a point came
    found: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def note(self, kind: str, bad: bool, where: str) -> None:
        """Count `where` as one of a kind if it is bad."""
        if bad:
            self.found[kind].append(where)

    def point(self, where: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Print what is known after a point: a run of all takes hours, and may be stopped."""
        bad = [f"{kind}: {each}" for kind in KINDS for each in self.found[kind] if each.startswith(where)]
        with capsys.disabled():
            seconds = time.monotonic() - self.begun
            line = f"{self.what} {where}: {'; '.join(bad) or 'all well'} [{self.points}, {seconds:.0f} s]"
            print(line, file=sys.stderr, flush=True)  # a process of xdist has no stdout

    def end(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Print the line for tests/benchmarks/robustness.md, and fail unless every count is 0."""
        counts = " | ".join(str(len(self.found[kind])) for kind in KINDS)
        landed = ", ".join(f"{step} {count}" for step, count in self.landed.items())
        with capsys.disabled():
            print(f"\n| {self.what} | {self.points} | {counts} |", file=sys.stderr)
            seconds = time.monotonic() - self.begun
            print(f"{seconds:.0f} s; the last that had begun: {landed or 'not noted'}", file=sys.stderr, flush=True)
        told = [f"{kind}: {where}" for kind in KINDS for where in self.found[kind]]
        assert self.points and not told, "\n".join(told)


class Run:
    """`lewis ARGUMENTS` in a session of its own; its output is in files.

    Args:
        home: its store.
        patch: Python that runs before it.
        warm: what it is forked from, with the libraries; None: it is started, which takes some seconds of CPU more.
        environment: variables in addition to those of the tests.
    """

    def __init__(
        self, home: Path, *arguments: str | Path, patch: str = "", warm: WarmPython | None = None, **environment: str
    ) -> None:
        self.before = set(below())
        code = f"{patch}\nimport sys\nfrom lewis_flows.cli.main import main\nsys.exit(main(sys.argv[1:]))"
        number = len(list(home.parent.glob(f"{home.name}-*.out")))
        self.out, self.err = (home.parent / f"{home.name}-{number}.{end}" for end in ("out", "err"))
        self.temporary = home.parent / f"{home.name}-tmp"  # where the device slot is: stores do not share it
        self.temporary.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        words = list(map(str, arguments))
        environment = {**kept, "LEWIS_HOME": str(home), "TMPDIR": str(self.temporary), **environment}
        if warm and warm.fits(environment):
            code = APART.format(out=str(self.out), err=str(self.err)) + code
            self.out.touch()
            self.err.touch()
            self.process = warm.run(code, words, folder=REPO, environment=environment)
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe
                pipe.close()
            return
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *words],
                stdout=out,
                stderr=err,
                text=True,
                cwd=REPO,
                env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the shell ignores it
                start_new_session=True,
            )

    def parts(self) -> dict[int, str]:
        """Process id -> command line of all its processes that live, wherever they ended up."""
        return {pid: words for pid, words in below().items() if pid not in self.before}

    def ended(self) -> bool:
        return self.process.poll() is not None

    def told(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def step(self) -> str:
        """The step that it began last, by its log."""
        return last_step(self.told())

    def report(self) -> dict[str, Any]:
        """Wait for it; gives what `--json` printed, or nothing if it failed."""
        try:
            code = self.process.wait(1200)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return {}
        return json.loads(self.out.read_text()) if code == 0 else {}

    def orphans(self, patience: float = 30) -> list[str]:
        """The command lines of what is left of it after a while; they are killed."""
        until(lambda: not self.parts(), patience)
        left = self.parts()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return list(left.values())


def last_step(log: str) -> str:
    """The step of a run that a log names last."""
    found = re.findall(r"Task run '(\w+)|Flow run .* (Finished in state)", log)
    task, ended = found[-1] if found else ("the start", "")
    return "the end" if ended else str(task)


def below(top: int | None = None) -> dict[int, str]:
    """Process id -> command line of what lives and was started, directly or not, by a process; this one by default.

    Under `adopted`, what lost its parent is among them.
    """
    return children(top or os.getpid())


def until(found: Callable[[], Any], patience: float, pause: float = 0.1) -> bool:
    """Whether it becomes true in so many seconds."""
    deadline = time.monotonic() + patience
    while not found():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def write_recipe(folder: Path, family: Family, *, expert: str = "code", name: str = "tiny", rows: int = 0) -> Path:
    """A recipe of two experts, of which `math` is one, next to its data and its lm-eval task.

    Args:
        rows: seed of the rows that it measures and scores on; recipes with other rows share no step.
    """
    (folder / "tasks").mkdir(exist_ok=True)  # next to the recipe it would be taken for one
    data, task = f"words{rows}.jsonl", f"tasks/words{rows}.yaml"
    draw = random.Random(rows)
    lines = [{"question": " ".join(draw.choices(WORDS, k=5)), "answer": draw.choice(WORDS)} for _ in range(16)]
    (folder / data).write_text("\n".join(map(json.dumps, lines)))
    (folder / task).write_text(TASK.replace("words.jsonl", data))
    text = RECIPE.replace("[words.yaml]", "[words.yaml], baselines: [uniform]")
    text %= {"base": family.base, "math": family.math, "code": getattr(family, expert)}
    for old, new in (("name: tiny", f"name: {name}"), ("[words.yaml]", f"[{task}]"), ("words.jsonl", data)):
        text = text.replace(old, new)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def merged(home: Path, digest: str) -> dict[str, str]:
    """File -> SHA-256 of a merged model."""
    folder = home / "merged" / digest
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*"))}


def half_done(home: Path, name: str = "tiny", expected: Sequence[str] = ("champion",)) -> str:
    """What is wrong with the registry after a run that succeeded; nothing if all is well.

    One version is right: it is ready, it is the champion, and no attempt of a process that died looks unfinished.

    Args:
        home: the store.
        name: of the registered model.
        expected: all aliases that the version has.
    """
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db")
    found = list(client.search_model_versions(f"name='{name}'"))
    aliases = {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    if len(found) != 1:
        return f"{len(found)} versions"
    version = found[0]
    if version.status != "READY" or version.tags.get("lewis.verdict") != "passed":
        return f"the version is {version.status}, its tags are {version.tags}"
    if aliases != dict.fromkeys(expected, str(version.version)):
        return f"the aliases are {aliases}"
    experiments = [each.experiment_id for each in client.search_experiments()]
    of_name = f"tags.`lewis.name` = '{name}'"
    unfinished = [
        run
        for tag in ("lewis.name", history.CHART)
        for run in client.search_runs(experiments, f"tags.`{tag}` = '{name}' and attributes.status = 'RUNNING'")
    ]
    models = [each.status for each in client.search_logged_models(experiments, of_name)]
    if unfinished or [str(status) for status in models] != ["READY"]:
        return f"{len(unfinished)} runs of MLflow look as if they went on, its models are {models}"
    database = home / "prefect" / "prefect.db"
    if not database.exists():  # a server that others share
        return ""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as prefect:
        rows = prefect.execute(
            "SELECT flow_run.name FROM flow_run JOIN flow ON flow.id = flow_run.flow_id "
            "WHERE flow_run.state_type = 'RUNNING' AND flow.name = 'merge'"
        ).fetchall()
    return f"these runs of Prefect look as if they went on: {rows}" if rows else ""


def left_over(home: Path, temporary: Path | None = None) -> list[str]:
    """What is half-written or set aside in a store after a run that succeeded, or lies in its temporary folder."""
    from lewis import store

    found = [path for path in home.rglob("*.partial") if "locks" not in path.parts]
    found += [*(home / "quarantine").glob("*"), *(home / "runs").glob("*")]
    for pattern in (".lewis-*", "*/lewis-*"):
        found += home.glob(pattern)
    there = temporary.iterdir() if temporary else ()
    found += [path for path in there if not path.name.startswith("lewis-device-")]
    return [str(path) for path in found if path.name != store.MANIFEST]


def logged_weights(home: Path) -> set[str]:
    """The SHA-256 of all weights in MLflow's folder."""
    found = (path for path in (home / "mlflow").rglob("*.safetensors"))
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

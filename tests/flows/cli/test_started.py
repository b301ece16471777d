"""`lewis run NAME` while the service is up: a worker does it, and the command shows the log and the report."""

import contextvars
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import LogCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Failed, Pending, Running, State, Suspended

from lewis.store import kinds
from lewis_flows import prefect_runs
from lewis_flows.cli import runs, started
from lewis_flows.cli.main import main
from lewis_flows.registration import MergeReport
from lewis_flows.service.deploy import POOL, Follower
from lewis_flows.turn import absorb
from tests.support.deployed import deploying
from tests.support.warm import WarmPython

RECIPE = """
merge_method: ties
base_model: org/base
models: [{model: org/math}]
evaluate: {tasks: [x]}
register: {name: good, gate: {metric: "x/acc,none"}}
"""
REPORT = MergeReport(recipe="good", digest="ab", folder=Path("merged"), version="models:/good/2", verdict=["a rule"])


@pytest.fixture
def recipe(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, prefect_url: str) -> Path:
    """A recipe of the folder, next to a service."""
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    path = tmp_path / "recipes" / "good.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


@pytest.fixture
def client(recipe: Path, prefect_url: str) -> Iterator[SyncPrefectClient]:
    with deploying(prefect_url) as client:
        Follower(print).deploy()
        yield client


def waiting(client: SyncPrefectClient) -> list[FlowRun]:
    ours = {"any_": [client.read_deployment_by_name("merge/good").id]}  # other tests use this server too
    found = prefect_runs.of_flows(client, (prefect_runs.MERGE,), ("SCHEDULED",), deployment_id=ours)
    return [run for run in found if not run.auto_scheduled]


def ends(client: SyncPrefectClient, state: State[Any], report: MergeReport | None = None) -> Callable[[], None]:
    """Let a worker take the next run of the recipe, which ends in a state; waits for it when it is called."""

    def work() -> None:
        deadline = time.monotonic() + 300
        while not (found := waiting(client)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run = found[0].id
        client.set_flow_run_state(run, Pending())
        client.set_flow_run_state(run, Running())
        line = {"name": "prefect.flow_runs", "level": logging.INFO, "message": "merged 7 tensors"}
        client.create_logs([LogCreate(**line, timestamp=datetime.now(UTC), flow_run_id=run)])
        if report:
            report.save(str(run))
        client.set_flow_run_state(run, state, force=True)

    worker = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    worker.start()
    return worker.join


def test_a_worker_does_it_and_the_command_shows_log_and_report(
    recipe: Path, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (started, runs):
        monkeypatch.setattr(module, "_PAUSE", 0.1)
    assert started.run(recipe, []) is None  # no worker is online
    client.send_worker_heartbeat(POOL, "ours", heartbeat_interval_seconds=600)
    assert started.run(recipe, ["publish={repo: org/x}"]) is None  # which no run of a deployment may do
    capsys.readouterr()

    done = ends(client, Completed(name="Promoted"), REPORT)
    assert main(["run", "good", "--json"]) == 0
    done()
    out, err = capsys.readouterr()
    assert MergeReport.model_validate_json(out) == REPORT and "merged 7 tensors" in err

    done = ends(client, Suspended(), REPORT.model_copy(update={"waits": True}))
    assert main(["run", "good", "--set", "seed=1"]) == 0
    done()
    assert "passed, waits for: lewis approve good/2" in capsys.readouterr().out
    [asks] = prefect_runs.of_flows(client, (prefect_runs.MERGE,), ("PAUSED",), tags={"all_": ["recipe:good"]})
    assert asks.parameters == {"recipe": "good", "overrides": ["seed=1"]}
    client.set_flow_run_state(asks.id, Completed(), force=True)

    done = ends(client, Failed(message="download org/math: it is gone"))
    assert main(["run", "good"]) == 1
    done()
    assert "Failed: download org/math: it is gone" in capsys.readouterr().err

    done = ends(client, Completed(name="Skipped", message="the run x merges the newest state"))
    assert main(["run", "good", "--json"]) == 0
    done()
    printed = json.loads(capsys.readouterr().out)
    assert (printed["state"], printed["message"]) == ("Skipped", "the run x merges the newest state")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(started, "_wait", stop)  # Ctrl-C
    assert main(["run", "good"]) == 130
    [run] = waiting(client)
    assert f"the run goes on: `lewis logs good --follow` shows it, `lewis cancel {run.id}` ends it" in (
        capsys.readouterr().err
    )
    recipe.write_text(RECIPE + "dtype: bfloat16\n")
    assert started.run(recipe, []) is None  # the deployment is of the text before
    assert len(waiting(client)) == 1


def test_a_run_that_another_one_replaces_is_followed_by_that_one(
    recipe: Path, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ended with the skipped run, and did not show the result of the merge."""
    for module in (started, runs):
        monkeypatch.setattr(module, "_PAUSE", 0.1)
    client.send_worker_heartbeat(POOL, "ours", heartbeat_interval_seconds=600)
    deployment = client.read_deployment_by_name("merge/good").id
    first = client.create_flow_run_from_deployment(deployment, parameters={"recipe": "good"})

    def work() -> None:
        deadline = time.monotonic() + 300
        while not (later := [run for run in waiting(client) if run.id != first.id]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for state in (Pending(), Running()):
            client.set_flow_run_state(first.id, state)
        absorb(first)
        assert client.read_flow_run(later[0].id).state_name == "Skipped"
        REPORT.save(str(first.id))
        client.set_flow_run_state(first.id, Completed(name="Promoted"), force=True)

    worker = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    worker.start()
    assert main(["run", "good", "--json"]) == 0
    worker.join()
    out, err = capsys.readouterr()
    assert MergeReport.model_validate_json(out) == REPORT
    assert f"skipped: the run {first.name} merges the newest state" in err


def test_old_reports_are_removed_by_a_process_that_runs_no_flow(home: Path, warm: WarmPython) -> None:
    for name, age in (("old", 30 * 86400), ("new", 0)):
        REPORT.save(name)
        os.utime(kinds.RUN_REPORTS.path(name), (time.time() - age,) * 2)
    program = "from lewis_flows.cli.main import program; program()"
    out, _ = warm.run(program, ["gc", "--json"], folder=home, environment=os.environ).communicate()
    found = json.loads(out)["found"]
    assert [each["path"] for each in found] == [str(kinds.RUN_REPORTS.path("old"))]

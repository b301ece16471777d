"""The fleet does its work: releases, a worker and servers that are killed, stores that are lost."""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family
from tests.flows.conftest import TASK, write_words
from tests.flows.test_run import SLOW
from tests.production.fleet import PASSWORD, USER, Fleet, postgres_programs
from tests.production.s3_server import BUCKET, S3Server
from tests.support.local_hub import LocalHub
from tests.support.models import write_expert

RECIPE = """
merge_method: ties
base_model: org/base
models:
  - {model: org/%(name)s, parameters: {weight: 1.0}}
  - {model: org/other, parameters: {weight: 1.0}}
lewis:
  calibrations: {words: {dataset: json, data_files: words.jsonl, text: "{question} {answer}", samples: 16}}
evaluate: {tasks: [tasks/words.yaml], baselines: [base]}
register: {name: %(name)s, gate: {metric: "words/acc,none", tolerance: 1}}
"""
NAMES = ("released", "killed", "bucket", "away", "queued", "rescued", "restarted")


@pytest.fixture(scope="module")
def fleet(family: Family, s3: S3Server) -> Iterator[Fleet]:
    if not postgres_programs():
        pytest.skip("PostgreSQL is missing: apt install postgresql")
    root = Path(tempfile.mkdtemp(prefix="lewis-fleet-"))  # the folders of pytest are closed to the user of PostgreSQL
    root.chmod(0o711)
    with LocalHub(root / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        hub.commit("org/base", family.base)
        hub.commit("org/other", family.math)
        for name in NAMES:
            hub.commit(f"org/{name}", family.code)
        fleet = Fleet(root, hub, s3)
        patch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        write_words(fleet.recipes)
        (fleet.recipes / "tasks").mkdir()
        (fleet.recipes / "tasks" / "words.yaml").write_text(TASK)
        for name in NAMES:
            text = RECIPE % {"name": name}
            if name in ("queued", "rescued", "restarted"):  # plain merges, which take less
                text = re.sub(r"lewis:\n.*\n", "", text)
            if name == "rescued":
                text = text.replace("baselines: [base]", "baselines: [experts]")
            (fleet.recipes / f"{name}.yaml").write_text(text)
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop()
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_workers_left(fleet: Fleet) -> Iterator[None]:
    yield
    for name in [name for name in fleet.parts if name.startswith("worker")]:
        fleet.parts.pop(name).kill()


def release(fleet: Fleet, name: str, family: Family, seed: int) -> str:
    """Commit a new fine-tune to the Hub; gives the commit."""
    folder = fleet.root / f"release-{name}-{seed}"
    write_expert(family.base, folder, seed=seed)
    return fleet.hub.commit(f"org/{name}", folder)


def sources(fleet: Fleet, name: str) -> list[str]:
    """The commits of the recipe's expert in its versions, oldest first."""
    return [str(version.tags[f"lewis.source.org--{name}"]) for version in fleet.versions(name)]


def test_a_commit_becomes_one_version_and_is_found_again_by_empty_stores(fleet: Fleet, family: Family) -> None:
    fleet.worker("worker-1")
    fleet.worker("worker-2")
    sha = release(fleet, "released", family, 5)
    fleet.until(lambda: len(fleet.versions("released")) == 1, 400)
    run = fleet.until(lambda: fleet.runs("released"), 10)[-1]
    run = fleet.ended(run["id"])
    assert run["state_name"] == "Promoted", run["state"]["message"]
    assert sources(fleet, "released") == [sha] and fleet.versions("released")[0].aliases == ["champion"]
    for name in ("worker-1", "worker-2"):
        fleet.parts[name].kill()
        shutil.rmtree(fleet.home(name), ignore_errors=True)
    begin = time.monotonic()
    fleet.worker("worker-2")
    run = fleet.ended(fleet.run("released"))
    print(f"a run of two empty stores: {time.monotonic() - begin:.0f} s")
    assert run["state_name"] == "Cached", run["state"]
    assert len(fleet.versions("released")) == 1
    assert "fetched" in fleet.parts["worker-2"].log.read_text()


def test_a_worker_that_is_killed_in_the_middle_of_a_merge(fleet: Fleet, family: Family) -> None:
    flag = fleet.root / "merging"
    patch = SLOW.replace("print('HERE', flush=True)", f"open({str(flag)!r}, 'w').close() or 1")
    fleet.worker("worker-3", patch.replace("time.sleep(60)", "time.sleep(3600)"))
    sha = release(fleet, "killed", family, 6)
    fleet.until(flag.exists, 400)
    fleet.parts["worker-3"].kill()
    shutil.rmtree(fleet.home("worker-3"))  # the machine is lost with its disk
    begin = time.monotonic()
    worker = fleet.worker("worker-4")
    run = fleet.ended(fleet.run("killed"))
    print(f"the other worker took over and finished: {time.monotonic() - begin:.0f} s")
    assert run["state_name"] == "Promoted", run["state"]
    assert sources(fleet, "killed") == [sha]
    told = worker.log.read_text()
    assert "fetched importance/" in told and "Measuring" not in told


@pytest.mark.parametrize("seconds", [0, 40])
def test_postgresql_is_started_again_in_the_middle_of_a_merge(fleet: Fleet, family: Family, seconds: int) -> None:
    """Prefect's and MLflow's databases are away while the run computes and asks: it waits, and ends as ever."""
    flag = fleet.root / f"merging-{seconds}"
    patch = SLOW.replace("print('HERE', flush=True)", f"open({str(flag)!r}, 'w').close() or 1")
    name = f"worker-restarted-{seconds}"
    fleet.worker(name, patch.replace("time.sleep(60)", "time.sleep(5)"))
    before = len(fleet.versions("restarted"))
    sha = release(fleet, "restarted", family, 20 + seconds)
    fleet.until(flag.exists, 400)
    fleet.postgres.stop()
    time.sleep(seconds)
    fleet.postgres.run()
    begin = time.monotonic()
    fleet.until(lambda: len(fleet.versions("restarted")) > before, 400)
    run = fleet.ended(fleet.until(lambda: fleet.runs("restarted"), 60)[-1]["id"])
    print(f"PostgreSQL was away for {seconds} s; the run ended {time.monotonic() - begin:.0f} s later")
    assert run["state_name"] == "Promoted", run["state"]["message"]
    assert sources(fleet, "restarted")[before:] == [sha]
    tasks = fleet.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    assert tasks and {task["state_type"] for task in tasks} <= {"COMPLETED"}, [task["state"] for task in tasks]


def test_the_s3_server_is_killed_in_the_middle_of_an_upload(fleet: Fleet, family: Family) -> None:
    flag = fleet.root / "uploading"
    slow_upload = (
        "import os, time, lewis.store.remote as m; f = m._put\n"
        "m._put = lambda s, source, *a: (f(s, source, *a), 'merged' in str(source) and"
        f" (open({str(flag)!r}, 'w').close(), time.sleep(3)))[0]\n"
    )
    fleet.worker("worker-5", slow_upload)
    sha = release(fleet, "bucket", family, 7)
    fleet.until(flag.exists, 400)
    fleet.s3.kill()
    time.sleep(20)
    fleet.s3.start()
    run = fleet.until(lambda: fleet.runs("bucket"), 10)[-1]
    run = fleet.ended(run["id"])
    assert run["state_type"] == "COMPLETED", run["state"]
    assert sources(fleet, "bucket") == [sha]
    fleet.parts["worker-5"].kill()
    worker = fleet.worker("worker-6")  # it believes only what is whole
    run = fleet.ended(fleet.run("bucket"))
    assert run["state_type"] == "COMPLETED", run["state"]
    assert sources(fleet, "bucket") == [sha], worker.log.read_text()


def test_mlflow_is_away_for_a_minute(fleet: Fleet, family: Family) -> None:
    flag = fleet.root / "registering"
    told = (
        "import time, lewis.registry.logged_model as m; f = m.write\n"
        f"m.write = lambda *a, **k: (open({str(flag)!r}, 'w').close(), time.sleep(3), f(*a, **k))[2]"
    )
    fleet.worker("worker-7", told)
    sha = release(fleet, "away", family, 8)
    fleet.until(flag.exists, 400)
    fleet.parts["mlflow"].kill()
    time.sleep(60)
    fleet.parts["mlflow"].start()
    fleet.until(lambda: fleet.answers(f"{fleet.mlflow}/health"), 240)
    run = fleet.until(lambda: fleet.runs("away"), 10)[-1]
    run = fleet.ended(run["id"])
    if run["state_type"] != "COMPLETED":  # a minute is as long as the retries are: then the next run does it
        run = fleet.ended(fleet.run("away"))
    assert run["state_type"] == "COMPLETED", run["state"]
    assert sources(fleet, "away") == [sha]


def test_evaluations_go_to_the_workers_of_their_own_queue(fleet: Fleet, family: Family) -> None:
    """The merge waits for a run in that queue; a second merge finds the scores; who cancels one cancels the other."""
    merging = fleet.worker("worker-8", queue="default", LEWIS_EVALUATE_QUEUE="gpu")
    merge = fleet.run("queued")
    waits = fleet.until(lambda: evaluations(fleet), 400)[0]
    fleet.until(lambda: evaluations(fleet)[0]["state_name"] == "Late", 60)
    status = json.loads(fleet.lewis("status", "--json").stdout)
    parts = {part["name"]: part for part in status["parts"]}
    assert "has no worker; start one" in parts["work queue gpu"]["state"] and not parts["work queue gpu"]["up"]
    assert parts["work queue default"]["up"], parts
    fleet.ask(f"/flow_runs/{merge}/set_state", {"state": {"type": "CANCELLING"}})
    assert fleet.ended(merge)["state_type"] == "CANCELLED"
    assert fleet.ended(waits["id"], 60)["state_type"] == "CANCELLED"
    assert "is one started with `--work-queue gpu`" in merging.log.read_text()

    scoring = fleet.worker("worker-9", queue="gpu")
    run = fleet.ended(fleet.run("queued"), 900)
    assert run["state_name"] == "Promoted", run["state"]
    made = evaluations(fleet)[1]
    assert made["state_name"] == "Scored" and made["work_queue_name"] == "gpu", made["state"]
    assert set(made["parameters"]["models"]) == {"base", "merged"}
    assert "Task run 'evaluate" in scoring.log.read_text()
    assert fleet.ended(fleet.run("queued"), 900)["state_name"] == "Cached"
    assert len(evaluations(fleet)) == 2

    release(fleet, "queued", family, 10)  # now there is a champion to score, which this worker must fetch
    fleet.until(lambda: len(fleet.versions("queued")) == 2, 900)
    made = evaluations(fleet)[2]
    assert "champion" in made["parameters"]["models"] and made["state_name"] == "Scored", made["state"]


def test_a_worker_that_is_killed_in_the_middle_of_scoring(fleet: Fleet, family: Family) -> None:
    """The merge that waits starts the run again; another worker scores what the dead one had not."""
    flag, before = fleet.root / "scoring", len(evaluations(fleet))
    there = scores(fleet)
    patch = (
        "import time, lewis.evaluation.harness.process as m; f = m._watch; n = []\n"
        "m._watch = lambda *a: (n.append(a), len(n) == 3 and"
        f" (open({str(flag)!r}, 'w').close(), time.sleep(3600)), f(*a))[2]"  # while lm-eval runs for the third model
    )
    merging = fleet.worker("worker-10", queue="default", LEWIS_EVALUATE_QUEUE="gpu")
    fleet.worker("worker-11", patch, queue="gpu")
    sha = release(fleet, "rescued", family, 11)
    fleet.until(flag.exists, 400)
    fleet.parts["worker-11"].kill()
    shutil.rmtree(fleet.home("worker-11"))
    begin = time.monotonic()
    kept = scores(fleet)
    assert len(kept) - len(there) == 2
    scoring = fleet.worker("worker-12", queue="gpu")
    (run,) = fleet.until(lambda: fleet.runs("rescued"), 10)
    run = fleet.ended(run["id"], 600)
    print(f"the killed worker's run was found dead, and another worker scored: {time.monotonic() - begin:.0f} s")
    assert run["state_name"] == "Promoted", run["state"]
    died, ended = evaluations(fleet)[before:]
    assert (died["state_name"], ended["state_name"]) == ("Crashed", "Scored")
    assert "died; starting it again" in merging.log.read_text()
    models, made = ended["parameters"]["models"], scores(fleet)
    assert set(models) == {"base", "rescued", "other", "merged"} and models == died["parameters"]["models"]
    assert sorted(found for found, _ in made.values() if found in models.values()) == sorted(models.values())
    assert kept.items() < made.items() and "fetched scores/" in scoring.log.read_text()  # none is made twice
    assert sources(fleet, "rescued") == [sha] and fleet.versions("rescued")[0].aliases == ["champion"]
    assert fleet.versions("rescued")[0].status == "READY"


def scores(fleet: Fleet) -> dict[str, tuple[str, Any]]:
    """Object -> the model whose scores it has, and when it was written."""
    client = fleet.s3.client()
    found = {name: client.get_object(Bucket=BUCKET, Key=name) for name in fleet.s3.objects("store/scores/")}
    return {name: (json.load(each["Body"])["model"], each["LastModified"]) for name, each in found.items()}


def evaluations(fleet: Fleet) -> list[dict[str, Any]]:
    """The runs of the flow `evaluate`, oldest first."""
    wanted = {"flows": {"name": {"any_": ["evaluate"]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return list(fleet.ask("/flow_runs/filter", wanted))


def test_no_secret_is_in_a_parameter_a_log_a_state_or_a_command(fleet: Fleet) -> None:
    secrets = [PASSWORD, PASSWORD.replace(" ", "%20"), "the key of the fleet", "what the Hub sends"]
    secrets += [fleet.s3.environment()["AWS_SECRET_ACCESS_KEY"]]
    texts = {"runs": str(fleet.ask("/flow_runs/filter", {})), "logs": str(fleet.ask("/logs/filter", {}))}
    texts |= {"tasks": str(fleet.ask("/task_runs/filter", {})), "artifacts": str(fleet.ask("/artifacts/filter", {}))}
    texts |= {part.name: part.log.read_text() for part in fleet.parts.values()}
    texts |= {log.name: log.read_text() for log in fleet.root.glob("*.log")}
    ours = [part.process.pid for part in fleet.parts.values() if part.process]
    texts |= {f"command {pid}": Path(f"/proc/{pid}/cmdline").read_text() for pid in ours}
    assert [where for where, text in texts.items() for secret in secrets if secret in text] == []

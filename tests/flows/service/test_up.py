"""The service as it is used day by day: the wheel, real processes, a Hub that releases experts, faults as in life."""

import ast
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from mlflow import MlflowClient

from lewis.walls import isolation
from tests.conftest import Family
from tests.flows.conftest import TASK, write_words
from tests.flows.test_run import SLOW
from tests.support.canary import CANARY
from tests.support.databases import put_prefect
from tests.support.local_hub import LocalHub
from tests.support.models import write_expert
from tests.support.prefect_key import credentials
from tests.support.service import SECRET, Service, children, seconds
from tests.support.wheel import user_folder

RECIPE = """
merge_method: ties
base_model: org/base
models:
  - {model: org/%(expert)s, parameters: {weight: 1.0}}
  - {model: org/other, parameters: {weight: 1.0}}
%(blocks)s
register: {name: %(name)s}
"""
GUIDED = """
lewis:
  calibrations: {words: {dataset: json, data_files: words.jsonl, text: "{question} {answer}", samples: 16}}
"""
SCORED = """
evaluate: {tasks: [tasks/words.yaml], baselines: [base], allow_code_execution: true}
register: {name: scored, gate: {metric: "words/acc,none", tolerance: 1}}
"""
LOOK = """
from pathlib import Path

def docs(rows):
    secrets = Path(__file__).with_name("backwards").read_text()[::-1].split(",")
    Path(__file__).with_name("told").write_text(repr(look(*secrets)))
    return rows
"""
FAULTS: dict[str, dict[str, Any]] = {
    "busy": {"status": 503, "times": 3},
    "corrupted": {"corrupt": True, "times": 1},
}
HIDDEN = ("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DATABASE_URL", "HF_TOKEN", "X")  # in the environment of the service
LONG = bool(os.environ.get("LEWIS_LONG"))
# Each test has a recipe of its own, with an expert of the same name.
NAMES = ("scored", *(("missed", "cron", "restarted", "killed", *FAULTS) if LONG else ()))


@pytest.fixture(scope="module")
def service(
    installed: Path, tmp_path_factory: pytest.TempPathFactory, family: Family, common: Path, empty_database: Path
) -> Iterator[Service]:
    """`lewis up` of the wheel, in a folder that has packages `flows` and `tasks`; it polls only when it is told to."""
    root = tmp_path_factory.mktemp("service")
    with LocalHub(root / "hub") as hub:
        hub.commit("org/base", family.base)
        hub.commit("org/other", family.math)  # two of the same weights are refused
        for name in ("shared", "late", *NAMES):
            hub.commit(f"org/{name}", family.code)
        service = Service(root, hub)
        service.command, service.folder = [str(installed / "bin" / "lewis"), "up"], user_folder(root / "user")
        service.environment["PYTHONPATH"] = f"{service.patch.parent}{os.pathsep}."
        del service.environment["LEWIS_RECIPES"]
        service.recipes = service.home / "recipes"
        canaries = {name: secrets.token_hex() for name in HIDDEN}
        service.environment |= canaries
        hub.tokens[canaries["HF_TOKEN"]] = "alice"
        put_prefect(common, service.home)
        (service.home / "mlflow").mkdir()
        shutil.copy(empty_database, service.home / "mlflow" / "mlflow.db")
        register_before(service)
        with service:
            assert sorted(path.name for path in service.recipes.iterdir()) == ["example.yaml.txt", "tasks"]
            service.until(lambda: f"recipes in {service.recipes}: none" in service.log.read_text(), 60)
            put_recipes(service, canaries)
            if LONG:
                schedule_once(service, "cron", datetime.now(ZoneInfo("Europe/Berlin")) + timedelta(minutes=3))
            yield service


def register_before(service: Service) -> None:
    """A champion and an experiment of the time before MLflow asked for a password."""
    client = MlflowClient(f"sqlite:///{service.home}/mlflow/mlflow.db")
    client.create_experiment("earlier", artifact_location=(service.home / "mlflow" / "artifacts").as_uri())
    client.create_registered_model("earlier")
    for _ in range(2):
        client.create_model_version("earlier", str(service.home))
    client.set_registered_model_alias("earlier", "champion", "2")


def put_recipes(service: Service, canaries: dict[str, str]) -> None:
    """Put the recipes into the folder that the service made, their data, and a task that looks for secrets."""
    write_words(service.recipes)
    tasks = service.recipes / "tasks"
    (tasks / "words.yaml").write_text(TASK + "process_docs: !function canary.docs\n")
    (tasks / "canary.py").write_text(CANARY + LOOK)
    made = ((service.home / name).read_text().strip() for name in ("mlflow-password", "metrics-key"))
    known = (*canaries.values(), SECRET, service.key().removeprefix("lewis:"), *made)
    (tasks / "backwards").write_text(",".join(known)[::-1])
    experts = dict(zip(NAMES, NAMES, strict=True)) | (dict.fromkeys(("one", "two"), "shared") if LONG else {})
    for name, expert in experts.items():
        add_recipe(service, name, expert)

    def deployed() -> bool:
        line = service.log.read_text().rpartition(f"recipes in {service.recipes}: ")[2].partition("\n")[0]
        return set(line.split(", ")) == set(experts)

    service.until(deployed, 120)
    time.sleep(3)  # the server's triggers learn of the automations


def schedule_once(service: Service, recipe: str, when: datetime) -> None:
    """Add a cron schedule; Prefect plans new ones once a minute."""
    found = service.until(lambda: service.deployment(recipe), 60)
    schedule = {"cron": f"{when.minute} {when.hour} * * *", "timezone": "Europe/Berlin"}
    body = [{"schedule": schedule, "slug": "once", "active": True}]
    service.ask(f"/deployments/{found['id']}/schedules", body)


def add_recipe(service: Service, name: str, expert: str) -> None:
    blocks = GUIDED if name in ("scored", "cron", "one", "two") else ""  # the others are plain merges, which take less
    text = RECIPE % {"expert": expert, "name": name, "blocks": blocks}
    if name == "scored":
        text = text.partition("register:")[0] + SCORED
    (service.recipes / f"{name}.yaml").write_text(text)


def release(service: Service, expert: str, family: Family, seed: int = 9) -> str:
    """Commit a new fine-tune to the Hub; gives the commit."""
    folder = service.home.parent / f"release-{expert}-{seed}"
    write_expert(family.base, folder, seed=seed)
    sha = service.hub.commit(f"org/{expert}", folder)
    shutil.rmtree(folder)
    return sha


def merged_from(service: Service, name: str) -> list[str]:
    """The commits of the recipe's expert in its versions, newest first."""
    return [str(version.tags[f"lewis.source.org--{name}"]) for version in service.versions(name)]


@contextmanager
def slow(service: Service) -> Iterator[Path]:
    """While the block lasts, new runs stop in the middle of writing the merge, and then a file exists; it is given."""
    flag = service.home.parent / "merging"
    wait = f"[time.sleep(.1) for _ in range(900) if __import__('os').path.exists({str(flag)!r})]"
    code = SLOW.replace("print('HERE', flush=True)", f"open({str(flag)!r}, 'w').close() or 1")
    service.patch.write_text(code.replace("time.sleep(60)", wait))
    try:
        yield flag
    finally:
        service.patch.unlink()
        flag.unlink(missing_ok=True)


def test_a_release_is_merged_within_seconds_and_the_champion_is_decided(service: Service, family: Family) -> None:
    committed = time.time()
    sha = release(service, "scored", family)
    run = service.finished("scored", 1, 180)[-1]
    assert seconds(run, "created") - committed < 15
    assert run["state_name"] == "Promoted", run["state"]["message"]
    if isolation._possible():  # then the code of a task finds no secret of the worker, in whatever file or socket
        looked, found, _ = ast.literal_eval((service.recipes / "tasks" / "told").read_text())
        assert looked > 10 and not found
    assert merged_from(service, "scored") == [sha]
    (version,) = service.versions("scored")
    assert version.aliases == ["champion"] and version.tags["lewis.verdict"] == "passed"
    body = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
    artifacts = service.ask("/artifacts/filter", body)
    assert f"{service.mlflow}/#/models/scored/versions/1" in json.dumps([each["data"] for each in artifacts])
    picture = re.search(r"\]\((get-artifact\?path=density\.png&run_uuid=\w+)\)", version.description)
    assert picture
    signed_in = urllib.request.Request(f"{service.mlflow}/{picture[1]}", headers=to_mlflow(service))
    assert urllib.request.urlopen(signed_in, timeout=30).read(4) == b"\x89PNG"
    service.until(lambda: any("models:/scored/1 is the champion" in each["body"] for each in service.sink.received), 30)


@pytest.mark.long
def test_a_run_by_hand_finds_that_nothing_has_changed(service: Service) -> None:
    before = len(service.runs("scored"))  # that of the release, if its test came first
    for count in range(before + 1, 3):
        service.start_run("merge/scored")
        again = service.finished("scored", count)[-1]
    assert again["state_name"] == "Cached" and again["total_run_time"] < 60
    assert len(service.versions("scored")) == 1


@pytest.mark.long
def test_what_the_receiver_missed_is_found_by_the_poll(service: Service, family: Family) -> None:
    webhooks, service.hub.webhooks[:] = list(service.hub.webhooks), []
    try:
        sha = release(service, "missed", family)
    finally:
        service.hub.webhooks[:] = webhooks
    for _ in range(2):  # the second poll, while the merge is on its way, announces nothing
        service.poll("missed")
    assert len(service.finished("missed", 1)) == 1
    assert merged_from(service, "missed") == [sha]
    service.poll("missed")
    time.sleep(5)
    assert len(service.runs("missed")) == 1


@pytest.mark.long
def test_a_cron_run_starts_at_its_minute(service: Service) -> None:
    named = {each["slug"]: each for each in service.deployment("cron")["schedules"]}
    assert all("nightly" in [each["slug"] for each in service.deployment(name)["schedules"]] for name in NAMES)
    (run,) = service.finished("cron", 1, 240)
    minute, hour = map(int, named["once"]["schedule"]["cron"].split()[:2])
    began = datetime.fromtimestamp(seconds(run) + 1, ZoneInfo("Europe/Berlin"))  # Prefect begins a moment early
    assert (began.hour, began.minute) == (hour, minute) and began.second < 16
    assert run["state_name"] == "Promoted" and len(merged_from(service, "cron")) == 1, run["state"]["message"]


@pytest.mark.long
def test_a_recipe_that_is_dropped_in_is_picked_up(service: Service, family: Family) -> None:
    """And five commits in ten seconds are one merge, of the newest; an edit is one more."""
    add_recipe(service, "late", "late")
    service.until(lambda: service.deployment("late"), 60)
    for seed in range(20, 25):
        began = time.monotonic()
        sha = release(service, "late", family, seed)
        time.sleep(max(0, 2.2 - (time.monotonic() - began)))
    assert {run["state_name"] for run in service.finished("late", 1)} <= {"Promoted", "Skipped"}
    assert merged_from(service, "late") == [sha]
    recipe = service.recipes / "late.yaml"
    text = recipe.read_text()
    recipe.write_text(f"# Late, and edited.\n{text}")
    edited = lambda: [run for run in service.finished("late", 1) if "trigger:edit" in run["tags"]]  # noqa: E731
    service.until(edited, 120)
    assert service.deployment("late")["description"].startswith("Late, and edited.")
    recipe.write_text("models: [")
    service.until(lambda: service.deployment("late")["paused"], 60)
    recipe.write_text(f"# Late, and edited.\n{text}")
    service.until(lambda: not service.deployment("late")["paused"], 60)
    recipe.unlink()
    service.until(lambda: service.deployment("late") is None, 60)
    assert all(service.deployment(name) for name in NAMES)


@pytest.mark.long
def test_two_recipes_that_share_an_expert_measure_it_once(service: Service, family: Family) -> None:
    release(service, "shared", family)
    for name in ("one", "two"):
        assert service.finished(name, 1)[-1]["state_name"] == "Promoted"
    measured = [json.loads(path.read_text())["ref"] for path in (service.home / "importance").glob("*.json")]
    assert measured.count("org/shared") == 1


@pytest.mark.long
def test_a_run_outlives_a_server_that_is_killed_and_started_again(service: Service, family: Family) -> None:
    with slow(service) as merging:
        sha = release(service, "restarted", family)
        service.until(merging.exists, 90)
        os.kill(service.part("prefect_app"), signal.SIGKILL)
        service.until(lambda: not service.answers(), 10)
        service.until(service.answers, 60)
    assert service.finished("restarted", 1, 120)[0]["state_name"] == "Promoted"
    assert merged_from(service, "restarted") == [sha]


@pytest.mark.long
def test_a_worker_killed_in_a_merge_is_not_running_for_long_and_the_next_run_goes_on(
    service: Service, family: Family
) -> None:
    with slow(service) as merging:
        sha = release(service, "killed", family)
        service.until(merging.exists, 90)
        worker, killed = service.part("worker start"), time.monotonic()
        for pid in (worker, *children(worker)):
            os.kill(pid, signal.SIGKILL)
    run = service.finished("killed", 1, 150)[0]
    assert time.monotonic() - killed < 120
    assert run["state_type"] == "CRASHED" and "Run it again" in run["state"]["message"]
    service.until(lambda: any("died. Run it again" in each["body"] for each in service.sink.received), 90)

    service.poll("killed")  # nobody else would know
    run = service.finished("killed", 2)[-1]
    assert run["state_name"] == "Promoted", run["state"]["message"]
    assert merged_from(service, "killed") == [sha]


@pytest.mark.long
def test_a_stumbling_hub_gives_the_right_model(service: Service, family: Family) -> None:
    released = {}
    for name, fault in FAULTS.items():
        service.hub.faults.append({"path": rf"org/{name}/.*", "method": "GET", **fault})
        released[name] = release(service, name, family)
    for name, sha in released.items():
        run = service.finished(name, 1, 240)[-1]
        assert run["state_name"] == "Promoted", run["state"]["message"]
        assert merged_from(service, name) == [sha]
    digests = {service.versions(name)[0].tags["lewis.digest"] for name in FAULTS}
    assert len(digests) == len(FAULTS)  # one expert under four commits
    weights = {(service.home / "merged" / digest / "model.safetensors").read_bytes() for digest in digests}
    assert len(weights) == 1


def test_pages_of_other_sites_get_nothing(service: Service) -> None:
    found = service.deployment("scored")
    runs = len(service.runs("scored"))
    command = {"parameters": {"recipe": "scored"}, "job_variables": {"command": f"touch {service.home}/evil"}}
    evil, page = {"Origin": "http://evil.example"}, {"Host": "evil.example"}
    create = f"{service.api}/deployments/{found['id']}/create_flow_run"
    assert status_of(create, command, evil) == 403 and status_of(create, command, page) == 400
    assert status_of(create, command, {}) == 401
    with pytest.raises(urllib.error.HTTPError, match="422"):
        service.ask(f"/deployments/{found['id']}/create_flow_run", command)
    assert len(service.runs("scored")) == runs and not (service.home / "evil").exists()
    search, mine = f"{service.mlflow}/api/2.0/mlflow/experiments/search", to_mlflow(service)
    assert status_of(search, {"max_results": 1}, mine) == 200
    other = [
        f"{service.mlflow}.evil.example",
        "http://localhost:9999",
        "http://127.0.0.1",
        "http://10.0.0.1:5000",
        "null",
    ]
    for origin in (evil["Origin"], *other):  # also of a browser that has signed in
        assert status_of(search, {"max_results": 1}, mine | {"Origin": origin}) == 403
    for host in (page["Host"], "10.evil.example", "192.168.evil.example", "127.0.0.1.evil.example:5000"):
        assert status_of(search, {"max_results": 1}, mine | {"Host": host}) == 400
    own = service.mlflow.replace("127.0.0.1", "localhost")
    for origin in (service.mlflow, own):
        assert status_of(search, {"max_results": 1}, mine | {"Origin": origin}) == 200
    for shown in (service.mlflow, service.api.removesuffix("/api"), f"{service.api}/health"):
        answer = urllib.request.urlopen(urllib.request.Request(shown, headers=to_mlflow(service)), timeout=30)
        assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
        assert "frame-ancestors 'self'" in answer.headers.get_all("Content-Security-Policy")


def to_mlflow(service: Service) -> dict[str, str]:
    return credentials(f"lewis:{service.password()}")


def test_mlflow_asks_for_a_password_and_has_what_was_registered_before(service: Service) -> None:
    assert stat.S_IMODE((service.home / "mlflow-password").stat().st_mode) == 0o600
    experiments = f"{service.mlflow}/api/2.0/mlflow/experiments"
    create = {"name": "of a stranger"}
    for stranger in ({}, credentials(f"lewis:{service.password()}x"), credentials("admin:password1234")):
        assert status_of(f"{experiments}/create", create, stranger) == 401
    user = {"MLFLOW_TRACKING_USERNAME": "lewis", "MLFLOW_TRACKING_PASSWORD": service.password()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in user.items():
            patch.setenv(name, value)
        client = MlflowClient(service.mlflow)
        assert client.get_model_version_by_alias("earlier", "champion").version == "2"
        assert {each.version for each in client.search_model_versions("name='earlier'")} == {"1", "2"}
        names = {each.name for each in client.search_experiments()}
        assert "earlier" in names and "of a stranger" not in names


def test_its_note_says_where_the_databases_are(service: Service) -> None:
    """`lewis backup` refuses if its environment says otherwise."""
    databases = {"prefect_database": "prefect/prefect.db", "mlflow_database": "mlflow/mlflow.db"}
    assert {name: service.note()[name] for name in databases} == {
        name: str(service.home / path) for name, path in databases.items()
    }


def status_of(url: str, body: Any, headers: dict[str, str]) -> int:
    sent = {"content-type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), sent), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_commands_find_the_key_and_nobody_is_shown_it(service: Service) -> None:
    """Also if `MLFLOW_TRACKING_URI` names the MLflow server, which asks for its password then."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    mine |= {"MLFLOW_TRACKING_URI": service.mlflow}
    command = [service.command[0], "status", "--json"]
    told = subprocess.run(
        command, env={**mine, **service.environment}, capture_output=True, text=True, cwd=service.folder
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert all(part["up"] for part in found["parts"]) and found["running"] is not None and not found["unknown"]
    assert not [why for recipe in found["recipes"] for why in recipe["unknown"] if "champion" in why]

    keys = [service.key(), f"lewis:{service.password()}"]
    hidden = [*keys, service.password(), *(credentials(key)["Authorization"].split()[1] for key in keys)]
    shown = [*service.parts().values(), service.log.read_text(), told.stdout, told.stderr]
    assert f"it is in {service.home}/prefect-api-key" in service.log.read_text()
    assert f"MLflow's page asks for user lewis and the password in {service.home}/mlflow-password" in shown[-3]
    own = ("prefect-api-key", "mlflow-password")
    files = [path for path in service.home.rglob("*") if path.is_file() and path.name not in own]
    assert not [secret for secret in hidden for text in shown if secret in text]
    assert "FOREIGN KEY" not in shown[-3]  # as Prefect logs of events of runs that were deleted
    assert not [path for path in files for secret in hidden if secret.encode() in content(path)]


def test_its_processes_load_only_what_they_need(service: Service) -> None:
    """Idle, they have less than 800 MB together: no pandas, one MLflow server, and no Prefect in `lewis up` itself."""

    def libraries(pid: int) -> set[str]:
        loaded = re.findall(r"/site-packages/(\w+?)/\S+\.so", Path(f"/proc/{pid}/maps").read_text())
        return {"pandas", "pyarrow", "scipy", "torch", "pydantic_core", "sqlalchemy"} & set(loaded)

    parts = {pid: args for pid, args in service.parts().items() if "guard.py" not in args}
    assert libraries(service.process.pid) == set()
    assert libraries(next(pid for pid, args in parts.items() if "service.webhook" in args)) <= {
        *("pydantic_core", "sqlalchemy"),  # of Prefect's client and of the registry
    }
    assert len([args for args in parts.values() if "mlflow" in args]) == 1


def content(path: Path) -> bytes:
    """Of a file that the service may remove meanwhile."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.long
def test_it_stops_and_comes_back_with_its_state(service: Service, family: Family) -> None:
    runs = [run["id"] for name in NAMES for run in service.runs(name)]
    service.stop()
    assert not (service.home / "service.json").exists()
    service.start()
    assert runs and [run["id"] for name in NAMES for run in service.runs(name)] == runs
    for url in (f"{service.api}/health", f"{service.mlflow}/health", service.webhook.replace("webhook", "health")):
        assert urllib.request.urlopen(url, timeout=10).status == 200

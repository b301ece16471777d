"""Retention finds what is old and needed by nothing, and removes nothing else, in real registries and folders."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from fsspec.implementations.local import LocalFileSystem
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running

from lewis import store
from lewis.errors import InputError, TransientError
from lewis.evaluation.gate import Verdict
from lewis.registry import promotion, tracking
from lewis.store import housekeeping, kinds
from lewis.store import outdated as in_remote
from lewis_flows import retention
from lewis_flows.cli.main import main
from lewis_flows.service import servers
from tests.conftest import Family
from tests.support.lineage import make_home, registered

LATER = 200 * 86400.0  # seconds


@flow(name="merge")
def merge(recipe: str) -> None:
    """Stands for the merge in the server's records."""


@pytest.fixture
def client(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention thinks that 200 days have gone by."""
    monkeypatch.setattr(retention, "_now", lambda _: time.time() + LATER)


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


def ran(client: SyncPrefectClient, recipe: str) -> str:
    run = client.create_flow_run(merge, parameters={"recipe": recipe}, state=Running())
    client.set_flow_run_state(run.id, Completed(), force=True)
    return str(run.id)


def test_runs_go_but_not_those_of_versions(
    home: Path,
    family: Family,
    client: SyncPrefectClient,
    later: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = f"old{uuid4().hex[:8]}"
    made, idle, broken, last = (ran(client, recipe) for _ in range(4))
    client.update_flow_run(UUID(broken), tags=[f"broken:{'1' * 40}"])  # the poll asks for it until another commit comes
    going = str(client.create_flow_run(merge, parameters={"recipe": recipe}, state=Running()).id)
    key = f"{recipe}-kept"
    new = {"key": key, "type": "markdown", "data": "x", "flow_run_id": idle}
    client.request("POST", "/artifacts/", json=new)
    version = registered(family.base, "a", {}, "tiny")
    promotion.promote(version, Verdict(True, (), "base"))
    with tracking.client("making runs") as mlflow:
        mlflow.set_tag(version.run_id, "lewis.prefect.flow_run_id", made)
        experiment = tracking.experiment(mlflow)
        theirs = mlflow.create_run(experiment).info.run_id
        mlflow.set_terminated(theirs)
        searches = []
        for _ in range(2):
            parent = mlflow.create_run(experiment, run_name="search tiny", tags={"lewis.search": "d"}).info.run_id
            tags = {"mlflow.parentRunId": parent, "lewis.trial": "0"}
            trial = mlflow.create_run(experiment, run_name="trial 0", tags=tags).info.run_id
            for run in (trial, parent):
                mlflow.set_terminated(run)
            searches.append({parent, trial})
            time.sleep(0.01)
        stays = {run.info.run_id for run in mlflow.search_runs([experiment])} - searches[0]
        assert theirs in stays and version.run_id in stays

    mine = {made, idle, broken, last, going}
    found = [each for each in retention.survey(90) if each.where == "mlflow" or each.key in mine]
    assert {each.key for each in found} == {idle, *searches[0]}
    assert retention.to_text(found, removed=False) == "1 of prefect, 2 of mlflow would be removed; nothing was"
    retention.remove(found)
    with pytest.raises(ObjectNotFound):
        client.read_flow_run(UUID(idle))
    assert [client.read_flow_run(UUID(run)).parameters["recipe"] for run in (made, last, going)] == [recipe] * 3
    assert client.read_artifacts(artifact_filter=ArtifactFilter.model_validate({"key": {"any_": [key]}})) == []
    with tracking.client("looking") as mlflow:
        assert {run.info.run_id for run in mlflow.search_runs([experiment])} == stays
    assert not {each.key for each in retention.survey(90)} & {idle, *searches[0]}

    for days in (0.5, float("inf"), float("nan"), 1e7):
        with pytest.raises(InputError, match="days: expected"):
            retention.survey(days)
    monkeypatch.setattr(servers, "prefect_server", None)  # no server is started for it
    assert main(["retention", "--days", "0"]) == 2 and "days: expected" in capsys.readouterr().err


def test_the_flow_only_looks_unless_it_is_told(
    home: Path, client: SyncPrefectClient, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = list[str]()
    monkeypatch.setattr(retention, "remove", lambda found: removed.extend(each.where for each in found))
    recipe = f"flow{uuid4().hex[:8]}"
    ran(client, recipe)
    ran(client, recipe)
    state = retention.retention_flow(return_state=True)
    assert (state.name, removed) == ("Looked", []) and "would be removed; nothing was" in str(state.message)
    state = retention.retention_flow(dry_run=False, return_state=True)
    assert state.name == "Removed" and "prefect" in removed


def test_remote_entries_go_when_nothing_needs_them(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_remote.entries(time.time() + LATER, {}) == []  # there is no remote half
    remote = tmp_path / "remote"
    monkeypatch.setenv("LEWIS_STORE", f"file://{remote}")
    names = {"needed": "a" * 64, "unused": "b" * 64, "used": "c" * 64}
    for model, digest in names.items():
        store.write_entry(kinds.SCORES.path(digest), {"model": model})
        with store.publish(kinds.GRAMS.path(digest), {"model": model}) as scratch:
            (scratch / "x").write_bytes(b"x" * 1000)
    needed = {
        kinds.SCORES.name: housekeeping.Needed(lambda path: store.read_json(path)["model"] == "needed", ""),
        kinds.GRAMS.name: housekeeping.Needed(
            lambda path: store.read_json(path / store.MANIFEST)["model"] == "needed", ""
        ),
    }
    cut = remote / "grams" / ("d" * 64)  # an upload that was broken off: it has no manifest
    cut.mkdir()
    (cut / "x").write_bytes(b"x" * 2000)
    before = time.time() + 3600
    assert in_remote.entries(time.time() - 3600, needed) == []  # all are young
    for kind, mark in ((kinds.SCORES, ""), (kinds.GRAMS, store.MANIFEST)):
        os.utime(kind.path(names["used"]) / mark, (before + 60, before + 60))
    found = in_remote.entries(before, needed)
    assert sorted(each.key for each in found) == [
        f"grams/{names['unused']}",
        f"grams/{cut.name}",
        f"scores/{names['unused']}",
    ]
    assert min(each.bytes for each in found if each.key.startswith("grams")) > 1000
    for each in found:
        in_remote.remove(each)
    left = {path.relative_to(remote).parts[1][:1] for path in remote.rglob("*") if path.is_file()}
    assert left == {"a", "c"} and in_remote.entries(before, needed) == []
    in_remote.remove(found[0])  # it is gone already


def test_a_shell_that_has_the_remote_half_and_no_registry_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the service's versions need was listed, and would have been removed."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "fresh"))
    monkeypatch.setenv("LEWIS_STORE", str(tmp_path / "bucket"))
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI: expected the MLflow of the machines that share"):
        retention.survey(90)


def test_a_remote_half_that_does_not_answer_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EndpointConnectionError(Exception):
        """As of botocore, which is no OSError."""

    def find(*_: object, **__: object) -> None:
        raise EndpointConnectionError("no such host")

    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    monkeypatch.setattr(LocalFileSystem, "find", find)
    with pytest.raises(TransientError, match=r"LEWIS_STORE: .* does not answer: EndpointConnectionError: no such host"):
        in_remote.entries(time.time() + LATER, {})

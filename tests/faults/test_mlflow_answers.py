"""A request to MLflow's server fails while a merge is registered, waits for approval and is promoted.

It is refused; or done, with an error or nothing as the answer; or done later. MLflow's client sends it again, whatever
it asks for. The next run ends with one version, which is the champion and has the right files.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lewis import store
from lewis.errors import LewisError
from lewis.registry import creation, history, outbox, promotion, tracking, versions
from lewis.registry.registration import Registration
from lewis.registry.tracking import RunInput
from lewis.store import kinds
from tests.conftest import POINTS, Family, full
from tests.faults.running import ANSWERS, WAITS, half_done
from tests.support.relays import HOWS, TRIES, Faulty
from tests.support.service import free_port

pytestmark = full

CREATES = re.compile("/(create|logged-models|traces)$")  # what must not be there twice
GIVES_UP = 2  # seconds, a whole number


@pytest.fixture(scope="module")
def home(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "mlflow").mkdir()
    shutil.copy(empty_database, folder / "mlflow" / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def proxy(home: Path) -> Iterator[Faulty]:
    """Before a server that keeps the files."""
    from lewis_flows.service.servers import mlflow_process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEWIS_HOME", str(home))
        patch.setenv("LEWIS_MLFLOW_AUTH", "0")
        patch.setenv("MLFLOW_ARTIFACTS_DESTINATION", (home / "files").as_uri())
        server, url = mlflow_process(free_port(), f"sqlite:///{home}/mlflow/mlflow.db")
        server.start()
        try:
            with Faulty(url, 1.5 * GIVES_UP) as proxy:
                yield proxy
        finally:
            server.stop()


@pytest.fixture
def entry(home: Path, family: Family, proxy: Faulty, monkeypatch: pytest.MonkeyPatch) -> Registration:
    monkeypatch.setenv("LEWIS_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(TRIES - 1))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    digest = "a" * 64
    folder = kinds.MERGED.path(digest)
    if not folder.exists():
        with store.publish(folder, {"digest": digest}) as scratch:
            shutil.copytree(family.math, scratch, dirs_exist_ok=True)
    return Registration(
        name="tiny",
        folder=folder,
        digest=digest,
        params={"merge_method": "ties"},
        metrics={"merged/words/acc,none": 0.9, "base/words/acc,none": 0.5},
        lineage={"base": "b" * 40},
        recipe="merge_method: ties\n",
        pictures={},
        tables={"scores": [{"model": "merged", "acc": 0.9}]},
        card="# A card",
        datasets=(RunInput("words", "d" * 32, "evaluation", "lm-eval", {"lm_eval_task": "words"}),),
        beside=ANSWERS,
    )


def named(entry: Registration, name: str) -> Registration:
    """The same merge as a model, and in an experiment, of its own."""
    return replace(entry, name=name, team=name)


def register(new: Registration) -> None:
    """What the tasks of a run do, and then the person who approves."""
    versions.champion(new.name)
    promotion.standing(new.name, new.digest)
    version = creation.register(new)
    promotion.promote(version, WAITS, "a test")
    versions.attach(version, {versions.PAGE: "<html>"})
    if promotion.is_waiting(version.name, version.version):
        promotion.approve(version.name, version.version, "a test", "a test")
    assert promotion.is_champion(version.name, version.version)
    promotion.settle()


def wrong(home: Path, new: Registration) -> list[str]:
    """What is wrong after a registration that went well."""
    found = [half_done(home, new.name, ("challenger", "champion"))]
    champion = versions.champion(new.name)
    assert champion is not None
    news = [(move.version, move.happened) for move in outbox.moves() if move.name == new.name]
    found += [] if news == [(champion.version.version, True)] else [f"the news are {news}"]
    with tracking.client("x") as client:
        version = client.get_model_version(new.name, champion.version.version)
        files = home / "files" / versions.check_model(client, version).artifact_location.partition(":/")[2]
        tracking.check_files(client, champion.version.run_id)
        run = client.get_run(champion.version.run_id)
        records = [each.what for each in history.read(client, new.name)]
        found += [] if records == ["waits", "approved"] else [f"the history is {records}"]
    found += [] if run.info.status == "FINISHED" else [f"its run is {run.info.status}"]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files.rglob("*.safetensors"))]
    right = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(new.folder.glob("*.safetensors"))]
    found += [] if sums == right else [f"weights {sums} in {files}"]
    return [each for each in found if each]


@pytest.mark.parametrize("times", [1, TRIES], ids=["once", "always"])
@pytest.mark.parametrize("how", HOWS)
def test_a_request_that_fails_leaves_nothing_that_the_next_run_does_not_mend(
    how: str, times: int, home: Path, proxy: Faulty, entry: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fail("", 0, 0)
    new = named(entry, f"{how}-{times}-0")
    register(new)
    assert wrong(home, new) == []
    places, found = len(proxy.paths), list[str]()
    creating = {number for number, path in enumerate(proxy.paths, 1) if CREATES.search(path)}
    assert places > 50 and len(creating) > 5
    share = (2 * HOWS.index(how) + (times > 1) + 0.5) / (2 * len(HOWS))  # each case has other points
    count = max(1, POINTS // 4)
    spread = {1 + int((number + share) * places / count) for number in range(count)}
    for where in sorted(creating | spread):
        new = named(entry, f"{how}-{times}-{where}")
        proxy.fail(how, where, times)
        error = ""
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(GIVES_UP))
            try:
                register(new)
            except LewisError as caught:
                error = str(caught)
        proxy.wait()
        proxy.fail("", 0, 0)
        try:
            register(new)
            found += [f"{where} of {places} ({error or 'well'}): {each}" for each in wrong(home, new)]
        except LewisError as caught:
            found.append(f"{where} of {places} ({error or 'well'}): run again: {caught}")
    assert not found, "\n".join(found)

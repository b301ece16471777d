"""What `lewis backup` copies, `lewis restore` puts back: champion, history, Prefect's data, recipes and secrets."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prefect.server.database.orm_models import ConcurrencyLimitV2

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation.gate import Verdict
from lewis.registry import history, promotion, versions
from lewis.store import sealed_json
from lewis.store.writable import check_output_folder
from lewis_flows.backup import backup, restore
from lewis_flows.cli.main import main
from lewis_flows.service import note
from tests.conftest import Family
from tests.support.lineage import make_home, registered


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store with a champion; Prefect's database is in use, a device slot taken, and a row is not on disk yet."""
    home = make_home(tmp_path / "home", empty_database, monkeypatch)
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    (tmp_path / "recipes" / "tasks").mkdir(parents=True)
    (tmp_path / "recipes" / "tasks" / "words.yaml").write_text("task: words")
    (home / "prefect-api-key").touch(mode=0o600)
    (home / "prefect-api-key").write_text("lewis:secret")
    (home / "outbox").mkdir()
    store.write_text(home / "outbox" / "note.txt", "a move")
    (home / "prefect").mkdir()
    model = shutil.copytree(family.base, tmp_path / "model")
    store.write_text(model / ".eval_results" / "lewis.yaml", "- scores")  # it was left out: the champion was damaged
    promotion.promote(registered(model, "a", {}, "tiny"), Verdict(True, (), "base"))
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        database.execute("pragma journal_mode=wal")
        database.execute("create table run (id)")
        database.execute("insert into run values (1)")
        limits = ConcurrencyLimitV2.__table__
        database.execute(f"create table {limits.name} ({limits.c.name.name}, {limits.c.active_slots.name})")
        database.execute(f"insert into {limits.name} values ('lewis-device', 1)")
        database.commit()
        database.execute("insert into run values (2)")  # not committed
        yield home
    database.close()


def lose(home: Path, recipes: bool = True) -> None:
    shutil.rmtree(home)
    if recipes:
        shutil.rmtree(home.parent / "recipes")


def test_all_is_back(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    champion = versions.champion("tiny")
    assert champion and champion.folder
    weights, told = (champion.folder / "model.safetensors").read_bytes(), history.history("tiny")
    (tmp_path / "recipes" / ".#words.yaml").symlink_to("somebody@machine.123")  # Emacs's mark of an open file
    copy = tmp_path / "copy"
    assert main(["backup", str(copy), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] > 8 and facts["bytes"] > len(weights) and facts["elsewhere"] == {}
    assert copy.stat().st_mode & 0o077 == 0
    lose(home)
    assert main(["restore", str(copy)]) == 0
    again = versions.champion("tiny")
    assert again and again.folder and (again.folder / "model.safetensors").read_bytes() == weights
    assert history.history("tiny") == told
    assert sqlite3.connect(home / "prefect" / "prefect.db").execute("select id from run").fetchall() == [(1,)]
    assert (home / "prefect-api-key").read_text() == "lewis:secret"
    assert (home / "prefect-api-key").stat().st_mode & 0o077 == 0
    assert (home / "outbox" / "note.txt").read_text() == "a move"
    assert (tmp_path / "recipes" / "tasks" / "words.yaml").read_text() == "task: words"
    restore(copy)  # all is there already
    assert backup(copy).files == facts["files"]  # the earlier copy is replaced


def test_a_copy_that_a_killed_backup_had_set_aside_is_found(home: Path, tmp_path: Path) -> None:
    copy = backup(tmp_path / "copy").folder
    place = store.writer().rpartition("-")[0]
    copy.rename(tmp_path / f".copy.{place}-999999999.earlier_abc.partial")
    lose(home)
    assert restore(copy).files == len((store.read_manifest(copy) or {})["files"])


def test_a_device_slot_that_was_taken_is_free_in_the_copy(home: Path, tmp_path: Path) -> None:
    """The lease of its holder is a file of Prefect that is not copied: the slot stayed taken, and no task ran."""
    slots = f"select active_slots from {ConcurrencyLimitV2.__tablename__}"
    with closing(sqlite3.connect(backup(tmp_path / "copy").folder / "store" / "prefect" / "prefect.db")) as copy:
        assert copy.execute(slots).fetchall() == [(0,)]
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        assert database.execute(slots).fetchall() == [(1,)]


def test_a_copy_whose_database_somebody_has_read_is_still_whole(home: Path, tmp_path: Path) -> None:
    copy = backup(tmp_path / "copy").folder
    with closing(sqlite3.connect(copy / "store" / "prefect" / "prefect.db")) as database:
        assert database.execute("select id from run").fetchall() == [(1,)]
    lose(home)
    assert restore(copy).files


def test_secrets_in_a_store_of_a_group_are_for_their_owner_alone(home: Path, tmp_path: Path) -> None:
    """The group could read them once they were put back, and the service refused them."""
    copy = backup(tmp_path / "copy").folder
    lose(home)
    home.mkdir()
    home.chmod(0o2770)
    restore(copy)
    assert (home / "prefect-api-key").stat().st_mode & 0o077 == 0
    assert (home / "mlflow" / "mlflow.db").stat().st_mode & 0o070 == 0o060


def test_the_journal_of_a_database_that_is_gone_is_not_taken_for_that_of_the_copy(home: Path, tmp_path: Path) -> None:
    """SQLite wrote pages of the lost database into the one that was put back."""
    copy = backup(tmp_path / "copy").folder
    database = home / "mlflow" / "mlflow.db"
    code = (
        "import os, sqlite3, sys; it = sqlite3.connect(sys.argv[1], isolation_level=None); it.execute('begin');"
        "it.execute('pragma cache_size=1'); it.execute('create table lost (x)');"
        "[it.execute('insert into lost values (?)', ['y' * 3000]) for _ in range(200)]; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(database)], check=False)
    database.unlink()
    shutil.rmtree(home / "prefect")
    with pytest.raises(InputError, match=r"mlflow\.db-journal: SQLite would write it into the database of the copy"):
        restore(copy)
    assert not database.exists() and not (home / "prefect").exists()
    (home / "mlflow" / "mlflow.db-journal").unlink()
    restore(copy)


def test_prefects_database_comes_from_where_it_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was left out without a word where `PREFECT_HOME` is set."""
    own = tmp_path / "own"
    shutil.copytree(home / "prefect", own)
    shutil.rmtree(home / "prefect")
    monkeypatch.setenv("PREFECT_HOME", str(own))
    made = backup(tmp_path / "copy")
    assert made.elsewhere == {}
    lose(home)
    shutil.rmtree(own)
    restore(made.folder)
    with closing(sqlite3.connect(own / "prefect.db")) as database:
        assert database.execute("select id from run").fetchall() == [(1,)]
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@db/prefect")
    assert backup(tmp_path / "other").elsewhere == {"prefect": "postgresql+asyncpg://***@db/prefect"}


@pytest.mark.parametrize("named_by", ["folder", "url"])
def test_prefects_database_may_be_anywhere_in_the_store(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    """Only `prefect/prefect.db` of the store was known: another one was left out without a word."""
    own = home / "own" / ("prefect.db" if named_by == "folder" else "runs.db")
    (home / "prefect").rename(own.parent)
    (own.parent / "prefect.db").rename(own)
    (own.parent / "prefect.db-wal").rename(f"{own}-wal")
    if named_by == "folder":
        monkeypatch.setenv("PREFECT_HOME", str(own.parent))
    else:
        monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{own}?timeout=30")
    made = backup(tmp_path / "copy")
    assert made.elsewhere == {} and made.missing == {}
    lose(home)
    restore(made.folder)
    with closing(sqlite3.connect(own)) as database:
        assert database.execute("select id from run").fetchall() == [(1,)]


def test_a_copy_without_the_database_that_the_service_has_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where only `lewis up` had PREFECT_HOME, and cron had not, a copy had no history of runs, and did not say so."""
    note.write({note.database_of("prefect"): str(tmp_path / "own" / "prefect.db")})
    with pytest.raises(InputError, match=f"`lewis up` has its database in {tmp_path}/own/prefect.db, .*PREFECT_HOME"):
        backup(tmp_path / "copy")
    note.write({note.database_of("prefect"): str(home / "prefect" / "prefect.db")})
    assert backup(tmp_path / "copy").missing == {}
    note.remove()  # of a service that was stopped
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "none"))
    assert main(["backup", str(tmp_path / "other")]) == 0
    assert f"prefect has no database in {tmp_path}/none/prefect.db: if its server has" in capsys.readouterr().out


def test_the_servers_of_lewis_up_may_be_named_as_lewis_env_does(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = {"mlflow": "http://127.0.0.1:5000", "prefect": "http://127.0.0.1:4200/api"}
    places = {"mlflow": home / "mlflow" / "mlflow.db", "prefect": home / "prefect" / "prefect.db"}
    note.write(urls | {note.database_of(part): str(place) for part, place in places.items()})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", urls["mlflow"])
    monkeypatch.setenv("PREFECT_API_URL", urls["prefect"])
    made = backup(tmp_path / "copy")
    assert all((made.folder / "store" / place.relative_to(home)).is_file() for place in places.values())
    assert made.elsewhere == made.missing == {}


def test_mlflows_database_may_be_anywhere_in_the_store(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "mlflow" / "mlflow.db").rename(home / "registry.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/registry.db")
    made = backup(tmp_path / "copy")
    assert (made.folder / "store" / "registry.db").is_file() and made.elsewhere == {} and made.missing == {}


def test_a_store_that_a_process_uses_is_not_put_back(home: Path, tmp_path: Path) -> None:
    """Also if the store was deleted under a service that runs on: it has the lock of a file that is gone."""
    copy = backup(tmp_path / "copy").folder
    code = "import sys, time; file = open(sys.argv[1]); print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(home / "mlflow" / "mlflow.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        lose(home)
        with pytest.raises(InputError, match=rf"process {process.pid} uses .*mlflow.db.*; stop it first"):
            restore(copy)
        process.kill()
    assert not (home / "mlflow").exists()
    restore(copy)


@pytest.mark.parametrize(
    "wrong",
    [
        *("damaged", "another place", "running"),
        *(pytest.param(each, marks=pytest.mark.long) for each in ("not one", "not empty", "in the store")),
    ],
)
def test_what_cannot_be_put_back_is_refused_and_changes_nothing(
    home: Path, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    if wrong == "in the store":
        with pytest.raises(InputError, match="expected a folder outside of the store"):
            backup(home / "copy")
        return
    backup(copy)
    lose(home)
    home.mkdir()
    if wrong == "damaged":
        (copy / "store" / "prefect-api-key").write_text("lewis:secreT")
        expected = "prefect-api-key: expected SHA-256"
    elif wrong == "not one":
        copy, expected = tmp_path, "expected a whole copy"
    elif wrong == "another place":
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "other"))
        expected = "set LEWIS_HOME to the folder that was copied"
    elif wrong == "not empty":
        (home / "prefect-api-key").write_text("lewis:other")
        expected = "prefect-api-key: it is there already"
    else:
        lock = store.lock("up")
        lock.acquire()
        expected = "stop it first"
    with pytest.raises(InputError, match=expected):
        restore(copy)
    assert not (home / "mlflow").exists() and not (tmp_path / "recipes").exists()


@pytest.mark.parametrize("to", ["store/{}", "recipes/{}"])
def test_a_copy_writes_nowhere_else(home: Path, tmp_path: Path, to: str) -> None:
    """`store//etc/cron.d/x` was written to /etc/cron.d/x."""
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    backup(copy)
    lose(home)
    home.mkdir()
    name = to.format(elsewhere)
    (copy / name).parent.mkdir(parents=True)
    (copy / name).write_text("evil")
    made = json.loads((copy / "lewis.json").read_text())
    made["files"][name] = {"size": 4, "sha256": store.file_sha256(copy / name)}
    del made["checksum"]
    (copy / "lewis.json").write_text(sealed_json.dumps(made))
    with pytest.raises(InputError, match="is no file of a copy that `lewis backup` makes"):
        restore(copy)
    assert not elsewhere.exists()


def test_a_copy_gives_way_to_no_worse_one(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was not mounted, or LEWIS_HOME not set, left an empty copy in the place of the good one."""
    copy = tmp_path / "copy"
    backup(copy)
    right = store.file_sha256(copy / "lewis.json")
    with pytest.raises(InputError, match=f"holds the copy of the store {home} that `lewis backup` made"):
        check_output_folder(copy)  # of `lewis merge -o`
    with monkeypatch.context() as patch:
        patch.setenv("LEWIS_HOME", str(tmp_path / "other"))
        with pytest.raises(InputError, match=f"holds the copy of the store {home} that `lewis backup` made"):
            backup(copy)
    home.rename(tmp_path / "away")
    with pytest.raises(InputError, match="has none any more: is its disk mounted"):
        backup(copy)
    shutil.rmtree(home, ignore_errors=True)
    (tmp_path / "away").rename(home)
    database = home / "mlflow" / "mlflow.db"
    whole = database.read_bytes()
    database.write_bytes(whole[:8192] + bytes(4096) + whole[12288:])
    with pytest.raises(LewisError, match=r"the copy could not be made: .*(damaged|malformed)"):
        backup(copy)
    assert store.file_sha256(copy / "lewis.json") == right
    database.write_bytes(whole)
    assert backup(copy).files


def test_a_copy_does_not_give_way_to_one_without_recipes_or_model_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only copy of both was replaced by one without them, where cron lacked LEWIS_RECIPES or a disk was away."""
    copy, recipes, artifacts = tmp_path / "copy", tmp_path / "recipes", home / "mlflow" / "artifacts"
    (recipes / "mine.yaml").write_text("merge_method: ties")
    files = backup(copy).files
    right = store.file_sha256(copy / "lewis.json")
    with monkeypatch.context() as patch:
        patch.delenv("LEWIS_RECIPES")  # then it is the folder that comes with the project, which has tasks alone
        with pytest.raises(InputError, match=r"has recipes/mine\.yaml .* none any more: set LEWIS_RECIPES as"):
            backup(copy)
        patch.setenv("LEWIS_RECIPES", str(tmp_path / "none"))
        for folder in (copy, tmp_path / "other"):
            with pytest.raises(InputError, match=f"{tmp_path}/none: LEWIS_RECIPES names no folder"):
                backup(folder)
    artifacts.rename(tmp_path / "away")
    for mounted in (False, True):  # no folder, or an empty one
        if mounted:
            artifacts.mkdir()
        with pytest.raises(InputError, match="none any more: is the disk of mlflow/artifacts mounted"):
            backup(copy)
    assert store.file_sha256(copy / "lewis.json") == right and not (tmp_path / "other").exists()
    assert backup(tmp_path / "other").files < files  # as it is, somewhere else
    artifacts.rmdir()
    (tmp_path / "away").rename(artifacts)
    (recipes / "mine.yaml").rename(recipes / "renamed.yaml")
    assert backup(copy).files == files


def test_what_servers_have_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect:4200/api")
    assert backup(tmp_path / "copy").elsewhere == {
        "mlflow": "http://***@mlflow:5000",
        "prefect": "http://prefect:4200/api",
    }

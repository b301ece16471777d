"""Two users of one group with one store, whatever their umask: each reads, mends and replaces what the other made."""

import multiprocessing
import os
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lewis import library, store
from lewis.registry import tracking
from lewis.search.study import Log, Objective
from lewis.store import housekeeping, kinds, manifest, secrets, verification, writable
from tests.conftest import Family
from tests.support.damage import damage
from tests.support.models import parse

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become two users")
ADA, BOB, STRANGER, LAB = 50001, 50002, 50003, 50000


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that all users reach, with a store of the group, as the documentation says to make it."""
    root = Path(tempfile.mkdtemp(prefix="lewis-group-", dir="/tmp"))
    root.chmod(0o777)
    home = root / "home"
    home.mkdir()
    os.chown(home, ADA, LAB)
    home.chmod(0o2770)
    monkeypatch.setenv("LEWIS_HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(root))
    for name in ("MLFLOW_TRACKING_URI", "LEWIS_STORE", "PREFECT_SERVER_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    yield root
    shutil.rmtree(root)


def as_user(user: int, do: Callable[[], object], umask: int = 0o077, group: int = LAB) -> str:
    """Do something as a user in a process of its own; gives the traceback, or nothing."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        told = ""
        try:
            os.setgroups([group])
            os.setgid(user)
            os.setuid(user)
            os.umask(umask)
            os.environ["HOME"] = "/nonexistent"
            tempfile.tempdir = None
            do()
        except BaseException:
            told = traceback.format_exc()
        sender.send(told)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    found = receiver.recv() if receiver.poll(120) else "it hangs"
    process.join()
    return str(found)


def fill() -> None:
    """Write one of each kind, or read it and write it again."""
    writable.check_store()
    with store.lock("x"):
        store.write_entry(kinds.SCORES.path("a"), {"results": os.getuid()})
    with store.publish(kinds.GRAMS.path("b"), {"digest": "b"}) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "block.safetensors").write_bytes(b"x")
    assert (store.read_entry(kinds.SCORES.path("a")) or {})["results"] == os.getuid()
    assert store.read_manifest(kinds.GRAMS.path("b")) is not None


def search() -> None:
    recipe = parse(
        {
            "merge_method": "ties",
            "base_model": "org/base",
            "models": [{"model": "org/a"}],
            "evaluate": {"tasks": ["sums"]},
            "search": {"space": {"parameters.lambda": {"min": 0.5, "max": 2.0}}},
        }
    )
    log = Log(recipe, [Objective("sums/acc,none", True)], {"org/base": "1"}, "tasks")
    log.done(log.ask(), [0.5])


def mend() -> None:
    """Find what the other one damaged: it is set aside."""
    assert store.read_entry(kinds.SCORES.path("a")) is None
    manifest.set_damaged_aside(kinds.GRAMS.path("b"))
    assert sorted(path.name.partition("-")[0] for path in kinds.QUARANTINE.folder.iterdir()) == ["grams", "scores"]
    fill()
    assert verification.verify().damaged == []


def keep() -> None:
    for path in (kinds.SCORES.path("a"), kinds.GRAMS.path("b") / store.MANIFEST):
        os.utime(path, (1, 1))


def use() -> None:
    """A hit by the other user keeps an entry."""
    for path in (kinds.SCORES.path("a"), kinds.GRAMS.path("b") / store.MANIFEST):
        store.mark_used(path)
        assert path.stat().st_mtime > 2


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_each_reads_and_replaces_what_the_other_made(place: Path, umask: int) -> None:
    home = place / "home"
    for _ in range(2):
        for user in (ADA, BOB):
            assert as_user(user, fill, umask) == ""
            assert as_user(user, search, umask) == ""
    assert as_user(BOB, keep, umask) == "" and as_user(ADA, use, umask) == ""
    for path in (kinds.SCORES.path("a"), kinds.GRAMS.path("b") / "deep" / "block.safetensors"):
        damage(path, "flipped")
        path.chmod(0o660)
    assert as_user(ADA, mend, umask) == ""
    for path in (home, *home.rglob("*")):
        found = path.stat()
        assert found.st_gid == LAB and not stat.S_IMODE(found.st_mode) & 0o007, path
    assert "PermissionError" in as_user(STRANGER, lambda: list(home.iterdir()), group=STRANGER)


def test_each_goes_on_with_a_merge_of_the_other(place: Path, family: Family) -> None:
    models = place / "models"
    for name in ("base", "math", "code"):
        shutil.copytree(getattr(family, name), models / name)
    models.chmod(0o755)
    for path in models.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    text = {
        "merge_method": "ties",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / "math")}, {"model": str(models / "code")}],
        "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
    }
    recipe = parse(text)
    library.merge(recipe, place / "warm")  # what is imported late is imported now: these users may not read it
    shutil.rmtree(place / "home")
    (place / "home").mkdir()
    os.chown(place / "home", ADA, LAB)
    (place / "home").chmod(0o2770)
    for user in (ADA, BOB):
        assert as_user(user, lambda user=user: library.merge(recipe, place / str(user)), 0o022) == ""  # type: ignore[misc]
    names = ("model.safetensors", "config.json")
    assert all((place / str(ADA) / name).read_bytes() == (place / str(BOB) / name).read_bytes() for name in names)
    assert len(kinds.IMPORTANCE.entries()) == 3 and not list((place / "home").rglob("*.partial"))


def test_each_writes_to_the_database(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def track(name: str) -> None:
        with tracking.client("trying") as client:
            client.create_registered_model(name)

    with pytest.MonkeyPatch.context() as patch:  # what is imported late is imported now
        patch.setenv("LEWIS_HOME", str(place / "warm"))
        track("warm")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # to which MLflow has set it
    for user in (ADA, BOB, ADA):
        name = f"of-{user}-{os.urandom(3).hex()}"
        assert as_user(user, lambda name=name: track(name), 0o022) == ""  # type: ignore[misc]


def test_keys_are_of_one_user(place: Path) -> None:
    """A key is in a file of its owner alone; the other one is told so, and gets no other key without a word."""
    assert as_user(ADA, secrets.PREFECT_KEY.read) == ""
    told = as_user(BOB, secrets.PREFECT_KEY.read)
    assert "InputError" in told and "another user's; set PREFECT_SERVER_API_AUTH_STRING" in told, told


def test_housekeeping_of_one_removes_what_the_other_made(place: Path) -> None:
    assert as_user(ADA, fill) == "" and as_user(ADA, keep) == ""

    def clean() -> None:
        housekeeping.remove(housekeeping.survey(1, needed={}))

    assert as_user(BOB, clean) == "" and not kinds.SCORES.entries() and not kinds.GRAMS.entries()

"""Two users of one group with one store, whatever their umask: each reads, mends and replaces what the other made."""

import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis import library, store
from lewis.importance import measure
from lewis.merging import run, step
from lewis.merging.fitting.fitted import Fitted
from lewis.recipe.recipe import Recipe
from lewis.registry import tracking
from lewis.search.study import Log, Objective
from lewis.store import housekeeping, kinds, manifest, remote, secrets, verification, writable
from tests.conftest import Family, full
from tests.support.damage import damage
from tests.support.lineage import make_home as make_warm
from tests.support.models import parse
from tests.support.rehearsing import ask_all

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become two users")
ADA, BOB, STRANGER, LAB = 50001, 50002, 50003, 50000
UMASKS = (0o077, *(pytest.param(umask, marks=full) for umask in (0o022, 0o002)))


def make_home(home: Path) -> None:
    home.mkdir()
    os.chown(home, ADA, LAB)
    home.chmod(0o2770)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that all users reach, with a store of the group, as the documentation says to make it."""
    root = Path(tempfile.mkdtemp(prefix="lewis-group-", dir="/tmp"))
    root.chmod(0o777)
    make_home(root / "home")
    monkeypatch.setenv("LEWIS_HOME", str(root / "home"))
    monkeypatch.setenv("TMPDIR", str(root))
    for name in ("MLFLOW_TRACKING_URI", "LEWIS_STORE", "PREFECT_SERVER_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lewis.rehearsal.child.ask_all", ask_all)  # only root can start this Python
    yield root
    shutil.rmtree(root)


def begin(user: int, do: Callable[[], object], umask: int = 0o077, group: int = LAB) -> Callable[[], str]:
    """Begin something as a user in a process of its own; gives a function that waits for its end.

    That gives the traceback, nothing if it ended well, or `killed`.
    """
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
    sender.close()  # else the end of a killed one is not seen

    def ended() -> str:
        try:
            found = receiver.recv() if receiver.poll(300) else "it hangs"
        except EOFError:
            found = "killed"
        if found == "it hangs":
            process.kill()
        process.join()
        return str(found)

    return ended


def as_user(user: int, do: Callable[[], object], umask: int = 0o077, group: int = LAB) -> str:
    """Do something as a user in a process of its own; gives what `begin` does."""
    return begin(user, do, umask, group)()


def die(*_: object, **__: object) -> None:
    """In place of a function: the process is killed there."""
    os.kill(os.getpid(), signal.SIGKILL)


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


@pytest.mark.parametrize("umask", UMASKS)
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


def test_what_one_could_not_push_the_other_makes_again_and_pushes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of an entry that is not pushed was its maker's alone: the other one's run ended there."""

    def make() -> None:
        store.write_entry(kinds.SCORES.path("a"), {"results": os.getuid()})

    monkeypatch.setattr(remote, "_WAIT", 0.001)
    monkeypatch.setenv("LEWIS_STORE", "file:///proc/nowhere")
    remote.opened()  # what is imported late is imported now
    notes = place / "home" / "unpushed"
    for user in (ADA, BOB):
        assert as_user(user, make) == "" and [note.name for note in notes.iterdir()] == ["scores@a.json"]
    monkeypatch.setenv("LEWIS_STORE", f"file://{place}/bucket")
    assert as_user(ADA, make) == "" and not list(notes.iterdir())
    assert (place / "bucket" / "scores" / "a.json").is_file()


@pytest.fixture
def recipe(place: Path, family: Family) -> Recipe:
    """A recipe of models that all users may read; what a merge imports late is imported."""
    models = place / "models"
    for name in ("base", "math", "code"):
        shutil.copytree(getattr(family, name), models / name)
    models.chmod(0o755)
    for path in models.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    found = {
        "merge_method": "ties",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / "math")}, {"model": str(models / "code")}],
        "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
    }
    made = parse(found)
    library.merge(made, place / "warm")  # now: these users may not read it
    shutil.rmtree(place / "home")
    make_home(place / "home")
    return made


def check_alike(place: Path) -> None:
    """The merges of both users are those of root, who measured apart; nothing half-written is left in the store."""
    for name in ("model.safetensors", "config.json"):
        assert len({(place / folder / name).read_bytes() for folder in ("warm", str(ADA), str(BOB))}) == 1
    assert len(kinds.IMPORTANCE.entries()) == 3 and not list((place / "home").rglob("*.partial"))


@full
def test_each_finds_what_the_other_has_measured(place: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_user(ADA, lambda: library.merge(recipe, place / str(ADA)), 0o022) == ""
    monkeypatch.setattr(measure, "measure_sets", lambda *_, **__: pytest.fail("it is measured again"))
    assert as_user(BOB, lambda: library.merge(recipe, place / str(BOB)), 0o022) == ""
    check_alike(place)


@pytest.mark.parametrize("umask", UMASKS)
def test_both_run_one_recipe_at_once(place: Path, recipe: Recipe, umask: int) -> None:
    start = multiprocessing.get_context("fork").Barrier(2)

    def merge(user: int) -> None:
        start.wait(120)
        library.merge(recipe, place / str(user))

    ends = [begin(user, partial(merge, user), umask) for user in (ADA, BOB)]
    assert [ended() for ended in ends] == ["", ""]
    check_alike(place)


@pytest.mark.parametrize("umask", UMASKS)
def test_both_make_one_entry_at_once(place: Path, umask: int) -> None:
    """From the first folder and lock of an empty store on, each time."""
    start = multiprocessing.get_context("fork").Barrier(2)

    def make() -> None:
        for number in range(30):
            start.wait(120)
            with store.lock(f"lock-{number}"):
                if (store.read_entry(kinds.SCORES.path("a")) or {}).get("results", -1) < number:
                    store.write_entry(kinds.SCORES.path("a"), {"results": number})
            folder = kinds.GRAMS.folder / f"new-{number}" / "x"
            with store.publish(folder, {"digest": "b"}) as scratch:
                (scratch / "block.safetensors").write_bytes(b"x")
            store.sweep(folder.parent)
            assert store.read_manifest(folder) is not None

    ends = [begin(user, make, umask) for user in (ADA, BOB)]
    assert [ended() for ended in ends] == ["", ""]
    assert (store.read_entry(kinds.SCORES.path("a")) or {})["results"] == 29
    assert not list((place / "home").rglob("*.partial"))


@pytest.mark.parametrize("key", [None, "k" * 64])
def test_what_the_other_is_writing_is_left_alone(place: Path, key: str | None) -> None:
    """Neither can ask a process of the other for more than whether it is there."""
    context, folder = multiprocessing.get_context("fork"), kinds.GRAMS.path("b")
    written, swept = context.Event(), context.Event()

    def write() -> None:
        with store.publish(folder, {"digest": "b"}, key) as scratch:
            (scratch / "block.safetensors").write_bytes(b"x")
            written.set()
            assert swept.wait(120)

    def sweep() -> None:
        assert written.wait(120)
        store.sweep(folder.parent)
        store.sweep(folder.parent, folder.name)
        swept.set()

    ends = [begin(ADA, write), begin(BOB, sweep)]
    assert [ended() for ended in ends] == ["", ""]
    assert store.read_manifest(folder) is not None and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("umask", UMASKS)
@pytest.mark.parametrize("method", ["ties", pytest.param("regmean", marks=full)])
def test_a_merge_of_the_other_that_was_killed_is_done_anew(
    place: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, umask: int, method: str
) -> None:
    """What it left is the other user's, of which this one may neither read all nor change the modes."""
    if method == "regmean":
        shutil.rmtree(place / "warm")
        recipe = parse({**yaml.safe_load(recipe.text), "merge_method": "regmean"})
        library.merge(recipe, place / "warm")
        shutil.rmtree(place / "home")
        make_home(place / "home")

    def merge() -> None:
        step.merge(library.prepare(recipe)[0])

    add = Fitted.add

    def add_and_die(*given: Any) -> None:
        add(*given)
        die()

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_config", die)  # when all tensors are written
        patch.setattr(Fitted, "add", add_and_die)  # or the first block is fitted
        assert as_user(ADA, merge, umask) == "killed"
    [left] = kinds.MERGED.folder.glob(".*.partial")
    assert left.stat().st_uid == ADA and list(left.iterdir())
    assert as_user(BOB, merge, umask) == ""
    [made] = kinds.MERGED.entries()
    assert (made / "model.safetensors").read_bytes() == (place / "warm" / "model.safetensors").read_bytes()
    assert not list((place / "home").rglob("*.partial"))


@pytest.mark.parametrize("where", ["chmod", "fchmod"])
def test_one_that_is_killed_before_a_mode_is_right_shuts_nobody_out(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A folder, or a lock, that its maker alone could use stayed so."""
    with monkeypatch.context() as patch:
        patch.setattr(os, where, die)
        found = as_user(ADA, fill)
    assert found == "killed" if where == "chmod" else found in ("", "killed")
    assert as_user(BOB, fill) == ""


def test_each_writes_to_the_database(place: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def track(name: str) -> None:
        with tracking.client("trying") as client:
            client.create_registered_model(name)

    with pytest.MonkeyPatch.context() as patch:  # what is imported late is imported now
        make_warm(place / "warm", empty_database, patch)
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

"""Who may look into the store, and what a folder must be like where everybody may make one."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lewis import store
from lewis.errors import InputError
from lewis.search import trial
from lewis.store import kinds


@pytest.fixture(autouse=True)
def _generous() -> Iterator[None]:
    """A user whose files are open to everybody."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Path in a folder -> its mode in octal digits."""
    return {str(path.relative_to(folder)): f"{stat.S_IMODE(path.stat().st_mode):04o}" for path in folder.rglob("*")}


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def fill() -> None:
    """One of each that the store writes."""
    with store.lock("x"):
        store.write_entry(kinds.SCORES.path("a"), {"results": 1})
    with store.publish(kinds.MERGED.path("b"), {"digest": "b"}) as scratch:
        (scratch / "model.safetensors").write_bytes(b"x")
    with store.written_beside(store.home() / "secret", private=True) as scratch:
        scratch.write_text("a key")


def test_the_store_is_for_its_owner(home: Path) -> None:
    fill()
    found = modes(home)
    assert mode(home) == "0700"
    lock = next(name for name in found if name.startswith("locks/"))
    assert found == {
        "locks": "0700",
        lock: "0600",
        "scores": "0700",
        "scores/a.json": "0600",
        "merged": "0700",
        "merged/b": "0700",
        "merged/b/model.safetensors": "0400",
        "merged/b/lewis.json": "0600",
        "secret": "0600",
    }


def test_or_for_a_group_that_may_write_to_it(home: Path) -> None:
    home.mkdir()
    home.chmod(0o2770)
    fill()
    found = modes(home)
    assert mode(home) == "2770" and found["merged/b/model.safetensors"] == "0440"
    assert {found[name] for name in ("scores/a.json", "merged/b/lewis.json")} == {"0660"}
    assert {each[-3:] for name, each in found.items() if (home / name).is_dir()} == {"770"}
    assert found["secret"] == "0600"  # a key stays its owner's


@pytest.mark.parametrize("before, after", [(0o755, "0700"), (0o777, "0770"), (0o1777, "1777"), (0o700, "0700")])
def test_an_older_store_is_closed_to_others(home: Path, before: int, after: str) -> None:
    (home / "locks").mkdir(parents=True)
    home.chmod(before)
    with store.lock("x"):
        assert mode(home) == after


def test_an_empty_folder_that_becomes_a_store_is_closed_to_others(home: Path) -> None:
    home.mkdir(mode=0o755)
    store.make_folder(home / "merged")
    assert mode(home) == "0700"


def test_a_folder_that_others_use_keeps_its_mode(home: Path) -> None:
    """The second lock of a command closed `LEWIS_HOME=/data`, and all that was in it, to the others."""
    home.mkdir(mode=0o755)
    (home / "theirs").touch()
    for name in ("x", "y"):
        with store.lock(name):
            assert mode(home) == "0755" and mode(home / "locks") == "0700"


def test_a_folder_of_the_store_may_be_given_as_seen_from_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(mode=0o755)
    monkeypatch.chdir(home)
    assert store.make_folder(Path("a/b")) == Path("a/b") and mode(home / "a" / "b") == "0700"


def test_what_is_written_elsewhere_keeps_the_modes_of_its_user(home: Path, tmp_path: Path) -> None:
    with store.publish(tmp_path / "deep" / "out", {"digest": "b"}) as scratch:
        (scratch / "model.safetensors").write_bytes(b"x")
    store.write_text(tmp_path / "out.json", "{}")
    found = modes(tmp_path)
    assert found["deep/out/model.safetensors"] == found["out.json"] == "0666" and found["deep"] == "0777"


class TestPrivateFolder:
    def test_is_made_and_found_again(self, tmp_path: Path) -> None:
        for _ in range(2):
            assert mode(store.private_folder(tmp_path / "mine")) == "0700"

    @pytest.mark.parametrize("planted", ["open", "readable", "link", "file", "another user's"])
    def test_what_others_could_have_made_is_refused(
        self,
        tmp_path: Path,
        home: Path,
        planted: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        place = tmp_path / f"lewis-{os.getuid()}"
        (tmp_path / "theirs").mkdir(mode=0o700)
        if planted == "link":
            place.symlink_to(tmp_path / "theirs")
        elif planted == "file":
            place.write_text("")
        else:
            place.mkdir(mode={"open": 0o777, "readable": 0o755}.get(planted, 0o700))
        if planted == "another user's":
            if os.getuid():
                pytest.skip("only root can make one")
            os.chown(place, 12345, 12345)
        with pytest.raises(InputError, match=r"expected a folder of this user with mode 0700, or none.*remove it"):
            store.private_folder(place)
        monkeypatch.setattr(trial, "MEMORY", tmp_path)
        with trial._folder("a" * 64, 1) as folder:  # a trial of a search goes to the disk
            assert folder.is_relative_to(home / "trials")
        assert "until then trials are written to the disk" in caplog.text
        assert list((tmp_path / "theirs").iterdir()) == []

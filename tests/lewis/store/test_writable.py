"""Places that cannot be written to are told before any work: the store by its setting, an output by what was given."""

from pathlib import Path

import pytest
import yaml

from lewis.errors import InputError
from lewis.store import files, writable
from lewis_flows.cli.main import main
from tests.conftest import Family

IMPOSSIBLE = ["/proc/x/merged", "/dev/null/x", "{}/file/x", "{}/file", "{}/loop/x", "{}/" + "x" * 240, "/sys/x", ""]


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("given", [*IMPOSSIBLE, "/dev/null", "/dev", "no UTF-8: \udcff"])
def test_a_folder_that_cannot_be_made_is_refused(places: Path, given: str) -> None:
    with pytest.raises(InputError):
        writable.check_output_folder(Path(given.format(places)))
    assert (places / "file").read_text() == "mine"


@pytest.mark.parametrize("given", [*(each for each in IMPOSSIBLE if each != "{}/file"), "/dev/null", "/dev/full"])
def test_a_file_that_cannot_be_written_is_refused(places: Path, given: str) -> None:
    with pytest.raises(InputError):
        writable.check_output_file(Path(given.format(places)))


@pytest.mark.usefixtures("home")
def test_what_can_be_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    assert writable.check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert writable.check_output_file(tmp_path / "a" / "b.json") == tmp_path / "a" / "b.json"
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".lewis-*"))


def test_the_folders_of_the_store_take_no_output(home: Path) -> None:
    """Housekeeping removed what was pulled to there, or took it for an entry."""
    for place in (home / "merged" / "mine", home / "mlflow" / "a" / "b", home / "scores"):
        with pytest.raises(InputError, match=f"-o {place}: lies in the store {home}"):
            writable.check_output_folder(place)
    assert writable.check_output_folder(home / "mine") == home / "mine"


@pytest.mark.usefixtures("home")
def test_a_tilde_is_the_home_folder_as_in_the_paths_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a folder called ~ in the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable.check_output_folder(Path("~/merged")) == tmp_path / "merged"
    assert writable.check_output_file(Path("~/a.json")) == tmp_path / "a.json"
    with pytest.raises(InputError, match="cannot be written"):
        writable.check_output_folder(Path("~nobody-of-that-name/merged"))


@pytest.mark.parametrize("store", ["/proc/lewis", "{}/file", "{}/loop/x", "~nobody-of-that-name/x"])
def test_a_store_that_cannot_be_written_names_its_setting(
    places: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEWIS_HOME", store.format(places))
    (places / "recipe.yaml").write_text("{merge_method: ties, base_model: a, models: [{model: b}]}")
    assert main(["merge", str(places / "recipe.yaml"), "-o", str(places / "out")]) == 2
    assert "LEWIS_HOME: " in capsys.readouterr().err


def test_an_error_of_the_store_in_the_middle_names_its_setting(home: Path) -> None:
    error = PermissionError(30, "Read-only file system", str(home / "locks" / "x.lock"))
    assert writable.explained(error).startswith(f"LEWIS_HOME: the store {home} cannot be written to: ")
    assert writable.explained(PermissionError(13, "no", "/elsewhere")) == "[Errno 13] no: '/elsewhere'"


@pytest.mark.usefixtures("home")
def test_a_full_disk_names_the_output_that_has_no_room(tmp_path: Path) -> None:
    """`lewis allocate -o` said to free space where the store is, which had enough."""
    with pytest.raises(OSError) as found, files.written_beside(tmp_path / "out.json"), open("/dev/full", "w") as full:
        full.write("x")
    assert writable.explained(found.value).endswith(f"; free space where {tmp_path / 'out.json'} is")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "command, out", [("merge", "/proc/x/y"), ("importance", "/dev/null"), ("allocate", "/sys/x/y")]
)
def test_commands_refuse_it_before_any_work(
    family: Family, tmp_path: Path, command: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"merge_method": "ties", "base_model": "/no/such/model", "models": [{"model": "/neither"}]}
    recipe["lewis"] = {"calibrations": {"a": {"texts": ["w1"]}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([command, str(tmp_path / "recipe.yaml"), "-o", out]) == 2
    assert f"-o {out}: " in capsys.readouterr().err and Path("/dev/null").is_char_device()

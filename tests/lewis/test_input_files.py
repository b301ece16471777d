"""Files of the user: what is no regular file, too large or too deep is refused at once, wherever it is opened."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import InputError
from lewis.evaluation.harness.task_files import find_tasks
from lewis.importance.calibration import calibrate
from lewis.input_files import read_json, read_text
from lewis.models.checkpoint import Checkpoint
from lewis.models.files.folder import INDEX
from lewis.models.hub.pin import pin_folder
from lewis.models.lora.expert import LoraExpert
from lewis.models.tokenizer import read_vocabulary
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import CalibrationSet
from lewis.reports.card import licence_of
from lewis_flows import recipes_folder
from lewis_flows.service.deploy import deploy
from tests.conftest import Family
from tests.support.models import shard

pytestmark = [pytest.mark.usefixtures("home"), pytest.mark.timeout(60)]  # what hangs fails


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def adapter(root: Path, file: str, family: Family) -> Any:
    return LoraExpert(Checkpoint(family.base, "base"), root, "key")


OPENED: dict[str, Callable[[Path, str, Family], Any]] = {
    "recipe.yaml": lambda root, file, family: Recipe.load(root / file),
    "named.yaml": lambda root, file, family: recipes_folder.find(str(root / file)),
    "config.json": lambda root, file, family: Checkpoint(root, "key"),
    "model.safetensors": lambda root, file, family: Checkpoint(root, "key"),
    INDEX: lambda root, file, family: Checkpoint(root, "key"),
    "model-00002-of-00003.safetensors": lambda root, file, family: Checkpoint(root, "key"),
    "adapter_config.json": adapter,
    "adapter_model.safetensors": adapter,
    "tokenizer.json": lambda root, file, family: read_vocabulary(root),
    "special_tokens_map.json": lambda root, file, family: pin_folder("model", root),
    "chat_template.jinja": lambda root, file, family: pin_folder("model", root),
    "task.yaml": lambda root, file, family: find_tasks([file], root),
    "prefect.yaml": lambda root, file, family: deploy(root / file),
    "rows.jsonl": lambda root, file, family: calibrate(
        "rows", CalibrationSet(dataset="json", data_files=file, text="{a}"), tokenizer=family.base, root=root
    ),
}


@pytest.mark.parametrize("make", [fifo, device])
@pytest.mark.parametrize("file", OPENED)
def test_a_fifo_or_a_device_is_refused(family: Family, tmp_path: Path, file: str, make: Callable[[Path], None]) -> None:
    root = tmp_path / "root"
    if file.startswith("adapter"):
        root.mkdir()
        for path in family.lora.iterdir():
            (root / path.name).write_bytes(path.read_bytes())
    elif file == "model.safetensors":
        root.mkdir()
        (root / "config.json").write_text("{}")
    else:
        shard(family.base, root)
    make(root / file)
    expected = "no such file" if file == "prefect.yaml" else "is a (FIFO|device); expected a regular file"
    with pytest.raises(InputError, match=expected) as caught:
        OPENED[file](root, file, family)
    assert file in str(caught.value)


def test_a_fifo_beside_a_recipe_stops_nobody(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo(tmp_path / "broken.yaml")
    (tmp_path / "words.yaml").write_text("task: words")
    fifo(tmp_path / "README.md")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    assert list(find_tasks(["words"], tmp_path).files) == ["words"]
    assert recipes_folder.names() == ["words"] and recipes_folder.load_all() == {}
    assert licence_of(tmp_path) is None


def test_a_socket_or_a_folder_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening, pytest.raises(InputError, match="s: is a socket"):
        listening.bind(str(tmp_path / "s"))
        read_text(tmp_path / "s", 10)
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path, 10)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"x" * 101, "expected at most 100 bytes, got more"),
        (b"\xff", "expected UTF-8 text, got invalid start byte at byte 0"),
        (b"{", "not readable as JSON"),
        (b"1" * 99, None),
        (b'"\\ud83d\\ude00"', None),
        (b'["\\ud83d"]', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes, expected: str | None) -> None:
    (tmp_path / "f.json").write_bytes(content)
    if expected is None:
        read_json(tmp_path / "f.json", 100)
    else:
        with pytest.raises(InputError, match=f"f.json: .*{expected}"):
            read_json(tmp_path / "f.json", 100)


@pytest.mark.parametrize("count", [102, 5000, 100_000])
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "tokenizer.json", INDEX])
def test_json_that_is_too_deep_is_refused(family: Family, tmp_path: Path, count: int, file: str) -> None:
    root = tmp_path / "root"
    if file == "adapter_config.json":
        root.mkdir()
    else:
        shard(family.base, root)
    (root / file).write_text("[" * count + "]" * count)
    with pytest.raises(InputError, match=f"{file}: .*not readable as JSON: nested more than 100 deep"):
        OPENED[file](root, file, family)

"""lewis.models.hub.repository against a real Hub server on loopback: what it pins, downloads, verifies and refuses."""

import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors.numpy import save

from lewis import store
from lewis.errors import BrokenModelError, InputError, LewisError, TransientError
from lewis.importance.dataset_rows import origin
from lewis.inspection.step import InspectionInput, InspectionSettings, look
from lewis.models.compatible import preflight
from lewis.models.hub import client
from lewis.models.hub import errors as hub_errors
from lewis.models.hub.errors import retryable
from lewis.models.hub.pin import Pinned
from lewis.models.hub.repository import fetch, folder_of, remember_listing, resolve, resolve_dataset, tensor_headers
from lewis.models.source import download, pin, pin_all
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import CalibrationSet
from lewis.store import files
from tests.support import pipeline
from tests.support.gguf_files import write_gguf
from tests.support.local_hub import LocalHub
from tests.support.models import parse, rewrite, write_expert, write_llama

WEIGHTS = save({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.zeros(2, np.float16)})
HEADERS = {"a.weight": ("F32", (2, 3)), "a.bias": ("F16", (2,))}
NEEDED = {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}", "model.safetensors": WEIGHTS}
MODEL = NEEDED | {
    "README.md": "# hi",
    "modeling_x.py": "import os",
    "pytorch_model.bin": b"\x80\x04.",
    "onnx/config.json": "{}",
}
LARGE = save({"a.weight": np.arange(2_000_000, dtype=np.float32)})  # 8 MB
CUT = 3_000_000
SIZE = len('{"model_type": "llama"}') + len("{}") + len(WEIGHTS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with LocalHub(tmp_path / "server") as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# Pinning a Hub repo


def test_resolve_pins_branch_tag_commit_and_pull_request(hub: LocalHub, tmp_path: Path) -> None:
    first = hub.commit("org/x", MODEL, tag="v1")
    proposed = hub.commit("org/x", {**MODEL, "config.json": "{}"}, branch="refs/pr/1")
    second = hub.commit("org/x", {**MODEL, "config.json": "[]"})
    assert resolve("org/x@v1", tmp_path) == Pinned("org/x@v1", "org/x", first, SIZE)
    assert resolve(f"org/x@{first}", tmp_path).commit == first
    assert resolve("org/x", tmp_path).commit == second
    assert resolve("org/x@refs/pr/1", tmp_path).commit == proposed
    assert not resolve("org/x", tmp_path).is_local
    assert not any("resolve" in request.path for request in hub.log), "nothing is downloaded"


def test_busy_hub_is_an_error_never_the_older_snapshot(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/x", MODEL)
    fetch(resolve("org/x", tmp_path))
    for status in (503, 500, 429, 408):
        hub.faults.append({"path": "api/models", "status": status})
        with pytest.raises(TransientError, match=f"org/x: 127.0.0.1.* answered {status}") as caught:
            resolve("org/x", tmp_path)
        assert isinstance(caught.value.__cause__, HfHubHTTPError)
        assert retryable(caught.value)


def test_what_the_hub_asks_to_wait_is_waited(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.commit("org/x", MODEL)
    now, slept = 1_000_000.0, list[float]()
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(hub_errors, "time", SimpleNamespace(time=lambda: now))
    busy = {"path": "api/models", "status": 429}
    hub.faults += [{**busy, "headers": {"Retry-After": each}} for each in ("7", formatdate(now + 90, usegmt=True))]
    assert fetch(resolve("org/x", tmp_path)).is_dir()
    assert slept == [7.0, 90.0] and "org/x: HfHubHTTPError; asking again in 90 s" in caplog.text
    hub.faults += [{**busy, "headers": {"Retry-After": each}} for each in ("200", "101", "1")]
    with pytest.raises(TransientError, match="answered 429"):  # five minutes in all
        resolve("org/x", tmp_path)
    hub.faults[:] = [{**busy, "headers": {"Retry-After": each}} for each in ("soon", "9" * 400)]
    for _ in range(2):
        with pytest.raises(TransientError, match="answered 429"):
            resolve("org/x", tmp_path)


@pytest.mark.parametrize("asked", ["0", formatdate(0.0, usegmt=True)])
def test_a_hub_that_asks_to_wait_for_no_time_is_not_asked_without_end(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    slept, request = list[float](), httpx2.Request("GET", "http://hub")
    answer = httpx2.Response(429, headers={"Retry-After": asked}, request=request)

    def question() -> None:
        assert len(slept) < 1000
        raise HfHubHTTPError("busy", response=answer)

    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=slept.append))
    with pytest.raises(TransientError, match="answered 429"):
        client.ask("org/x", question)
    assert slept == [1.0] * 300


@pytest.mark.long
def test_what_the_hub_asks_to_wait_is_waited_though_a_part_is_in_the_cache(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits five times, and then took the part for the whole: the fetch ended: missing, try again."""
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    slept = list[float]()
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=slept.append))
    folder_of(pinned).mkdir(parents=True)
    hub.faults.append({"path": "/tree/", "status": 429, "headers": {"Retry-After": "0"}, "times": 12})
    assert (fetch(pinned) / "model.safetensors").read_bytes() == WEIGHTS
    assert slept == [1.0]


def test_a_connection_that_is_reset_is_made_again(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client resumes other breaks itself, but not this one: a download needed a second run."""
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda _: None))
    left = [OSError("cut"), *[httpx2.ReadError("reset by peer")] * 3]
    left[0].__cause__ = httpx2.ReadError("reset by peer")

    def question() -> str:
        if left:
            raise left.pop()
        return "taken"

    with pytest.raises(LewisError):
        client.ask("org/x", question)
    assert left == [] and client.ask("org/x", question) == "taken"
    left.append(httpx2.ConnectError("refused"))  # not there: not asked again
    with pytest.raises(TransientError, match=r"org/x: .* is unreachable"):
        client.ask("org/x", question)


def test_unreachable_hub_is_transient(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(TransientError, match=r"org/x: 127.0.0.1:1 is unreachable"):
        resolve("org/x", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(InputError, match="HF_ENDPOINT"):
        resolve("org/x", tmp_path)


@pytest.mark.parametrize(
    ("ref", "token", "message"),
    [
        ("org/none", None, "no such repo at .*or a private one; check the spelling, or set HF_TOKEN"),
        ("org/none", "hf_bob", "no such repo at .*your HF_TOKEN may not see it"),
        ("org/open@v9", None, "has no such revision"),
        ("org/open@" + "0" * 40, None, "has no such revision"),
        ("org/private", None, "or a private one.* set HF_TOKEN"),
        ("org/private", "hf_bob", "your HF_TOKEN may not see it"),
        ("org/gated", None, "gated; accept its conditions.* set HF_TOKEN"),
        ("org/gated", "hf_bob", "gated, and your HF_TOKEN has not been granted"),
        ("org/open", "hf_expired", "HF_TOKEN was refused as invalid or expired"),
    ],
)
def test_refusals_say_what_to_do_and_hide_the_token(
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ref: str,
    token: str | None,
    message: str,
) -> None:
    caplog.set_level("DEBUG")
    for name in ("org/open", "org/private", "org/gated"):
        hub.commit(name, MODEL)
    hub.make_private("org/private", "alice")
    hub.gate("org/gated", "alice")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message) as caught:
        resolve(ref, tmp_path)
    assert ref in str(caught.value)
    assert not retryable(caught.value)
    if token:
        assert token not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_token_opens_gated_and_private_repos(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("org/private", "org/gated"):
        hub.commit(name, NEEDED)
    hub.make_private("org/private", "alice")
    hub.gate("org/gated", "alice")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    for name in ("org/private", "org/gated"):
        pinned = resolve(name, tmp_path)
        assert tensor_headers(pinned) == HEADERS
        assert (fetch(pinned) / "model.safetensors").read_bytes() == WEIGHTS
    assert {request.user for request in hub.log} == {"alice"}


def test_malformed_token_is_not_quoted(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/x", NEEDED)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\x07word")
    with pytest.raises(InputError, match="HF_TOKEN holds characters") as caught:
        resolve("org/x", tmp_path)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("sha", ["../../../x", "main", None, "A" * 40])
def test_what_is_no_commit_becomes_no_path(sha: str | None, home: Path) -> None:
    """A Hub that answered `../x` had its listing written next to the store's, outside of its folder."""
    with pytest.raises(InputError, match=r"org/x: refused: expected a commit \(40 hex digits\) from the Hub"):
        remember_listing("org/x", SimpleNamespace(sha=sha, siblings=[]))
    assert not home.exists()


def test_only_safetensors_are_accepted(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/pickled", {"config.json": "{}", "pytorch_model.bin": b"x"})
    hub.commit("org/empty", {"README.md": "soon"})
    hub.commit("org/evil", {**NEEDED, "../evil.json": "{}"})
    hub.commit("org/lora", {"adapter_config.json": "{}", "adapter_model.safetensors": WEIGHTS})
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model.bin\).*convert"):
        resolve("org/pickled", tmp_path)
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        resolve("org/empty", tmp_path)
    with pytest.raises(InputError, match=r"'../evil.json' would land outside"):
        resolve("org/evil", tmp_path)
    assert resolve("org/lora", tmp_path).size == len(WEIGHTS) + 2


def test_second_copy_of_the_weights_is_left_out(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/mistral", {**NEEDED, "consolidated.safetensors": WEIGHTS})
    hub.commit("org/only", {"config.json": "{}", "consolidated.safetensors": WEIGHTS})
    assert resolve("org/mistral", tmp_path).size == SIZE
    assert resolve("org/only", tmp_path).size == len(WEIGHTS) + 2


# Downloading and verifying


def test_fetch_downloads_what_is_needed_once(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    folder = fetch(pinned)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        name: content.encode() if isinstance(content, str) else content
        for name, content in {**NEEDED, "README.md": MODEL["README.md"]}.items()  # the card tells the licence
    }
    hub.log.clear()
    assert fetch(pinned) == folder
    assert hub.log == []
    shutil.rmtree(tmp_path / "home/lewis")  # a worker with a store of its own: the list of files is asked for again
    assert fetch(pinned) == folder
    assert len(hub.log) == 1


def test_fetch_downloads_named_chat_templates_and_nothing_else_of_a_subfolder(hub: LocalHub, tmp_path: Path) -> None:
    template = "additional_chat_templates/tool_use.jinja"
    hub.commit("org/x", {**MODEL, template: "{{ tools }}", "additional_chat_templates/x.py": "", "x/a.jinja": ""})
    folder = fetch(resolve("org/x", tmp_path))
    assert (folder / template).read_text() == "{{ tools }}"
    assert [path.name for path in folder.glob("*/*")] == ["tool_use.jinja"]


def test_fetch_without_weights(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    folder = fetch(pinned, weights=False)
    assert sorted(os.listdir(folder)) == ["config.json", "tokenizer.json"]
    assert sorted(os.listdir(fetch(pinned))) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_fetch_takes_the_pinned_commit_though_the_branch_moved(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    hub.commit("org/x", {**MODEL, "config.json": "[]"})
    assert (fetch(pinned) / "config.json").read_text() == NEEDED["config.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_flipped_byte_in_transfer_is_caught_and_heals(hub: LocalHub, tmp_path: Path, name: str) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    fault = {"path": f"resolve.*{name}", "method": "GET"}
    hub.faults += [{**fault, "corrupt": 1}, {**fault, "corrupt": 2}]  # another bit each time
    with pytest.raises(TransientError, match=f"org/x: {name}: .*checksum"):
        fetch(pinned)
    hub.faults.append({**fault, "corrupt": 1})
    expected = MODEL[name]
    assert (fetch(pinned) / name).read_bytes() == (expected.encode() if isinstance(expected, str) else expected)


def test_a_hub_that_gives_the_same_wrong_bytes_twice_is_not_asked_again(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    hub.faults.append({"path": "safetensors", "method": "GET", "corrupt": 1, "times": 9})
    with pytest.raises(
        BrokenModelError, match=r"org/x: model.safetensors is broken on the Hub itself.* twice"
    ) as caught:
        fetch(pinned)
    assert hub.faults[0]["times"] == 7 and not retryable(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # as Prefect keeps it
    assert (str(again), again.commit) == (str(caught.value), commit)


def test_flipped_byte_on_disk_is_caught_and_heals(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    path = fetch(pinned) / "model.safetensors"
    time.sleep(0.2)
    fetch(pinned)  # its checksum is remembered now
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert (fetch(pinned) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_folder_in_the_place_of_a_cached_file_is_named(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    path = fetch(pinned) / "model.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="safetensors is a folder; expected a file in the Hub client's cache"):
        fetch(pinned)


def test_broken_transfers(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda _: None))
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    fault = {"path": "safetensors", "method": "GET"}
    hub.faults.append({**fault, "status": 503, "times": 4})
    with pytest.raises(TransientError, match="answered 503") as caught:
        fetch(pinned)
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    hub.faults.append({**fault, "truncate": 0, "times": 100})
    with pytest.raises(TransientError, match="transfer broke") as caught:
        fetch(pinned)
    assert isinstance(caught.value.__cause__, httpx2.TransportError)
    hub.faults.clear()
    assert (fetch(pinned) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("cut", [{"truncate": CUT}, {"truncate": CUT, "reset": True}, {"truncate": CUT, "short": True}])
def test_a_cut_download_goes_on_where_it_broke_off(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: dict[str, object]
) -> None:
    """However it was cut, and though the Hub is busy for a moment after that; one run is enough."""
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda _: None))
    hub.commit("org/x", MODEL | {"model.safetensors": LARGE})
    pinned = resolve("org/x", tmp_path)
    fault = {"path": "safetensors", "method": "GET"}
    hub.faults += [{**fault, **cut}, {**fault, "status": 503}, {**fault, **cut}]
    assert (fetch(pinned) / "model.safetensors").read_bytes() == LARGE
    gets = [each for each in hub.log if each.method == "GET" and "safetensors" in each.path]
    begins = [int((each.range or "bytes=0-").partition("=")[2].rstrip("-")) for each in gets if each.status != 503]
    assert begins == sorted(begins) and begins[0] == 0 < begins[1] <= CUT and begins[1] < begins[2] <= 2 * CUT
    assert len(gets) == 4 and not list((tmp_path / "home").rglob("*.incomplete"))


def test_a_server_that_always_cuts_is_an_error_after_a_few_tries(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda _: None))
    hub.commit("org/x", MODEL | {"model.safetensors": LARGE})
    pinned = resolve("org/x", tmp_path)
    fault = {"path": "safetensors", "method": "GET", "reset": True, "times": 999}
    hub.faults += [{**fault, "truncate": CUT, "times": 1}, {**fault, "truncate": 0}]
    with pytest.raises(TransientError, match=r"org/x: .*the transfer broke \(ReadError\); try again"):
        fetch(pinned)
    gets = [each for each in hub.log if each.method == "GET" and "safetensors" in each.path]
    assert len(gets) <= 20 and not list((tmp_path / "home").rglob("*.incomplete"))


def test_hub_that_withdraws_access_between_resolve_and_fetch(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    hub.gate("org/x", "alice")
    with pytest.raises(InputError, match="gated"):
        fetch(pinned)
    hub.faults.append({"path": "/resolve/", "method": "HEAD", "status": 403, "times": 9})
    with pytest.raises(InputError, match="forbids it"):
        fetch(pinned)


def test_cache_that_cannot_be_written_is_no_transient_error(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/x", MODEL)
    pinned = resolve("org/x", tmp_path)
    write(tmp_path, {"file": "in the way"})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(LewisError, match="HF_HOME") as caught:
        fetch(pinned)
    assert not retryable(caught.value)


def test_offline_takes_a_full_commit_from_the_cache(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = hub.commit("org/x", MODEL)
    hub.commit("org/y", MODEL)
    fetch(resolve("org/x", tmp_path))
    hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pinned = resolve(f"org/x@{sha}", tmp_path)
    assert (pinned.commit, pinned.size) == (sha, SIZE)
    folder = fetch(pinned)
    assert tensor_headers(pinned) == HEADERS
    for ref in ("org/x", "org/x@main", "org/x@" + "0" * 40, "org/y"):
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
            resolve(ref, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json is not in the cache"):
        fetch(pinned)
    with pytest.raises(InputError, match=r"config.json is not in the cache"):
        resolve(f"org/x@{sha}", tmp_path)
    assert hub.log == []


def test_offline_verifies_what_another_program_cached(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = hub.commit("org/x", NEEDED)
    folder = Path(snapshot_download("org/x", revision=sha, endpoint=hub.url, cache_dir=os.environ["HF_HUB_CACHE"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pinned = resolve(f"org/x@{sha}", tmp_path)
    assert fetch(pinned) == folder
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"\x01")
    with pytest.raises(TransientError, match=r"model.safetensors: .*checksum"):
        fetch(pinned)


# Headers


def test_headers_are_read_without_the_weights(hub: LocalHub, tmp_path: Path) -> None:
    big = save(
        {f"layer.{i}.weight": np.zeros((2, 1000), np.float32) for i in range(2000)}
    )  # a header of more than 100 kB
    shards = {"model-1.safetensors": WEIGHTS, "model-2.safetensors": save({"c": np.zeros((), np.int64)})}
    hub.commit("org/big", {"model.safetensors": big})
    hub.commit("org/sharded", {**shards, "model.safetensors.index.json": "{}"})
    hub.commit("org/lora", {"adapter_config.json": "{}", "adapter_model.safetensors": WEIGHTS})
    headers = tensor_headers(resolve("org/big", tmp_path))
    assert len(headers) == 2000 and headers["layer.7.weight"] == ("F32", (2, 1000))
    assert tensor_headers(resolve("org/sharded", tmp_path)) == HEADERS | {"c": ("I64", ())}
    assert tensor_headers(resolve("org/lora", tmp_path)) == HEADERS
    assert all(request.range for request in hub.log if "/resolve/" in request.path)
    assert not (tmp_path / "home/huggingface").exists()


def test_headers_of_a_local_folder_and_damage(hub: LocalHub, tmp_path: Path) -> None:
    pinned = resolve(str(write(tmp_path / "m", NEEDED)), tmp_path)
    assert tensor_headers(pinned) == HEADERS
    write(tmp_path / "m", {"model.safetensors": WEIGHTS[:-1]})
    with pytest.raises(InputError, match=r"m/model.safetensors: not a readable safetensors file"):
        tensor_headers(pinned)
    hub.commit("org/x", {"model.safetensors": b"\xff" * 100})
    broken = resolve("org/x", tmp_path)
    with pytest.raises(
        BrokenModelError, match=f"{broken.commit[:8]}: org/x: not a safetensors file.*; name another rev"
    ):
        tensor_headers(broken)
    fetch(broken)  # which has the checksum of the commit
    with pytest.raises(BrokenModelError, match=r"org/x: model.safetensors is broken on the Hub itself, in commit"):
        tensor_headers(broken)
    (folder_of(broken) / "model.safetensors").resolve().write_bytes(b"\xfe" * 100)  # on this disk alone
    with pytest.raises(InputError, match="not a readable safetensors file") as caught:
        tensor_headers(broken)
    assert not isinstance(caught.value, BrokenModelError)
    hub.commit("org/y", NEEDED)
    pinned = resolve("org/y", tmp_path)
    hub.faults.append({"path": "safetensors", "status": 503})
    with pytest.raises(TransientError, match="503"):
        tensor_headers(pinned)


def test_headers_are_those_of_the_file_that_a_merge_reads(home: Path, tmp_path: Path) -> None:
    """A head for drafting next to the weights made the model another architecture."""
    extra = save({"model.layers.9.eagle.weight": np.zeros((2, 2), np.float32)})
    folder = write(tmp_path / "m", NEEDED | {"eagle.safetensors": extra})
    assert tensor_headers(resolve(str(folder), tmp_path)) == HEADERS
    sharded = {name: content for name, content in NEEDED.items() if name != "model.safetensors"}
    index = json.dumps({"weight_map": dict.fromkeys(HEADERS, "model-1.safetensors")})
    sharded |= {"model-1.safetensors": WEIGHTS, "model.safetensors.index.json": index, "eagle.safetensors": extra}
    assert tensor_headers(resolve(str(write(tmp_path / "sharded", sharded)), tmp_path)) == HEADERS


def test_a_config_that_no_network_can_have_and_a_shard_that_is_missing_are_broken_on_the_hub(
    hub: LocalHub, tmp_path: Path
) -> None:
    text = "merge_method: ties\nbase_model: org/base\nmodels: [{model: org/x}]"
    config = Recipe.load(write(tmp_path, {"r.yaml": text}) / "r.yaml")
    model = write_llama(tmp_path / "m", hidden=64, layers=1)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.commit("org/base", files)
    for text in ("{", "[]", '{"model_type": "llama", "hidden_size": "16"}'):
        hub.commit("org/x", {**files, "config.json": text})
        with pytest.raises(BrokenModelError, match=r"org/x(: config.json)? is broken on the Hub itself, in commit"):
            preflight(config, *pin_all(config))
    weights = files.pop("model.safetensors")
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    hub.commit("org/x", {**files, "model-1.safetensors": weights, "model.safetensors.index.json": index})
    with pytest.raises(
        BrokenModelError, match=r"org/x: model.safetensors.index.json is broken .*-2.safetensors is mis"
    ):
        download(pin("org/x", tmp_path))
    with pytest.raises(
        BrokenModelError, match=r"org/x: model.safetensors.index.json is broken .*-2.safetensors is mis"
    ):
        preflight(config, *pin_all(config))


def test_a_tokenizer_that_cannot_be_read_is_broken_on_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    """It was a wrong input, which may be mended at any time: the poll announced it again each hour."""
    text = "merge_method: ties\nbase_model: org/base\nmodels: [{model: org/x}]"
    config = Recipe.load(write(tmp_path, {"r.yaml": text}) / "r.yaml")
    model = write_llama(tmp_path / "m", hidden=64, layers=1)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.commit("org/base", files)
    commit = hub.commit("org/x", {**files, "tokenizer.json": "{"})
    with pytest.raises(BrokenModelError, match=r"org/x: tokenizer.json is broken on the Hub itself") as caught:
        preflight(config, *pin_all(config))
    assert caught.value.commit == commit


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_broken_on_the_hub(
    hub: LocalHub, home: Path, tmp_path: Path, value: float
) -> None:
    def spoilt(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, value) if "layers.0.mlp.up_proj" in name else tensor

    model = write_llama(tmp_path / "m", hidden=64, layers=1)
    hub.commit("org/base", model)
    hub.commit("org/fine", write_expert(model, tmp_path / "fine", seed=1))
    commit = hub.commit("org/x", rewrite(tmp_path / "fine", tmp_path / "x", spoilt))
    recipe = parse(
        {"merge_method": "ties", "base_model": "org/base", "models": [{"model": "org/fine"}, {"model": "org/x"}]}
    )
    base, experts = pipeline.fetch(recipe)
    with pytest.raises(BrokenModelError, match=r"org/x is broken on the Hub itself, .*: it has NaN") as caught:
        look(InspectionInput(base, tuple(experts), InspectionSettings(stops=True)))
    assert caught.value.commit == commit
    with pytest.raises(BrokenModelError, match=r"up_proj.weight' has \d+ values that are NaN or Inf; name") as caught:
        pipeline.merge(recipe, base, experts)
    assert caught.value.commit == commit


def test_a_preflight_reads_the_headers_of_each_model_once(hub: LocalHub, tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: org/base\nmodels: [{model: org/x}, {model: org/y}]"
    config = Recipe.load(write(tmp_path, {"r.yaml": text}) / "r.yaml")
    model = write_llama(tmp_path / "m", hidden=64, layers=1)
    for name in ("base", "x", "y"):
        hub.commit(f"org/{name}", {path.name: path.read_bytes() for path in model.iterdir()} | {"README.md": name})
    preflight(config, *pin_all(config))
    asked = [request.path for request in hub.log if request.range and "/resolve/" in request.path]
    assert len(asked) == len(set(asked)) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not readable as JSON"),
        ('{"peft_type": "IA3"}', "it puts Linear"),
        ('{"peft_type": "LORA", "r": -1}', "r` should be a positive integer"),
    ],
)
def test_an_adapter_whose_config_cannot_be_used_waits_for_another_commit(
    hub: LocalHub, tmp_path: Path, text: str, expected: str
) -> None:
    recipe = "merge_method: ties\nbase_model: org/base\nmodels: [{model: org/x}]"
    config = Recipe.load(write(tmp_path, {"r.yaml": recipe}) / "r.yaml")
    model = write_llama(tmp_path / "m", hidden=64, layers=1)
    hub.commit("org/base", {path.name: path.read_bytes() for path in model.iterdir()})
    hub.commit("org/x", {"adapter_config.json": text, "adapter_model.safetensors": WEIGHTS})
    with pytest.raises(BrokenModelError, match=rf"org/x.* is unusable on the Hub .*{expected}"):
        preflight(config, *pin_all(config))


# Local folders


def test_local_digest_is_that_of_names_sizes_and_contents(home: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {**MODEL, store.MANIFEST: "{}"})
    files = []
    for name in sorted(NEEDED):
        data = (folder / name).read_bytes()
        files.append([name, len(data), hashlib.sha256(data).hexdigest()])
    expected = hashlib.sha256(json.dumps(files, separators=(",", ":")).encode()).hexdigest()
    pinned = resolve("./m", tmp_path)
    assert pinned == Pinned("./m", str(folder), f"sha256:{expected}", SIZE)
    assert pinned.is_local
    shutil.copytree(folder, tmp_path / "copy")
    assert resolve("./copy", tmp_path).commit == pinned.commit
    write(folder, {"README.md": "changed", store.MANIFEST: "{...}"})
    assert fetch(pinned) == folder


def test_a_named_chat_template_counts_as_content_of_a_local_folder(home: Path, tmp_path: Path) -> None:
    """A change of it alone was no release, though the merged model has a copy of it."""
    commits = list[str]()
    for name in ("tool_use.jinja", "rag.jinja", "notes.txt"):
        write(tmp_path / "m", {**NEEDED, f"additional_chat_templates/{name}": "{{ tools }}"})
        commits.append(resolve("./m", tmp_path).commit)
    assert commits[0] != commits[1] == commits[2]


def test_local_change_after_pinning_is_an_error(home: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", NEEDED)
    pinned = resolve("./m", tmp_path)
    write(folder, {"model.safetensors": WEIGHTS[:-1] + b"\x01"})
    with pytest.raises(LewisError, match="changed while running") as caught:
        fetch(pinned)
    assert not isinstance(caught.value, InputError)
    shutil.rmtree(folder)
    with pytest.raises(LewisError, match="changed while running"):
        fetch(pinned)


@pytest.mark.usefixtures("remembers_small_files")
def test_file_is_hashed_again_only_when_it_changed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    folder = write(tmp_path / "m", NEEDED)
    time.sleep(0.2)
    first = resolve("./m", tmp_path)
    assert sorted(hashed) == sorted(NEEDED)
    hashed.clear()
    assert resolve("./m", tmp_path) == first
    assert hashed == []
    stat = (folder / "model.safetensors").stat()
    write(folder, {"model.safetensors": WEIGHTS[:-1] + b"\x01"})
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync -t or tar do
    assert resolve("./m", tmp_path).commit != first.commit
    assert hashed == ["model.safetensors"]


def test_folder_beside_the_recipe_comes_before_the_working_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, work = tmp_path / "recipes", tmp_path / "work"
    write(recipes / "both", NEEDED)
    write(work / "both", NEEDED)
    write(work / "org/here", NEEDED)
    write(tmp_path / "user/m", NEEDED)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert resolve("both", recipes).source == str(recipes / "both")
    assert resolve("./org/here", recipes).source == str(work / "org/here")
    assert resolve("org/here", recipes).source == str(work / "org/here"), "a folder that exists is local"
    assert resolve("~/m", recipes).source == str(tmp_path / "user/m")
    with pytest.raises(InputError, match=f"looked at {recipes}/none and {work}/none"):
        resolve("./none", recipes)


@pytest.mark.parametrize(
    "ref", ["", "a/b/c", "../x", "bare", "org/x@", "org/na me", "org/x.git", "~nobody9/x", "./m/config.json"]
)
def test_malformed_references(home: Path, tmp_path: Path, ref: str) -> None:
    write(tmp_path / "m", NEEDED)
    with pytest.raises(InputError, match="expected 'org/name', 'org/name@revision' or a local folder"):
        resolve(ref, tmp_path)


def test_folders_without_usable_weights(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "pickled", {"config.json": "{}", "model.pt": b"x"})
    write(tmp_path / "broken", {"config.json": "{}"})
    (tmp_path / "broken/model.safetensors").symlink_to("gone.safetensors")
    for name, message in (("empty", r"no \*.safetensors"), ("pickled", "pickled weights"), ("broken", "cannot read")):
        with pytest.raises(InputError, match=message):
            resolve(f"./{name}", tmp_path)


# Datasets


def test_dataset_is_pinned_and_loads(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    first = hub.commit("org/data", {"train.jsonl": '{"text": "one"}\n'}, repo_type="dataset", tag="v1")
    second = hub.commit("org/data", {"train.jsonl": '{"text": "two"}\n'}, repo_type="dataset")
    assert resolve_dataset("org/data", None) == second
    assert resolve_dataset("org/data", "v1") == first
    with pytest.raises(InputError, match="dataset org/none: no such repo"):
        resolve_dataset("org/none", None)
    with pytest.raises(InputError, match=r"dataset org/data@v2: .*no such revision"):
        resolve_dataset("org/data", "v2")
    with pytest.raises(InputError, match="neither a Hub repo's name"):
        resolve_dataset("data", None)
    hub.commit("org/gated", {"train.jsonl": "{}"}, repo_type="dataset")
    hub.gate("org/gated", repo_type="dataset")
    with pytest.raises(InputError, match="dataset org/gated: gated; accept its conditions"):
        resolve_dataset("org/gated", None)
    code = """
import sys, datasets
for repo, sha in (("org/data", sys.argv[1]), ("org/rows", sys.argv[2])):
    print(datasets.load_dataset(repo, revision=sha, split="train")["text"][:])
"""
    (tmp_path / "data").mkdir()
    pandas.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    third = hub.commit("org/rows", tmp_path / "data", repo_type="dataset")
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code, first, third], env=environment, capture_output=True, text=True)
    assert done.stdout == "['one']\n['a', 'b']\n", done.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_dataset("org/data", first) == first
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        resolve_dataset("org/data", None)


def test_the_files_of_a_dataset_are_not_those_of_the_folder_that_a_run_is_started_in(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("org/data", {"rows.jsonl": "{}", "more.jsonl": "{}"}, repo_type="dataset")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").mkdir()
    (tmp_path / "more.jsonl").touch()
    spec = CalibrationSet(dataset="org/data", data_files=("rows.jsonl", "more.jsonl"), text="{text}")
    assert origin("lewis.calibrations.sums", spec, tmp_path) == [commit]


# Which errors heal


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("x", response=httpx2.Response(status, request=httpx2.Request("GET", "http://h/")))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TransientError("busy"), True),
        (InputError("wrong"), False),
        (LewisError("failed"), False),
        (wrapped(InputError("gated"), answered(503)), False),
        (wrapped(LewisError("disk full"), ConnectionError()), False),
        *[(answered(status), True) for status in (408, 429, 500, 502, 503, 504)],
        *[(answered(status), False) for status in (400, 401, 403, 404, 409, 422)],
        (wrapped(FileNotFoundError("not in the cache"), answered(503)), True),
        (wrapped(FileNotFoundError("not in the cache"), answered(404)), False),
        (ConnectionResetError(), True),
        (httpx2.ReadTimeout("slow"), True),
        (httpx2.RemoteProtocolError("closed"), True),
        (OSError("Consistency check failed: file should be of size 5 but has size 3"), True),
        (OfflineModeIsEnabled("offline"), False),
        (wrapped(ConnectionError("Couldn't reach 'x'"), OfflineModeIsEnabled("offline")), False),
        (FileNotFoundError("gone"), False),
        (ValueError("bug"), False),
        (TimeoutError("a task that ran too long"), False),
    ],
)
def test_retryable(error: Exception, expected: bool) -> None:
    assert retryable(error) is expected


# Quantised models


def test_what_cannot_be_read_is_told_before_weights_are_downloaded(hub: LocalHub, home: Path, tmp_path: Path) -> None:
    hub.commit("org/q", {**NEEDED, "config.json": '{"quantization_config": {"quant_method": "hqq"}}'})
    pinned = resolve("org/q", tmp_path)
    configs = fetch(pinned, weights=False)
    with pytest.raises(InputError, match="org/q: weights quantised with hqq are not read; use the unquantised model"):
        tensor_headers(pinned)
    assert not (configs / "model.safetensors").exists()


def test_the_only_gguf_of_a_repo_is_downloaded_and_read(hub: LocalHub, home: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", hidden=64, layers=1)
    file = write_gguf(model, tmp_path / "m.gguf").read_bytes()
    hub.commit("org/g", {"m.gguf": file, "README.md": "# hi"})
    pinned = resolve("org/g", tmp_path)
    assert pinned.is_local and "model.layers.0.mlp.up_proj.weight" in tensor_headers(pinned)
    hub.commit("org/g", {"m-Q4.gguf": file, "m-Q8.gguf": file})
    with pytest.raises(InputError, match=r"org/g: 2 GGUF files \(m-Q4.gguf, m-Q8.gguf\) and no safetensors; give the"):
        resolve("org/g", tmp_path)

"""Publishing to a real Hub server on loopback: what it pushes, what it leaves alone, what it refuses."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from lewis import store
from lewis.errors import InputError, LewisError, TransientError
from lewis.models.hub import client
from lewis.recipe.recipe import Recipe
from lewis.registry import publishing
from lewis.reports import card
from tests.support.local_hub import LocalHub
from tests.support.writable_hub import writable_hub

FILES = {"config.json": "{}", "model.safetensors": "weights " * 100, "README.md": "---\ntags: [merge]\n---\n# New\n"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with writable_hub(tmp_path / "server", tmp_path / "home", monkeypatch) as hub:
        yield hub


def merged(tmp_path: Path, digest: str = "a", **changes: str) -> Path:
    folder = tmp_path / digest
    with store.publish(folder, {"digest": digest * 64}) as scratch:
        for name, content in {**FILES, **changes}.items():
            (scratch / name).write_text(content)
    return folder


def tree(hub: LocalHub, repo: str = "org/new") -> dict[str, bytes]:
    held = hub.repos["model", repo]
    return {name: blob.path.read_bytes() for name, blob in held.commits[held.branches["main"]].items()}


def test_the_folder_is_pushed_once_to_a_private_repo(hub: LocalHub, tmp_path: Path) -> None:
    folder = merged(tmp_path)
    made = publishing.publish(folder, "org/new", True, "version 1")
    assert made.new and made.url == f"{hub.url}/org/new/tree/{made.commit}"
    assert hub.repos["model", "org/new"].private
    assert tree(hub) == {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = len(hub.log)
    again = publishing.publish(folder, "org/new", True, "version 1")
    assert again.commit == made.commit and not again.new
    assert not any("lfs" in request.path for request in hub.log[asked:]), "weights that are there are not hashed again"


def test_a_busy_hub_is_waited_for_as_long_as_it_asks(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that had scored for hours ended as Unpublished, after some attempts in seconds."""
    slept = list[float]()
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=slept.append))
    busy = {"status": 429, "headers": {"Retry-After": "70"}}
    hub.faults += [{**busy, "path": path} for path in ("api/models/org/new$", "repos/create", "/commit/")]
    folder = merged(tmp_path)
    assert publishing.publish(folder, "org/new", True, "version 1").new
    assert slept == [70.0] * 3 and tree(hub) == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_without_xet_gets_the_weights_by_lfs(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was told as a Hub that is unreachable, after five attempts."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    caplog.set_level("INFO")
    folder = merged(tmp_path)
    made = publishing.publish(folder, "org/new", True, "version 1")
    assert made.new and tree(hub) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum("xet-write-token" in request.path for request in hub.log) == 1
    assert f"{hub.url} has no Xet storage; uploading by LFS" in caplog.messages
    assert constants.HF_HUB_DISABLE_XET is False


def test_the_next_version_replaces_the_model_and_leaves_the_owners_files(hub: LocalHub, tmp_path: Path) -> None:
    """The chat template of a version before would have been that of the new weights."""
    shards = {"model-00001-of-00002.safetensors": "x", "model.safetensors.index.json": "{}"}
    publishing.publish(merged(tmp_path, **shards, **{"chat_template.jinja": "old"}), "org/new", True, "version 1")
    owners = tree(hub) | {"logo.txt": b"owner's"}
    hub.commit("org/new", owners)
    folder = merged(tmp_path, "b", **{"model.safetensors": "other weights"})
    assert publishing.publish(folder, "org/new", True, "version 2").new
    assert tree(hub) == {path.name: path.read_bytes() for path in folder.iterdir()} | {"logo.txt": b"owner's"}


def test_weights_that_somebody_removed_from_the_repo_are_pushed_again(hub: LocalHub, tmp_path: Path) -> None:
    folder = merged(tmp_path)
    publishing.publish(folder, "org/new", True, "version 1")
    hub.commit("org/new", {name: data for name, data in tree(hub).items() if name != "model.safetensors"})
    assert publishing.publish(folder, "org/new", True, "version 1").new
    assert tree(hub) == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_scores_for_the_hub_are_published_and_those_of_an_earlier_version_removed(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FILES, "README.md")  # it is written next to what the merge wrote
    first, second = merged(tmp_path), merged(tmp_path, "b")
    card.write(first, "# card", eval_results="- value: 0.5\n")
    publishing.publish(first, "org/new", True, "version 1")
    assert tree(hub)[".eval_results/lewis.yaml"] == b"- value: 0.5\n"
    card.write(second, "# card")
    publishing.publish(second, "org/new", True, "version 2")
    assert ".eval_results/lewis.yaml" not in tree(hub) and tree(hub)["README.md"] == b"# card"


def test_a_push_in_between_is_not_overwritten(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publishing.publish(merged(tmp_path), "org/new", True, "version 1")
    look = publishing._look

    def push_after(repo: str, private: bool) -> object:
        found = look(repo, private)
        hub.commit("org/new", {"theirs.txt": "x"})
        return found

    monkeypatch.setattr(publishing, "_look", push_after)
    with pytest.raises(LewisError, match=r"somebody pushed to org/new .*\(412\).*run again") as refused:
        publishing.publish(merged(tmp_path, "b"), "org/new", True, "version 2")
    assert not isinstance(refused.value, TransientError)
    assert tree(hub) == {"theirs.txt": b"x"}


@pytest.mark.parametrize(
    ("token", "repo", "private", "message"),
    [
        ("", "org/new", True, "HF_TOKEN is needed to push to org/new"),
        ("hf_x", "org/new", True, r"refuses HF_TOKEN as invalid or expired \(401\)"),
        ("hf_bob", "org/new", True, r"HF_TOKEN may not write to org/new \(403\)"),
        ("hf_bob", "org/open", False, r"HF_TOKEN may not write to org/open \(403\)"),
        ("hf_alice", "org/open", True, "publish.private: org/open is public"),
        ("hf_alice", "org/other", False, "org/other holds a model that LEWIS did not publish"),
    ],
)
def test_refusals_say_what_to_do_and_hide_the_token(
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    token: str,
    repo: str,
    private: bool,
    message: str,
) -> None:
    caplog.set_level("DEBUG")
    hub.commit("org/open", {"notes.txt": "x"})
    hub.commit("org/other", {"model.safetensors": "x"})
    monkeypatch.setenv("HF_TOKEN", token)
    before = {name: dict(held.branches) for name, held in hub.repos.items()}
    with pytest.raises(InputError, match=message) as refused:
        publishing.publish(merged(tmp_path), repo, private, "version 1")
    assert {name: dict(held.branches) for name, held in hub.repos.items()} == before
    assert not token or token not in f"{refused.value}{refused.value.__cause__}{caplog.text}"


def test_a_commit_under_way_is_worth_a_retry(hub: LocalHub, tmp_path: Path) -> None:
    for status, message in ((409, r"under way \(409\)"), (503, "answered 503")):
        hub.faults.append({"path": "/commit/", "method": "POST", "status": status, "times": 9})
        with pytest.raises(TransientError, match=message):
            publishing.publish(merged(tmp_path), "org/new", True, "version 1")
        hub.faults.clear()
    assert publishing.publish(merged(tmp_path), "org/new", True, "version 1").new


def test_an_adapter_takes_the_place_of_a_full_model_and_back(hub: LocalHub, tmp_path: Path) -> None:
    publishing.publish(merged(tmp_path), "org/new", True, "a full model")
    adapter = tmp_path / "b"
    with store.publish(adapter, {"digest": "b" * 64}) as scratch:
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            (scratch / name).write_text(name)
    for folder, title in ((adapter, "an adapter"), (merged(tmp_path, "c"), "a full model again")):
        publishing.publish(folder, "org/new", True, title)
        assert tree(hub) == {path.name: path.read_bytes() for path in folder.iterdir()}  # no config of both kinds


def test_an_adapter_on_a_folder_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for base, adapter in (("org/base", True), ("base", False), (None, False)):
        publishing.check_base(base, tmp_path, adapter=adapter)
    with pytest.raises(InputError, match=r"publish: an adapter names its base, and nobody else has the folder .*base"):
        publishing.check_base("base", tmp_path, adapter=True)


def test_a_damaged_folder_is_not_published(hub: LocalHub, tmp_path: Path) -> None:
    folder = merged(tmp_path)
    (folder / "model.safetensors").write_text("cut")
    with pytest.raises(LewisError, match="expected a whole merged checkpoint"):
        publishing.publish(folder, "org/new", True, "version 1")
    assert not hub.repos


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("publish: {repo: org/new}", "publish: what is published is the champion .*add a register block"),
        ("publish: {repo: new}\nregister: {name: x}", "publish.repo: "),
        ("publish: {rep: org/new}\nregister: {name: x}", "publish.rep: unknown key; did you mean 'repo'"),
    ],
)
def test_a_wrong_block_is_named(block: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.parse(f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\n{block}", root=tmp_path)


def test_a_branch_follows_the_champion_also_back_and_main_stays(hub: LocalHub, tmp_path: Path) -> None:
    first, second = merged(tmp_path), merged(tmp_path, "b", **{"model.safetensors": "others " * 100})
    publishing.publish(first, "org/new", True, "version 1")
    publishing.publish(second, "org/new", True, "version 2")
    kept = {"README.md": b"# Card"}
    moved = [publishing.publish(each, "org/new", True, "v", "champion", kept) for each in (first, first, second, first)]
    assert [each.new for each in moved] == [True, False, True, True]
    held = hub.repos["model", "org/new"]
    there = {name: blob.path.read_bytes() for name, blob in held.commits[held.branches["champion"]].items()}
    assert there["README.md"] == b"# Card" and there["model.safetensors"] == (first / "model.safetensors").read_bytes()
    assert tree(hub)["model.safetensors"] == (second / "model.safetensors").read_bytes()
    uploads = [request.path for request in hub.log if request.path.startswith("/lfs") or "/blobs/" in request.path]
    assert len(uploads) == len(set(uploads)), "weights that the repo has are not uploaded again"

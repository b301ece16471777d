"""The local Hub answers the real client as the real Hub does: what is published can be read back."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.support.local_hub import LocalHub, Webhook


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub(tmp_path / "hub") as started:
        yield started


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_alice")


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    return folder


def test_a_published_folder_can_be_read_back(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert api.create_repo("org/new").repo_id == "org/new"
    api.create_repo("org/new", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("org/new")
    commit = api.upload_folder(repo_id="org/new", folder_path=folder)
    assert api.model_info("org/new").sha == commit.oid
    there = Path(api.snapshot_download("org/new", cache_dir=tmp_path / "cache"))
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert api.verify_repo_checksums("org/new", cache_dir=tmp_path / "cache").mismatches == []
    again = api.upload_folder(repo_id="org/new", folder_path=folder)
    assert again.oid == commit.oid  # nothing changed: no commit
    api.create_tag("org/new", tag="v1")
    api.create_branch("org/new", branch="dev")
    refs = api.list_repo_refs("org/new")
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == dict.fromkeys(
        ("main", "dev", "v1"), commit.oid
    )


def test_a_commit_on_an_old_parent_is_refused(api: HfApi) -> None:
    api.create_repo("org/new")
    first = api.model_info("org/new").sha

    def add(name: str, parent: str | None) -> str:
        operations = [CommitOperationAdd(name, name.encode())]
        return api.create_commit("org/new", operations, commit_message="x", parent_commit=parent).oid

    second = add("a.txt", first)
    with pytest.raises(HfHubHTTPError) as refused:
        add("b.txt", first)
    assert refused.value.response.status_code == 412
    add("b.txt", second)
    assert api.list_repo_files("org/new") == ["a.txt", "b.txt"]
    api.create_commit("org/new", [CommitOperationDelete("a.txt")], commit_message="x")
    assert api.list_repo_files("org/new") == ["b.txt"]


def test_who_may_not_write_is_told_so(hub: LocalHub, api: HfApi) -> None:
    api.create_repo("org/new")
    api.create_repo("org/secret", private=True)
    operations = [CommitOperationAdd("a.txt", b"a")]
    for token, repo, status in (
        ("hf_bob", "org/new", 403),
        ("hf_bob", "org/secret", 404),
        ("hf_x", "org/new", 401),
        (False, "org/new", 401),
        ("hf_alice", "org/none", 404),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            HfApi(endpoint=hub.url, token=token).create_commit(repo, operations, commit_message="x")
        assert refused.value.response.status_code == status
        assert isinstance(refused.value, RepositoryNotFoundError) == (status == 404)


def test_a_push_is_told_to_the_webhooks(hub: LocalHub, api: HfApi) -> None:
    with LocalHub(hub.root / "other") as listener:  # any server will do: it answers 404, and that is recorded
        hub.webhooks.append(Webhook(f"{listener.url}/x", "s"))
        api.create_repo("org/new")
        old = api.model_info("org/new").sha
        new = api.create_commit("org/new", [CommitOperationAdd("a.txt", b"a")], commit_message="x").oid
        deadline = time.monotonic() + 10
        while len(hub.deliveries) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    told = {each.payload["event"]["scope"]: each for each in hub.deliveries}
    assert [(each.status, each.attempts) for each in hub.deliveries] == [(404, 1)] * 2
    assert told["repo"].payload["event"] == {"action": "create", "scope": "repo"}
    content = told["repo.content"].payload
    assert content["updatedRefs"] == [{"ref": "refs/heads/main", "oldSha": old, "newSha": new}]
    assert (content["repo"]["name"], content["repo"]["headSha"], content["webhook"]["version"]) == ("org/new", new, 3)

"""Publish a merged model: its folder becomes one commit of a repo on the Hub.

The commit names the commit that it replaces (`parent_commit`), so it never overwrites what somebody pushed meanwhile.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token
from huggingface_hub.errors import HfHubHTTPError

from lewis import store
from lewis.errors import InputError, LewisError, TransientError
from lewis.models.hub import client
from lewis.models.hub.pin import find_folder
from lewis.redact import redacted
from lewis.reports.card import EVAL_RESULTS, HEAT_MAP
from lewis.store.manifest import DamagedError
from lewis.store.manifest import check as check_folder

logger = logging.getLogger(__name__)

# What the client raises if the Hub does not know the address that gives the token for Xet.
_NO_XET = re.compile(r"\b404\b.*/xet-write-token/")

WEIGHTS = re.compile(r"\.(safetensors|bin|pt|gguf)$|\.index\.json$")
# Removed from the repo if the new model lacks them, as is what the manifest there lists: they belong to an earlier one.
KINDS = ("config.json", "adapter_config.json", EVAL_RESULTS, HEAT_MAP)


@dataclass(frozen=True)
class Published:
    """Where a merged model is on the Hub.

    Attributes:
        commit: 40 hex digits.
        url: of the commit's files.
        new: whether this call made the commit; if not, the repo had everything already.
    """

    repo: str
    commit: str
    url: str
    new: bool


@dataclass(frozen=True)
class _Remote:
    head: str
    files: frozenset[str]
    manifest: dict[str, Any]  # of the merged model there; empty if there is none

    @property
    def ours(self) -> set[str]:
        """The files that LEWIS wrote there."""
        listed = self.manifest.get("files")
        return {*(listed if isinstance(listed, dict) else ()), *KINDS} | set(filter(WEIGHTS.search, self.files))


def check(repo: str, private: bool) -> None:
    """Check, before anything is pushed, that a merged model can be published to a repo.

    Args:
        repo: `org/name`; it need not exist.
        private: whether the repo must be private.

    Raises:
        InputError: if there is no valid token, or the repo is public or holds a model that LEWIS did not publish.
        TransientError: if the Hub is busy or unreachable.
    """
    _look(repo, private)


def check_base(base: str | None, root: Path, *, adapter: bool) -> None:
    """Refuse to publish an adapter whose base nobody else can load.

    Args:
        base: reference of the base in the recipe.
        root: the folder that a relative path starts from.
        adapter: whether an adapter is published; a full model needs no base.

    Raises:
        InputError: if it is an adapter whose base is a local folder.
    """
    if adapter and base and (folder := find_folder(base, root)):
        raise InputError(
            f"publish: an adapter names its base, and nobody else has the folder {folder}; use a model of the Hub as "
            "base_model, or write the full model (output.kind: full)"
        )


def publish(
    folder: Path, repo: str, private: bool, title: str, branch: str = "main", card: Mapping[str, bytes] | None = None
) -> Published:
    """Push a merged folder, unless the repo has it already. What an earlier merge wrote and this one lacks is removed.

    Files that others added stay, except weights.

    Args:
        folder: as `store.publish` wrote it, with its model card.
        repo: `org/name`; created if it does not exist.
        private: whether a new repo is private. If it is true, an existing public repo is refused. An existing private
            repo stays private.
        title: of the commit.
        branch: made from `main` if it does not exist.
        card: file name -> content, of the model card and its picture; None: those in the folder.

    Raises:
        InputError: as `check`, or if the token has no right to write to the repo.
        LewisError: if the folder is damaged, or somebody pushed to the repo meanwhile.
        TransientError: if the Hub is busy or unreachable, or another commit is under way.
    """
    try:
        manifest = check_folder(folder)
    except DamagedError as error:
        raise LewisError(f"{folder}: expected a whole merged checkpoint: {error}; merge again") from error
    with store.SharedLock(f"publish-{repo}"):
        there = _look(repo, private)
        if there is None:
            with _errors(repo):
                client.repeated(repo, lambda: client.api().create_repo(repo, private=private, exist_ok=True))
            there = _look(repo, private)
        if branch != "main":
            with _errors(repo):
                client.repeated(repo, lambda: client.api().create_branch(repo, branch=branch, exist_ok=True))
            there = _look(repo, private, branch)
        assert there is not None
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        # Weights that the repo has are left out: the client would hash gigabytes to find that out.
        known = there.files if there.manifest.get("digest") == manifest["digest"] else ()
        wanted = [name for name in names if name not in known or not WEIGHTS.search(name)]
        given = card or {}
        stale = sorted((there.files & there.ours) - {*names, *given})
        added = [CommitOperationAdd(name, str(folder / name)) for name in wanted if name not in given]
        added += [CommitOperationAdd(name, content) for name, content in given.items()]
        removed = [CommitOperationDelete(name) for name in stale]
        with _errors(repo):
            made = _commit(repo, [*added, *removed], title, there.head, branch)
    new = made.oid != there.head
    logger.info("%s %s", redacted(made.commit_url), "is new" if new else "has this model already")
    return Published(repo, made.oid, f"{redacted(client.endpoint())}/{repo}/tree/{made.oid}", new)


def _look(repo: str, private: bool, branch: str = "main") -> _Remote | None:
    """Return the head commit, the files and the manifest of a branch of a repo; None if there is no such repo."""
    if client.offline():
        raise InputError("publish: HF_HUB_OFFLINE is set; unset it, or leave the publish block out")
    if not get_token():
        raise InputError(f"publish: HF_TOKEN is needed to push to {repo}; set one that may write")
    with _errors(repo):
        try:
            revision = None if branch == "main" else branch
            info = client.repeated(repo, lambda: client.api().model_info(repo, revision=revision))
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                return None
            raise
        if private and not info.private:
            raise InputError(f"publish.private: {repo} is public; make it private, or write private: false")
        files = frozenset(file.rfilename for file in info.siblings or ())
        manifest: dict[str, Any] = {}
        if store.MANIFEST in files:
            download = partial(client.api().hf_hub_download, repo, store.MANIFEST, cache_dir=client.cache_folder())
            place = client.repeated(repo, lambda: download(revision=info.sha))
            manifest = store.read_json(Path(place)) or {}
    if manifest.get("digest") is None and any(WEIGHTS.search(name) for name in files):
        raise InputError(f"publish.repo: {repo} holds a model that LEWIS did not publish; choose another repo")
    return _Remote(str(info.sha), files, manifest)


def _commit(
    repo: str, operations: list[CommitOperationAdd | CommitOperationDelete], title: str, parent: str, branch: str
) -> Any:
    """Make a commit on the Hub; where the Hub lacks Xet, its storage for new files, upload by the LFS protocol."""

    create = partial(client.api().create_commit, repo, operations, commit_message=title)

    def make() -> Any:
        # After a reset of the connection the commit may exist; a repetition would take it for somebody else's push.
        return client.repeated(repo, lambda: create(parent_commit=parent, revision=branch), after_reset=False)

    try:
        return make()
    except OSError as error:
        if not _NO_XET.search(str(error)):
            raise
    logger.info("%s has no Xet storage; uploading by LFS", redacted(client.endpoint()))
    with client.without_xet():
        return make()


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    with client.errors(f"publish.repo: {repo}"):
        try:
            yield
        except HfHubHTTPError as error:
            if refusal := _refusal(repo, error.response.status_code):
                raise refusal from error
            raise


def _refusal(repo: str, status: int) -> LewisError | None:
    """Return the error for an HTTP status with a meaning of its own when a repo is written; None for all others."""
    match status:
        case 401:
            return InputError("publish: the Hub refuses HF_TOKEN as invalid or expired (401); make one that may write")
        case 403:
            return InputError(f"publish.repo: HF_TOKEN may not write to {repo} (403); give it write permission there")
        case 409:
            return TransientError(f"publish.repo: another commit to {repo} is under way (409); try again later")
        case 412:
            return LewisError(
                f"publish.repo: somebody pushed to {repo} while this model was uploaded (412), which stays as it is; "
                "look at what it was, then run again"
            )
    return None

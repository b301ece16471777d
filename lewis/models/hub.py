"""Where models come from: a Hub repo or a local folder, pinned to its exact content, then downloaded and verified.

The Hub's client follows a moving branch, may return an older snapshot when the Hub is down, and does not check what it
downloaded. Here a reference is first resolved to a commit (or it is an error), and every byte is compared with the
checksums of that commit. The client is loaded when the Hub is asked, which a merge of folders does not do.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants

from lewis import store
from lewis.errors import InputError, TransientError
from lewis.models.checkpoint import is_buffer
from lewis.models.pin import (
    FORMS,
    Headers,
    Pinned,
    check_unchanged,
    check_weights,
    file_headers,
    find_folder,
    needed,
    pin_folder,
)
from lewis.store import kinds
from lewis.store.checksums import remembered_sha256

__all__ = ["Headers", "Pinned", "fetch", "is_present", "resolve", "resolve_dataset", "tensor_headers"]

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_told: dict[str, str] = {}  # reference -> commit, as last logged

Listing = dict[str, tuple[int, str]]  # name -> size in bytes, SHA-256 (64 digits) or git blob id (40 digits)


def resolve(ref: str, root: Path) -> Pinned:
    """Pin a model reference to its content, without downloading weights.

    Args:
        ref: `org/name`, `org/name@revision` (branch, tag or commit) or a folder. Anything that begins with `.`, `/` or
            `~`, or that exists as a folder, is local.
        root: where a relative folder is looked for first (the recipe's place); then comes the working directory.

    Raises:
        InputError: no such folder, repo or revision, no access to it, or no safetensors weights in it.
        TransientError: the Hub is busy or unreachable.
    """
    folder = find_folder(ref, root)
    if folder is not None:
        return pin_folder(ref, folder)
    source, at, revision = ref.partition("@")
    _check_repo_id(ref, source)
    if at and not revision:
        raise InputError(f"{ref}: nothing after '@'; {FORMS}")
    if offline():
        commit, files = revision, _cached_listing(ref, source, revision)
    else:
        with errors(ref):
            info = api().model_info(source, revision=revision or None, files_metadata=True)
            if info.gated:
                api().auth_check(source)
        commit, files = str(info.sha), _remember_listing(source, info)
    check_weights(ref, files)
    pinned = Pinned(ref, source, commit, sum(files[name][0] for name in needed(files)))
    if _told.get(ref) != commit:  # who waits for a release asks every few seconds
        _told[ref] = commit
        logger.info("%s is commit %s (%.2f GB)", ref, commit, pinned.size / 1e9)
    return pinned


def resolve_dataset(repo: str, revision: str | None) -> str:
    """The commit (40 hex digits) of a dataset repo's revision, by default of its main branch.

    Raises:
        InputError: no such dataset or revision, or no access to it.
        TransientError: the Hub is busy or unreachable.
    """
    ref = f"dataset {repo}@{revision}" if revision else f"dataset {repo}"
    _check_repo_id(ref, repo)
    if offline():
        if not _COMMIT.fullmatch(revision or ""):
            raise InputError(f"{ref}: HF_HUB_OFFLINE is set: expected a full commit (40 hex digits) as the revision")
        return str(revision)
    with errors(ref):
        info = api().dataset_info(repo, revision=revision)
        if info.gated:
            api().auth_check(repo, repo_type="dataset")
    return str(info.sha)


def fetch(pinned: Pinned, *, weights: bool = True) -> Path:
    """The folder that holds a pinned model, every file of it equal to its checksum.

    A file already checked is not read again until it changes. A damaged download is removed, so that a retry heals it.

    Args:
        weights: False fetches only configs and tokenizer. With weights comes the model card, which tells the licence.

    Raises:
        TransientError: the transfer broke, files are missing or damaged, the Hub is busy.
        InputError: the Hub refuses access, or HF_HUB_OFFLINE is set and files are missing.
        LewisError: a local folder changed since it was pinned, or the disk is full.
    """
    if pinned.is_local:
        return check_unchanged(pinned)
    files = _listing(pinned)
    names = [name for name in needed(files) if weights or not name.endswith(".safetensors")]
    folder = _snapshot(pinned.source, pinned.commit)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and offline():
        raise InputError(f"{pinned.ref}: HF_HUB_OFFLINE is set, and {missing[0]} is not in the cache; unset it")
    if missing:
        size = sum(files[name][0] for name in missing)
        logger.info("%s: downloading %d files, %.2f GB", pinned.ref, len(missing), size / 1e9)
        with errors(pinned.ref):
            api().snapshot_download(
                pinned.source,
                revision=pinned.commit,
                cache_dir=cache_folder(),
                allow_patterns=[*(glob.escape(name) for name in names), *(["README.md"] if weights else [])],
            )
    damaged = [name for name in names if not _is_intact(folder / name, *files[name])]
    for name in damaged:
        _discard(folder / name)
    if damaged:
        raise TransientError(
            f"{pinned.ref}: {', '.join(damaged)}: missing, or not the checksum of the commit; try again"
        )
    return folder


def is_present(pinned: Pinned) -> bool:
    """Whether a fetch would download nothing."""
    if pinned.is_local:
        return True
    folder = _snapshot(pinned.source, pinned.commit)
    return all((folder / name).is_file() for name in needed(_listing(pinned)))


def tensor_headers(pinned: Pinned) -> Headers:
    """Name, dtype and shape of every stored weight; a Hub repo's are read without downloading the weights.

    Raises:
        InputError: a safetensors file is damaged.
        TransientError: the Hub is busy or unreachable.
    """
    folder = Path(pinned.source) if pinned.is_local else _snapshot(pinned.source, pinned.commit)
    listing = {} if pinned.is_local else _listing(pinned)
    names = [name for name in needed(listing or os.listdir(folder)) if name.endswith(".safetensors")]

    def read(name: str) -> Headers:
        path = folder / name
        if pinned.is_local or (path.is_file() and path.stat().st_size == listing[name][0]):
            return file_headers(path)
        with errors(pinned.ref):
            found = api().parse_safetensors_file_metadata(pinned.source, name, revision=pinned.commit)
        return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.tensors.items()}

    with ThreadPoolExecutor(8) as pool:
        found = {key: header for headers in pool.map(read, names) for key, header in headers.items()}
    return {key: header for key, header in found.items() if not is_buffer(key, header[1])}


def _check_repo_id(ref: str, source: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise InputError(f"{ref}: neither a Hub repo's name nor an existing folder; {FORMS}") from error
    if "/" not in source:
        raise InputError(f"{ref}: neither a Hub repo's name nor an existing folder; {FORMS}")


# The client reads the environment once, at import. It is read here at each call.


def endpoint() -> str:
    """The Hub's URL."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def cache_folder() -> Path:
    """Where the Hub's client keeps what it downloads."""
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("HF_HUB_CACHE") or (f"{home}/hub" if home else constants.HF_HUB_CACHE)
    return Path(cache).expanduser().absolute()


def offline() -> bool:
    """Whether the Hub may not be asked."""
    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def api() -> HfApi:
    """A client of the Hub of HF_ENDPOINT, with the user's token.

    Raises:
        InputError: if the token holds what no token has.
    """
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[!-~]*", get_token() or ""):
        # The HTTP library would quote the header, token and all, in its error.
        raise InputError("HF_TOKEN holds characters that no token has (a space, a line break?); copy it again")
    return HfApi(endpoint=endpoint())


def _snapshot(source: str, commit: str) -> Path:
    return cache_folder() / f"models--{source.replace('/', '--')}" / "snapshots" / commit


def _listing(pinned: Pinned) -> Listing:
    """The files of a pinned commit: as remembered, or asked of the Hub."""
    known = _remembered_listing(pinned.source, pinned.commit)
    if known is not None:
        return known
    if offline():
        return _cached_listing(pinned.ref, pinned.source, pinned.commit)
    with errors(pinned.ref):
        info = api().model_info(pinned.source, revision=pinned.commit, files_metadata=True)
    return _remember_listing(pinned.source, info)


def _listing_entry(source: str, commit: str) -> Path:
    return kinds.DIGESTS.path(f"{source.replace('/', '--')}@{commit}")


def _remembered_listing(source: str, commit: str) -> Listing | None:
    known = store.read_entry(_listing_entry(source, commit))
    return None if known is None else {name: (size, checksum) for name, (size, checksum) in known.items()}


def _remember_listing(source: str, info: Any) -> Listing:
    files = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings}
    outside = next((name for name in files if ".." in PurePosixPath(name).parts or name.startswith("/")), None)
    if outside:
        raise InputError(f"{source}: refused: its file {outside!r} would land outside its folder")
    store.write_json(_listing_entry(source, info.sha), files)
    return files


def _cached_listing(ref: str, source: str, revision: str) -> Listing:
    """The files of a snapshot in the cache, where each is a link to a blob that is named by its checksum."""
    folder = _snapshot(source, revision)
    if not _COMMIT.fullmatch(revision) or not folder.is_dir():
        raise InputError(
            f"{ref}: HF_HUB_OFFLINE is set: expected org/name@commit (40 hex digits) in {cache_folder()}; "
            "unset HF_HUB_OFFLINE, or download it first"
        )
    known = _remembered_listing(source, revision)
    if known is None:
        links = [path for path in folder.iterdir() if path.is_symlink() and path.is_file()]
        return {path.name: (path.stat().st_size, path.readlink().name) for path in links}
    missing = [name for name in needed(known) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{ref}: HF_HUB_OFFLINE is set, and {missing[0]} is not in the cache; unset it to download")
    return known


def _is_intact(path: Path, size: int, checksum: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    if len(checksum) == 64:
        return remembered_sha256(path) == checksum
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest() == checksum


def _discard(path: Path) -> None:
    """Remove a damaged file and its blob, or the client would link the same blob again."""
    blob = path.resolve()
    if blob.is_relative_to(cache_folder().resolve()):
        blob.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def errors(ref: str) -> Iterator[None]:
    """Tell what the client raises in the block in the user's terms, as `lewis.models.hub_errors.explain`."""
    from lewis.models.hub_errors import CLIENT_ERRORS, explain

    try:
        yield
    except InputError:
        raise
    except CLIENT_ERRORS as error:
        raise explain(ref, error, endpoint()) from error

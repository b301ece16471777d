"""Models of the Hub, and local folders: pin a reference to its exact content, then download and verify it.

The Hub's client follows a moving branch, may return an older snapshot when the Hub is down, and does not check what it
downloaded. Here a reference is first resolved to a commit, where a failure is an error, and every file is compared with
its checksum in that commit; the store keeps the checksums, since a commit never changes. The client is imported when
the Hub is first asked, so that a merge of local folders does not need it.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import InputError, TransientError
from lewis.models.broken import COMMIT, broken
from lewis.models.files.folder import ADAPTER, INDEX, SINGLE, check_weights, is_of_gguf, needed, weight_files
from lewis.models.files.safetensors_file import Headers, file_headers
from lewis.models.gguf import as_folder, headers, only
from lewis.models.hub.client import api, ask, cache_folder, check_repo_id, offline, resume_downloads, snapshot
from lewis.models.hub.pin import FORMS, Pinned, check_unchanged, find_folder, pin_folder
from lewis.models.names import is_buffer, unwrapped
from lewis.models.quantised.find import dequantised
from lewis.settings import size_text
from lewis.store import kinds
from lewis.store.folders import leads_out
from lewis.store.manifest import remembered_sha256
from lewis.threads import ContextPool

logger = logging.getLogger(__name__)

_Listing = dict[str, tuple[int, str]]  # name -> size in bytes, SHA-256 (64 digits) or git blob id (40 digits)
_logged: dict[str, str] = {}  # reference -> commit, as last logged


def resolve(ref: str, root: Path) -> Pinned:
    """Pin a model reference to its content, without downloading weights.

    Args:
        ref: `org/name`, `org/name@revision` (branch, tag or commit) or a folder. Anything that begins with `.`, `/` or
            `~`, or that exists as a folder or GGUF file, is local. A repo's only GGUF file is downloaded immediately.
        root: where a relative folder is looked for first (the recipe's folder); then comes the working directory.

    Raises:
        InputError: if there is no such folder, repo or revision, no access to it, or no safetensors weights in it.
        TransientError: if the Hub is busy or unreachable.
    """
    folder = find_folder(ref, root)
    if folder is not None:
        return pin_folder(ref, as_folder(ref, folder))
    source, at, revision = ref.partition("@")
    check_repo_id(ref, source)
    if at and not revision:
        raise InputError(f"{ref}: nothing after '@'; {FORMS}")
    if offline():
        commit, files = revision, _cached_listing(ref, source, revision)
    else:
        info = ask(ref, lambda: api().model_info(source, revision=revision or None, files_metadata=True))
        if info.gated:
            ask(ref, lambda: api().auth_check(source))
        commit, files = _commit(ref, info), remember_listing(source, info)
    check_weights(ref, files)
    pinned = Pinned(ref, source, commit, sum(files[name][0] for name in needed(files)))
    if found := [name for name in needed(files) if name.endswith(".gguf")]:
        only(ref, found)  # download it now: its config and tensors are known only from the file itself
        return pin_folder(ref, as_folder(ref, fetch(pinned)))
    if _logged.get(ref) != commit:  # log it once: waiting for a release asks every few seconds
        _logged[ref] = commit
        logger.info("%s is commit %s (%s)", ref, commit, size_text(pinned.size))
    return pinned


def resolve_dataset(repo: str, revision: str | None) -> str:
    """The commit (40 hex digits) of a dataset repo's revision, by default of its main branch.

    Raises:
        InputError: if there is no such dataset or revision, or no access to it.
        TransientError: if the Hub is busy or unreachable.
    """
    ref = f"dataset {repo}@{revision}" if revision else f"dataset {repo}"
    check_repo_id(ref, repo)
    if offline():
        if not COMMIT.fullmatch(revision or ""):
            raise InputError(f"{ref}: HF_HUB_OFFLINE is set: expected a full commit (40 hex digits) as the revision")
        return str(revision)
    info = ask(ref, lambda: api().dataset_info(repo, revision=revision))
    if info.gated:
        ask(ref, lambda: api().auth_check(repo, repo_type="dataset"))
    return _commit(ref, info)


def _commit(ref: str, info: Any) -> str:
    """Check and return the commit in an answer of the Hub; it becomes a part of paths."""
    if not COMMIT.fullmatch(str(info.sha)):
        raise InputError(f"{ref}: refused: expected a commit (40 hex digits) from the Hub, got {str(info.sha)[:80]!r}")
    return str(info.sha)


def fetch(pinned: Pinned, *, weights: bool = True) -> Path:
    """Return the folder of a pinned model, after downloading what it lacks; every file equals its checksum.

    A file that was checked is not read again until it changes. A damaged one is removed and downloaded once more.

    Args:
        pinned: the model.
        weights: False fetches only configs and tokenizer. With the weights comes the model card, for its licence.

    Raises:
        TransientError: if the transfer broke, files are missing or damaged again, or the Hub is busy.
        BrokenModelError: if the Hub gave the same bytes twice, which are not those that it lists.
        InputError: if the Hub refuses access, HF_HUB_OFFLINE is set and files are missing, or a folder is in the place
            of a file.
        LewisError: if a local folder changed since it was pinned, or the disk is full.
    """
    if pinned.is_local:
        return check_unchanged(pinned)
    files = _listing_of(pinned)
    names = [name for name in needed(files) if weights or not name.endswith(".safetensors")]
    folder, before = snapshot(pinned.source, pinned.commit), dict[str, str]()
    while damaged := _complete(pinned, folder, names, files, card=weights):
        if same := [name for name, sha256 in damaged.items() if sha256 and before.get(name) == sha256]:
            why = "the Hub gave the same bytes twice, which are not those that it lists"
            raise broken(f"{pinned.ref}: {same[0]}", why, pinned.commit)
        if before or offline():
            raise TransientError(
                f"{pinned.ref}: {', '.join(damaged)}: missing, or not the checksum of the commit; try again"
            )
        before = damaged
    return folder


def _complete(pinned: Pinned, folder: Path, names: list[str], files: _Listing, *, card: bool) -> dict[str, str]:
    """Download the files that a snapshot lacks; remove and return those that are damaged.

    Args:
        pinned: the model.
        folder: of the snapshot.
        names: of the files.
        files: what the commit lists.
        card: whether to download the model card, too.

    Returns:
        Name of each damaged file -> its SHA-256; empty if the file is missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if place := next((folder / name for name in missing if (folder / name).is_dir()), None):
        raise InputError(f"{pinned.ref}: {place} is a folder; expected a file in the Hub client's cache; remove it")
    if missing and offline():
        raise InputError(f"{pinned.ref}: HF_HUB_OFFLINE is set, and {missing[0]} is not in the cache; unset it")
    if missing:
        size = sum(files[name][0] for name in missing)
        logger.info("%s: downloading %d files, %s", pinned.ref, len(missing), size_text(size))
        resume_downloads()
        wanted = [*(glob.escape(name) for name in names), *(["README.md"] if card else [])]
        download = functools.partial(api().snapshot_download, cache_dir=cache_folder(), allow_patterns=wanted)

        def load() -> None:
            download(pinned.source, revision=pinned.commit)
            if not all((folder / name).is_file() for name in names):
                # A client that gets no list of the commit's files accepts an incomplete folder. This raises why.
                list(api().list_repo_tree(pinned.source, revision=pinned.commit, recursive=True))

        ask(pinned.ref, load)
    damaged = [folder / name for name in names if not _is_intact(folder / name, *files[name])]
    found = {path.name: store.file_sha256(path) if path.is_file() else "" for path in damaged}
    for path in damaged:
        _discard(path)
    return found


def is_present(pinned: Pinned) -> bool:
    """Whether `fetch` would download nothing: all files are on disk, as the commit lists them."""
    if pinned.is_local:
        return True
    folder, files = snapshot(pinned.source, pinned.commit), _listing_of(pinned)
    return all(_is_intact(folder / name, *files[name]) for name in needed(files))


def folder_of(pinned: Pinned) -> Path:
    """Return the folder of a pinned model: a local one, or the one that `fetch` downloads to."""
    return Path(pinned.source) if pinned.is_local else snapshot(pinned.source, pinned.commit)


def file_names(pinned: Pinned) -> list[str]:
    """Return the names of a pinned model's files, fetched or not.

    Raises:
        TransientError: if the Hub is busy or unreachable.
    """
    return os.listdir(folder_of(pinned)) if pinned.is_local else list(_listing_of(pinned))


def tensor_headers(pinned: Pinned) -> Headers:
    """Return dtype and shape of each weight, by its `names.unwrapped` name. Of a Hub repo, only headers are read.

    Quantised weights have the names, dtypes and shapes from before their quantisation (`lewis.models.quantised`). Those
    of an adapter have the names of its file.

    Raises:
        InputError: if a safetensors file is damaged, or weights are quantised in a way that is not read.
        TransientError: if the Hub is busy or unreachable.
    """
    folder = folder_of(pinned)
    if is_of_gguf(folder):
        return headers(folder)
    listing = {} if pinned.is_local else _listing_of(pinned)
    names = [name for name in needed(listing or os.listdir(folder)) if name.endswith(".safetensors")]
    # Next to a full model there may be an adapter, or heads for drafting: a merge does not read them.
    if SINGLE in names or (folder / INDEX).is_file():
        names = sorted(weight_files(folder, names))
    names = [name for name in names if name != ADAPTER or len(names) == 1]

    def read(name: str) -> Headers:
        path = folder / name
        try:
            if pinned.is_local or (path.is_file() and path.stat().st_size == listing[name][0]):
                return file_headers(path)
            parse = api().parse_safetensors_file_metadata
            found = ask(pinned.ref, lambda: parse(pinned.source, name, revision=pinned.commit))
        except InputError as error:
            if pinned.is_local or not _is_of_the_commit(path, listing[name], error):
                raise
            raise broken(f"{pinned.ref}: {name}", error, pinned.commit) from error
        return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.tensors.items()}

    with ContextPool(8) as pool:
        by_file = dict(zip(names, pool.map(read, names), strict=True))
    found = {key: header for headers in by_file.values() for key, header in headers.items()}
    if names == [ADAPTER]:
        return found
    found = {key: header for key, header in found.items() if not is_buffer(key, header[1])}
    on_disk = all((folder / name).is_file() for name in names)
    found = dequantised(pinned.ref, folder, found, by_file if on_disk else None)
    return {unwrapped(key): header for key, header in found.items()}


def tensor_shapes(pinned: Pinned) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight, by its name, as `tensor_headers` finds it."""
    return {name: shape for name, (_, shape) in tensor_headers(pinned).items()}


@contextmanager
def blaming(pinned: Pinned, what: str, how: str = "broken") -> Iterator[None]:
    """Report an error in the content of intact files as a model that is broken on the Hub.

    Args:
        pinned: the model. Errors in a local folder are raised unchanged.
        what: the file that is read, for the message.
        how: the model's state, `broken` or `unusable`, for the message.

    Raises:
        BrokenModelError: instead of an `InputError`.
    """
    try:
        yield
    except InputError as error:
        if pinned.is_local or isinstance(error.__cause__, OSError):  # an OSError says nothing about the content
            raise
        raise broken(f"{pinned.ref}: {what}", error, pinned.commit, how) from error


def _is_of_the_commit(path: Path, listed: tuple[int, str], error: InputError) -> bool:
    """Whether unreadable content is the commit's own, not a broken download: its checksum fits, or the Hub sent it."""
    if path.is_file():
        return _is_intact(path, *listed)
    return type(error.__cause__).__name__ == "SafetensorsParsingError"


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


def _listing_of(pinned: Pinned) -> _Listing:
    """Return the list of a pinned commit's files, from the store or else from the Hub.

    Raises:
        InputError: if HF_HUB_OFFLINE is set, and the commit is not in the Hub client's cache.
        TransientError: if the Hub is busy or unreachable.
    """
    known = _remembered_listing(pinned.source, pinned.commit)
    if known is not None:
        return known
    if offline():
        return _cached_listing(pinned.ref, pinned.source, pinned.commit)
    info = ask(pinned.ref, lambda: api().model_info(pinned.source, revision=pinned.commit, files_metadata=True))
    return remember_listing(pinned.source, info)


def _listing_entry(source: str, commit: str) -> Path:
    return kinds.DIGESTS.path(f"{source.replace('/', '--')}@{commit}")


def _remembered_listing(source: str, commit: str) -> _Listing | None:
    known = store.entry(_listing_entry(source, commit), "files")
    return None if known is None else {name: (size, checksum) for name, (size, checksum) in known.items()}


def remember_listing(source: str, info: Any) -> _Listing:
    """Return the list of a commit's files in an answer of the Hub, and keep it in the store.

    Raises:
        InputError: if a file's name leads out of its folder, or the answer has no commit.
    """
    commit = _commit(source, info)
    files = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings}
    if outside := next(filter(leads_out, files), None):
        raise InputError(f"{source}: refused: its file {outside!r} would land outside its folder")
    store.write_entry(_listing_entry(source, commit), {"files": files})
    return files


def _cached_listing(ref: str, source: str, revision: str) -> _Listing:
    """Return the list of a commit's files in the Hub client's cache, for work without the Hub.

    In the cache, each file is a link to a blob whose name is the checksum.

    Raises:
        InputError: if `revision` is no full commit, or the cache lacks it or one of its files.
    """
    folder = snapshot(source, revision)
    if not COMMIT.fullmatch(revision) or not folder.is_dir():
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

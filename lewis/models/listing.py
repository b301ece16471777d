"""The files of a Hub commit with their sizes and checksums, remembered in the store: a commit never changes."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from lewis import store
from lewis.errors import InputError
from lewis.models.files import needed
from lewis.models.hub_client import api, cache_folder, errors, offline, snapshot
from lewis.models.pin import Pinned
from lewis.store import kinds

COMMIT = re.compile(r"[0-9a-f]{40}")

Listing = dict[str, tuple[int, str]]  # name -> size in bytes, SHA-256 (64 digits) or git blob id (40 digits)


def listing_of(pinned: Pinned) -> Listing:
    """The files of a pinned commit, from the store or else from the Hub.

    Raises:
        InputError: if HF_HUB_OFFLINE is set, and the commit is not in the Hub client's cache.
        TransientError: if the Hub is busy or unreachable.
    """
    known = _remembered_listing(pinned.source, pinned.commit)
    if known is not None:
        return known
    if offline():
        return cached_listing(pinned.ref, pinned.source, pinned.commit)
    with errors(pinned.ref):
        info = api().model_info(pinned.source, revision=pinned.commit, files_metadata=True)
    return remember_listing(pinned.source, info)


def _listing_entry(source: str, commit: str) -> Path:
    return kinds.DIGESTS.path(f"{source.replace('/', '--')}@{commit}")


def _remembered_listing(source: str, commit: str) -> Listing | None:
    known = store.entry(_listing_entry(source, commit), "files")
    return None if known is None else {name: (size, checksum) for name, (size, checksum) in known.items()}


def remember_listing(source: str, info: Any) -> Listing:
    """Keep the files of a commit in the store.

    Args:
        source: `org/name`.
        info: what `HfApi.model_info` said, with `files_metadata`.

    Raises:
        InputError: if a file's name leads out of its folder.
    """
    files = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings}
    outside = next((name for name in files if ".." in PurePosixPath(name).parts or name.startswith("/")), None)
    if outside:
        raise InputError(f"{source}: refused: its file {outside!r} would land outside its folder")
    store.write_entry(_listing_entry(source, info.sha), {"files": files})
    return files


def cached_listing(ref: str, source: str, revision: str) -> Listing:
    """The files of a commit in the Hub client's cache, for work without the Hub.

    There each file is a link to a blob, and the blob's name is its checksum.

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

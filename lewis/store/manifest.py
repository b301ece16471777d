"""Published folders: whether every file is byte for byte what was written, by the checksums in the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lewis.store import remote, sealed_json
from lewis.store.checksums import remembered_sha256
from lewis.store.entries import mark_used, set_aside
from lewis.store.files import MANIFEST
from lewis.threads import ContextPool


class DamagedError(ValueError):
    """A published folder is not whole; the message names the file, what was expected and what is there."""


def read_manifest(folder: Path, *, content: bool = True) -> dict[str, Any] | None:
    """The manifest of a published folder, which is marked as used; None if the folder is not whole, as `check` says.

    Args:
        folder: as `publish` wrote it.
        content: False for readers that check the content of each file themselves: then only sizes are compared.
    """
    try:
        return check(folder, content=content)
    except DamagedError:
        return None


def check(folder: Path, *, anew: bool = False, content: bool = True) -> dict[str, Any]:
    """Check the content of every file of a published folder against its manifest, and mark the folder as used.

    A folder that only the remote half of the store has is fetched. A checksum is remembered for as long as the
    file's inode, size and times stay the same.

    Args:
        folder: as `publish` wrote it. Files that the manifest does not name are not looked at.
        anew: read every file, whatever is remembered.
        content: False compares the sizes only.

    Returns:
        The manifest.

    Raises:
        DamagedError: if a file is missing, or has another size or another SHA-256.
    """
    mark_used(folder / MANIFEST)
    remote.fetch(folder)
    try:
        manifest = sealed_json.loads((folder / MANIFEST).read_bytes())
        expected = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST}: {getattr(error, 'strerror', None) or error}") from error
    sizes = {name: (size, None) for name, (size, _) in expected.items()}
    check_files(folder, expected if content else sizes, anew=anew)
    return manifest


def set_damaged_aside(folder: Path) -> None:
    """Move a folder out of the way if it is there and not whole. Call it under the entry's lock."""
    try:
        check(folder)
    except DamagedError as error:
        if folder.exists():
            set_aside([folder], str(error))


def check_files(folder: Path, expected: Mapping[str, tuple[int, str | None]], *, anew: bool = False) -> None:
    """Check the content of files.

    Args:
        folder: where they are.
        expected: name -> size in bytes and SHA-256; None: only the size is known.
        anew: read every file, whatever is remembered.

    Raises:
        DamagedError: naming the first file that is missing or has another size or content.
    """

    def problem(item: tuple[str, tuple[int, str | None]]) -> str | None:
        name, (size, sha256) = item
        try:
            if (found := (folder / name).stat().st_size) != size:
                return f"{name}: expected {size} bytes, it has {found}"
            if sha256 and (is_now := remembered_sha256(folder / name, anew=anew)) != sha256:
                return f"{name}: expected SHA-256 {sha256}, it is {is_now}"
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None

    with ContextPool(4) as pool:
        for found in pool.map(problem, expected.items()):
            if found:
                raise DamagedError(found)

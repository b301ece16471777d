"""The size of the store on disk, in total and by folder."""

import os
from pathlib import Path

from lewis.store.folders import home


def by_folder() -> dict[str, int]:
    """Folder of the store -> bytes on disk of everything in it; files next to the folders are under an empty name.

    A file with several hard links, such as weights that MLflow has too, is counted once, in the first folder by name.
    Symbolic links to files elsewhere do not count these files. Files that vanish meanwhile are left out.
    """
    found: dict[str, int] = {"": 0}
    seen = set[tuple[int, int]]()
    for entry in sorted(_entries(home()), key=lambda each: each.name):
        name = entry.name if entry.is_dir(follow_symlinks=False) else ""
        found[name] = found.get(name, 0) + _size(entry, seen)
    return found


def total() -> int:
    """Bytes on disk of the whole store, MLflow's files and Prefect's database in it too: what `LEWIS_QUOTA` limits."""
    return sum(by_folder().values())


def _size(entry: os.DirEntry[str], seen: set[tuple[int, int]]) -> int:
    if entry.is_dir(follow_symlinks=False):
        return sum(_size(each, seen) for each in _entries(Path(entry.path)))
    try:
        known = entry.stat(follow_symlinks=False)
    except OSError:
        return 0
    if known.st_nlink > 1:
        if (known.st_dev, known.st_ino) in seen:
            return 0
        seen.add((known.st_dev, known.st_ino))
    return 512 * known.st_blocks


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []

"""Entries of the store that are one JSON file: written with a checksum, and checked whenever they are read."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis.store import files, made, remote, sealed_json
from lewis.store.folders import holds, home, make_folder

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"  # the folder of the store that damaged entries are moved to
MARK_EVERY = 3600.0  # seconds; the mark of `mark_used` is at most this much older than the last use


def write_entry(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write an entry, an object that is not empty, with its checksum; push it, if its kind is shared."""
    files.write_text(path, sealed_json.dumps(content, indent))
    made.note(path)
    remote.push(path)


def read_entry(path: Path) -> dict[str, Any] | None:
    """What `write_entry` wrote, fetched if only the remote half has it, and mark it as used.

    Returns:
        None if the entry is absent, or damaged: then it is set aside. The caller makes it again.
    """
    mark_used(path)
    remote.fetch(path)
    try:
        return sealed_json.loads(path.read_bytes())
    except sealed_json.DamagedError as error:
        set_aside([path], str(error))
    except OSError:
        pass
    return None


def entry(path: Path, key: str) -> Any | None:
    """What an entry holds under `key`; None if that is empty, or as `read_entry` says."""
    return (read_entry(path) or {}).get(key) or None


def mark_used(path: Path) -> None:
    """Note for housekeeping that an entry is in use, by its modification time; at most once every `MARK_EVERY`.

    Call it before you read the entry, so that housekeeping sees the use before it removes the entry.
    """
    with suppress(OSError):  # the entry is absent, or the store is read-only
        if path.stat().st_mtime < time.time() - MARK_EVERY:
            os.utime(path)


def set_aside(paths: Sequence[Path], why: str) -> None:
    """Move a damaged entry into the store's quarantine, where no reader finds it, and tell.

    Nothing is deleted: `lewis gc` does that when it is old. What is outside of the store stays where it is.

    Args:
        paths: the file or folder of the entry, and its second file if it has one.
        why: the file that is damaged, and what is wrong with it.
    """
    if not holds(paths[0]):
        logger.warning("%s is damaged and not used: %s", paths[0], why)
        return
    moved = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 10**9:09d}"
    where = "it cannot be moved away"
    for path in paths:
        with suppress(OSError):  # another process was faster, or the store is read-only
            target = make_folder(home() / QUARANTINE) / f"{path.parent.name}-{path.stem[:16]}-{moved}{path.suffix}"
            os.rename(path, target)
            os.utime(target)  # housekeeping counts its age from now on
            where = f"set aside as {target}"
    logger.warning("%s is damaged and made again: %s; %s", paths[0], why, where)

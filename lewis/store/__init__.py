"""The store on disk: content-addressed entries, which are written whole or not at all, and their maintenance."""

from lewis.store.entries import (
    COPIED,
    MARK_EVERY,
    check_replaceable,
    entry,
    mark_used,
    noticing,
    publish,
    read_entry,
    set_aside,
    write_entry,
)
from lewis.store.files import (
    CARD,
    MANIFEST,
    bytes_on_disk,
    check_space,
    digest,
    discard,
    discard_unless,
    file_sha256,
    free_space,
    is_abandoned,
    lock,
    read_json,
    sweep,
    write_bytes,
    write_json,
    write_text,
    written_beside,
)
from lewis.store.folders import holds, home, make_folder, private_folder, restrict, umask
from lewis.store.lease import SharedLock, turn
from lewis.store.manifest import read_manifest
from lewis.store.scratch import beside, has_restarted, is_dead, remove_abandoned, scratch_folder, system, writer

__all__ = [
    "CARD", "COPIED", "MANIFEST", "MARK_EVERY", "SharedLock", "beside", "bytes_on_disk", "check_replaceable",
    "check_space", "digest", "discard", "discard_unless", "entry", "file_sha256", "free_space", "has_restarted",
    "holds", "home", "is_abandoned", "is_dead", "lock", "make_folder", "mark_used", "noticing", "private_folder",
    "publish", "read_entry", "read_json", "read_manifest", "remove_abandoned", "restrict", "scratch_folder",
    "set_aside", "sweep", "system", "turn", "umask", "write_bytes", "write_entry", "write_json", "write_text", "writer",
    "written_beside",
]  # fmt: skip

"""Room in a store that has a quota: before work, what nobody needs makes way for it."""

import logging

from lewis import store
from lewis.registry.retention import by_versions
from lewis.store import housekeeping, size

logger = logging.getLogger(__name__)


def make_room(needed: int) -> int:
    """Remove from the store what is needed least, until its quota leaves `needed` bytes; gives the bytes freed.

    What no registered version needs goes, the longest unused first. What was used in the last hour, or since a run
    began that is still going on, stays. Without a quota nothing is removed.

    Raises:
        InputError: if `LEWIS_QUOTA` is no size.
        LewisError: if MLflow does not answer, or something cannot be removed.
    """
    quota = size.quota()
    if quota is None or (missing := size.total() + needed - quota) <= 0:
        return 0
    # The notes of runs, also of dead ones that nobody has cleared yet: then more stays.
    began = min((note.stat().st_mtime for note in (store.home() / "runs").glob("[!.]*")), default=None)
    found = housekeeping.survey(0, needed=by_versions(), active_since=began)
    chosen, sum_ = list[housekeeping.Removable](), 0
    for item in sorted(found, key=lambda each: each.last_used):
        if sum_ >= missing:
            break
        if item.bytes:
            chosen.append(item)
            sum_ += item.bytes
    freed = housekeeping.remove(chosen)
    if chosen:
        logger.warning(
            "LEWIS_QUOTA leaves too little: %d entries that nothing needs were removed, %.2f GB, the longest unused "
            "first", len(chosen), freed / 1e9,
        )  # fmt: skip
    return freed

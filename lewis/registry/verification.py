"""Check everything anew: the store, and the files of every registered version that are on this machine."""

from collections.abc import Sequence

from lewis.registry import repair, tracking, versions
from lewis.registry.needed import all_versions
from lewis.store import verification
from lewis.store.kinds import Kind
from lewis.store.manifest import DamagedError
from lewis.store.verification import Damage, Verified


def verify(also: Sequence[Kind] = ()) -> Verified:
    """Check the store and the registered versions; nothing that is remembered of them counts.

    A version whose files are lost or damaged is tagged. The next run of its recipe registers it anew.

    Args:
        also: as of `lewis.store.verification.verify`.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    found = verification.verify(also)
    checked, damaged = found.checked, list(found.damaged)
    if tracking.exists():  # without a database nothing was registered, and a look should not create one
        with tracking.client("checking the registered versions") as client:
            for version in all_versions(client):
                digest = version.tags.get("lewis.digest")
                if not digest:  # LEWIS did not register it, or gave it up
                    continue
                checked += 1
                try:
                    versions.check_model(client, version, anew=True)
                except DamagedError as error:
                    damaged.append(Damage("version", f"models:/{version.name}/{version.version}", str(error)))
                    repair.mark(client, version, digest)
    return Verified(checked, damaged)

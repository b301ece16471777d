"""The environment that a flow gives to the workers of a cluster.

This module must not import Prefect, which reads the environment when it is imported.
"""

import os
from collections.abc import Mapping

from lewis import settings, store
from lewis_flows import environment
from lewis_flows.service import credentials

# No secrets, because a cluster shows its settings: start the workers with HF_TOKEN in their own environment.
_SHARED = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "MLFLOW_TRACKING_URI", settings.STORE.name, settings.STORE_MERGED.name)


def shared_environment() -> dict[str, str]:
    """Return the variables that say which store, registry and Hub a worker has to use."""
    given = {name: os.environ[name] for name in _SHARED if name in os.environ}
    return {settings.HOME.name: str(store.home()), **given}


def prepare(values: Mapping[str, str]) -> None:
    """Prepare a worker: set the flow's environment, turn telemetry off, find keys, be patient with Prefect's server."""
    os.environ.update(values)
    environment.prepare()
    credentials.find()
    from lewis_tasks.support import patience

    patience.begin()


def stop() -> None:
    """Let the tasks of this process end at their next report of progress."""
    from lewis_tasks.support.caching import STOPPING

    STOPPING.set()

"""What a cluster's workers share with the flow. It imports no Prefect, which reads the environment when imported."""

import os
from collections.abc import Mapping

from lewis import store
from lewis_flows import environment

# No secrets: a cluster shows its settings. HF_TOKEN belongs into the environment of the workers themselves.
_SHARED = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "MLFLOW_TRACKING_URI")


def shared_environment() -> dict[str, str]:
    """What workers that were started elsewhere have to know: the store, the registry, the Hub."""
    given = {name: os.environ[name] for name in _SHARED if name in os.environ}
    return {"LEWIS_HOME": str(store.home()), **given}


def prepare(values: Mapping[str, str]) -> None:
    """Begin a worker: take the flow's environment, turn telemetry off."""
    os.environ.update(values)
    environment.prepare()


def stop() -> None:
    """Let the tasks of this process end at their next report of progress."""
    from lewis_tasks.support.caching import STOPPING

    STOPPING.set()

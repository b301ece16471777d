"""Settings that must be in the environment before Prefect, MLflow or the Hub's client are imported."""

import os
from contextlib import suppress

from lewis import settings, store
from lewis.errors import InputError
from lewis.redact import redact_logs
from lewis.registry import tracking
from lewis_flows import json_logs

DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # seconds instead of four minutes; then tasks wait for it
    "OMP_WAIT_POLICY": "passive",  # threads that wait leave their core to what runs next to them
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; without heartbeats the server takes a run for dead
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # its pages call Amplitude even if analytics are off
    "PREFECT_WORKER_QUERY_SECONDS": "3",  # how often a worker asks for work
    "PREFECT_LOGGING_EXTRA_LOGGERS": "lewis,lewis_tasks,lewis_flows",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # the receiver logs too, and belongs to no run
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prepare() -> None:
    """Turn telemetry off and keep Prefect's files in the store, unless the user's environment says otherwise.

    From here on, passwords are taken out of what this process logs, and the paths in its environment are absolute: of
    the settings that are folders, and of a database of MLflow.

    Raises:
        InputError: if `LEWIS_LOG_FORMAT` is wrong.
    """
    redact_logs()
    json_logs.prepare()
    # LEWIS's own servers listen on loopback: ask them directly where the environment names a proxy for all others.
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    proxied = any(name.lower() in ("http_proxy", "all_proxy") for name in os.environ)
    if proxied and known != "*" and "127.0.0.1" not in known.split(","):
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (known, "127.0.0.1", "localhost")))
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    settings.make_absolute()
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = tracking.absolute(uri)
    if not os.environ.get("PREFECT_API_URL"):
        with suppress(OSError, InputError):  # the command that needs the store reports what is wrong with it
            store.make_folder(store.home())  # before Prefect makes it, open to others
        os.environ.setdefault("PREFECT_HOME", str(store.home() / "prefect"))

"""Targets of the kind `command`: a program of the operator, which gets the facts of the model as environment variables.

| variable | value |
| --- | --- |
| `MODEL_NAME`, `MODEL_VERSION`, `MODEL_URI` | of the registered model |
| `MODEL_DIGEST` | of the merge, 64 hex digits |
| `MODEL_PATH` | folder with the files |
| `MODEL_OUTPUT` | `full` or `lora` |
| `MODEL_SERVED_AS` | a name that no other content has, for the server |
| `MODEL_PREVIOUS` | URI of the version before; empty if there was none |

Exit code 0 means that the model is in service. The program is run again after a failure, and if this process dies.
"""

import logging
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from lewis import guard, settings
from lewis.errors import InputError, LewisError
from lewis.recipe.serve import CommandTarget
from lewis.redact import redacted
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.store.secrets import MLFLOW_PASSWORD, PREFECT_KEY

logger = logging.getLogger(__name__)
_GRACE = 15.0  # seconds to end after SIGTERM, before it is killed
_SHOWN = 2000  # characters at the end of its output that an error message shows
_OURS = {
    *(each.name for each in settings.ALL if each.secret),
    *(each.variable.name for each in (PREFECT_KEY, MLFLOW_PASSWORD)),
    *("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
}
"""Environment variables with secrets, which the program does not get."""


def put(target: CommandTarget, model: Model, before: Served) -> str:
    """Run the program, with its output in the log; return the name that the model is served under.

    Raises:
        InputError: if `LEWIS_SERVE_PROGRAMS` has no such program.
        LewisError: if it ends with another exit code than 0, or not in time.
    """
    command, timeout_s = [str(_program(target)), *target.run[1:]], 60 * target.timeout_minutes
    process = subprocess.Popen(
        guard.guarded(command, _GRACE),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={name: value for name, value in os.environ.items() if name not in _OURS} | facts(model),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the guard kills what does not end in time
        output, _ = process.communicate(timeout=3 * _GRACE)  # _GRACE for it, and again for what it started
        raise LewisError(
            f"{target.run[0]} did not end within {target.timeout_minutes:g} minutes{_end(output)}"
        ) from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        ended = f"ended with exit code {process.returncode}{_end(output)}"
        raise LewisError(f"{target.run[0]} {ended}")
    for line in output.splitlines():
        logger.info("%s: %s", target.label, line)
    return model.alias


def _program(target: CommandTarget) -> Path:
    """Return the path of the target's program, which must be in the folder that the operator set on the worker."""
    folder, name = settings.SERVE_PROGRAMS.get(), target.run[0]
    if folder is None:
        raise InputError("LEWIS_SERVE_PROGRAMS: not set; set it to the folder of the programs that recipes may run")
    path = folder / name
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise InputError(f"{path}: expected a program, which is missing or not executable; put it there")
    return path


def facts(model: Model) -> dict[str, str]:
    """Return the facts of a model as environment variables: name -> value."""
    return {
        "MODEL_NAME": model.name,
        "MODEL_VERSION": model.version,
        "MODEL_URI": model.uri,
        "MODEL_DIGEST": model.digest,
        "MODEL_PATH": str(model.folder),
        "MODEL_OUTPUT": model.output,
        "MODEL_SERVED_AS": model.alias,
        "MODEL_PREVIOUS": model.previous or "",
    }


def _end(output: str) -> str:
    return f"; the end of its output: {redacted(output.strip()[-_SHOWN:]) or '(none)'}"

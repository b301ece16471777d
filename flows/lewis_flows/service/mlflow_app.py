"""MLflow's server in one process: `mlflow server` by itself waits, with 200 MB, beside the server that it starts.

    python -m lewis_flows.service.mlflow_app --host 127.0.0.1 --port 5000 --workers 1

The arguments are those of `mlflow server`. The registry is prepared first: its database, and our experiment.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lewis import private_names
from lewis.errors import LewisError
from lewis.registry import versions


def main() -> None:
    """Become the server."""
    try:
        versions.configure()
    except LewisError as error:
        sys.exit(f"ERROR: {error}")
    from mlflow.cli import cli

    private_names.MLFLOW_START_SERVER.put(_become)
    cli(["server", *sys.argv[1:]])


def _become(command: Sequence[str], *, extra_env: Mapping[str, str], **_: Any) -> NoReturn:
    sys.stdout.flush()
    os.execvpe(command[0], list(command), {**os.environ, **extra_env})


if __name__ == "__main__":
    main()

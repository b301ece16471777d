"""Run a command whose secrets are in files, as containers get them: the entry point of the image.

    PREFECT_API_AUTH_STRING_FILE=/run/secrets/prefect-api-key python -m lewis_flows.service.from_files lewis deploy

For each variable `NAME` of `settings.IN_FILES`, if `NAME_FILE` is set, `NAME` is set to the content of that file. White
space at the ends is no part of a secret, in a file or a variable: a secret of Kubernetes that was made from a file ends
with the file's newline. The command replaces this process, so that it gets the signals of the container.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lewis import settings
from lewis.errors import InputError


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose values are in files or have white space at their ends, with their secrets.

    Raises:
        InputError: if a file cannot be read or is empty, or a variable is given twice.
    """
    found = {}
    for name in settings.IN_FILES:
        value = environment.get(name, "")
        if not (file := environment.get(f"{name}_FILE")):
            if value != value.strip():
                found[name] = value.strip()
            continue
        if value:
            raise InputError(f"{name}: expected a value or a file, got both; unset {name} or {name}_FILE")
        try:
            found[name] = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name}_FILE: {file} cannot be read ({error}); give it to this container") from None
        if not found[name]:
            raise InputError(f"{name}_FILE: {file} is empty; write the secret into it")
    return found


def main() -> None:
    """Replace this process by the command in its arguments, which gets the secrets in its environment."""
    try:
        os.environ.update(secrets(os.environ))
        command = sys.argv[1:]
        if not command:
            raise InputError("expected a command to run, got none; see compose.yaml in deployments")
        os.execvp(command[0], command)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {sys.argv[1]} cannot be run: {error.strerror}; expected a program of the image")


if __name__ == "__main__":
    main()

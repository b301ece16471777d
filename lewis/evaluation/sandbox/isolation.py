"""Start a process that evaluates in Linux namespaces of its own, where the machine allows it.

It sees no other processes, whose environment holds secrets, and not the files in which secrets usually are. If no
document is read from another machine, it has no network. Where namespaces cannot be made, it runs without them.

For an ordinary user the walls hold against any code. Root can take them down again.
"""

import functools
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_IN_HOME = (
    *(".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".prefect", ".config/gh", ".config/gcloud", ".netrc"),
    *(".git-credentials", ".pgpass", ".pypirc", ".npmrc", ".bash_history", ".cache/huggingface/token"),
    ".cache/huggingface/stored_tokens",
)
_NAMED = ("HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "NETRC", "GOOGLE_APPLICATION_CREDENTIALS")

# $1: the number of places to hide; then the places; then the command.
_SETUP = """
set -eu
number=$1; shift
while [ "$number" -gt 0 ]; do
    if [ -d "$1" ]; then mount -t tmpfs -o size=4k,mode=700 hidden "$1"
    elif [ -f "$1" ]; then mount --bind /dev/null "$1"
    fi
    shift; number=$((number - 1))
done
exec "$@"
"""


def walls(secrets: Sequence[Path] = (), *, network: bool) -> tuple[str, ...]:
    """What to write before a command so that it runs in namespaces; nothing where they cannot be made.

    Args:
        secrets: more files and folders to hide; those that do not exist are left out.
        network: whether the process needs to reach other machines.
    """
    if not _possible():
        return ()
    return _prefix(
        [str(place) for place in dict.fromkeys((*_usual_secrets(os.environ), *secrets)) if place.exists()], network
    )


@functools.cache
def _possible() -> bool:
    try:
        done = subprocess.run([*_prefix([os.devnull], False), "true"], capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        logger.warning("evaluations run without namespaces, as this machine does not allow them: %s", problem)
    return not problem


def _prefix(places: Sequence[str], network: bool) -> tuple[str, ...]:
    kinds = ["--mount", "--pid", "--ipc", "--mount-proc", "--fork", "--kill-child=SIGKILL"]
    kinds += [] if network else ["--net"]
    drop: tuple[str, ...] = ()
    if os.geteuid() != 0:
        kinds += ["--user", "--map-current-user", "--keep-caps"]  # the mounts need capabilities in the namespace
        drop = ("setpriv", "--no-new-privs", "--ambient-caps=-all", "--inh-caps=-all", "--bounding-set=-all")
    return ("unshare", *kinds, "--", "sh", "-c", _SETUP, "evaluation", str(len(places)), *places, *drop)


def _usual_secrets(environment: Mapping[str, str]) -> Iterator[Path]:
    for name in _IN_HOME:
        yield Path.home() / name
    for name in ("token", "stored_tokens"):
        yield Path(environment.get("HF_HOME", "~/.cache/huggingface")).expanduser() / name
    for name in _NAMED:
        if environment.get(name, os.devnull) != os.devnull:
            yield Path(environment[name]).expanduser()

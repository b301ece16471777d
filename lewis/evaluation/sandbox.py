"""Run generated programs where they can do no harm: without network, without the host's files, within limits.

The sandbox is made of Linux namespaces by util-linux (`unshare`, `setpriv`), which every Debian and Ubuntu has. A
program runs as a user without rights. It sees only the Python that runs LEWIS, without installed packages, and a
working folder in memory. All processes that it started end with it. This protects the host, not the score: a program
can still cheat in the tests that it contains.
"""

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lewis.errors import InputError

LIMITS = {"memory": 1 << 30, "file": 8 << 20, "processes": 32, "files": 64}  # bytes, bytes, and numbers
_FOLDER = 16  # MiB: the size of the working folder
_SHOWN = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
_WORDS = 300  # longest message of a failure, in characters

# $1: an empty folder; $2: setpriv's options for the user; $3: Python; $4: its program; then paths to show read-only.
# The shell must not `exec` Python: it is the first process of its namespace, so all others die when it is killed.
_SETUP = f"""
set -eu
root=$1 user=$2 python=$3 runner=$4; shift 4
mount -t tmpfs -o size={_FOLDER}m,nr_inodes=4k,mode=755,nosuid,nodev sandbox "$root"
for place in "$@"; do
    mkdir -p "$root${{place%/*}}"
    if [ -L "$place" ]; then cp -P "$place" "$root$place"
    elif [ -d "$place" ]; then mkdir -p "$root$place"; mount --rbind -o ro "$place" "$root$place"
    elif [ -e "$place" ]; then : > "$root$place"; mount --bind "$place" "$root$place"
    fi
done
mkdir -m 777 "$root/work"
chroot "$root" setpriv $user --no-new-privs --bounding-set=-all --inh-caps=-all "$python" -I -S -c "$runner"
exit $?
"""

# Runs inside the sandbox. What the program prints is dropped, so it can pass only by running to its end.
_RUNNER = """
import json, os, resource, sys
request = json.load(sys.stdin)
verdict, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
for stream in range(3):
    os.dup2(null, stream)
os.chdir("/work")
for name, value in request["limits"]:
    resource.setrlimit(getattr(resource, name), (value, value))
try:
    exec(compile(request["program"], "program.py", "exec"), {"__name__": "__main__"})
    said = request["passed"]
except BaseException as error:
    said = f"{type(error).__name__}: {error}"
os.write(verdict, said.encode(errors="replace")[:4000])
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an exception, and if not, why."""

    passed: bool
    reason: str = ""


def run(program: str, *, timeout_s: float = 10) -> Outcome:
    """Run a Python program, its tests included, in the sandbox.

    Args:
        program: source code. It passes if its last line ran and nothing was raised; an early `exit()` fails.
        timeout_s: wall-clock and CPU seconds, after which it and all processes that it started are killed.

    Raises:
        InputError: if this machine cannot create the sandbox, with the reason.
    """
    passed = secrets.token_hex(16)
    limits = [
        ("RLIMIT_CPU", int(timeout_s) + 1),
        ("RLIMIT_AS", LIMITS["memory"]),
        ("RLIMIT_FSIZE", LIMITS["file"]),
        ("RLIMIT_NPROC", LIMITS["processes"]),
        ("RLIMIT_NOFILE", LIMITS["files"]),
        ("RLIMIT_CORE", 0),
    ]
    request = json.dumps({"program": program, "passed": passed, "limits": limits})
    with tempfile.TemporaryDirectory(prefix="lewis-sandbox-") as root:
        try:
            child = subprocess.Popen(
                _command(root),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"sandbox: {error.filename}: {error.strerror}; it needs Linux with util-linux") from error
        with child:
            try:
                said, problem = child.communicate(request.encode(), timeout_s)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"took longer than {timeout_s:g} s")
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
    if said.decode(errors="replace") == passed:
        return Outcome(True)
    if said or child.returncode > 128:
        return Outcome(False, said.decode(errors="replace")[:_WORDS] or "was killed")
    if problem:
        raise InputError(
            f"sandbox: this machine does not allow it: {' '.join(problem.decode(errors='replace').split())[:_WORDS]}; "
            "generated programs run only where namespaces can be made (as root, or with user namespaces allowed)"
        )
    return Outcome(False, "ended early")


@functools.cache
def check() -> None:
    """Raise InputError, with the reason, if this machine cannot create the sandbox."""
    run("pass", timeout_s=60)


def _command(root: str) -> list[str]:
    python, shown = os.path.realpath(sys.executable), list(_SHOWN)
    prefix = os.path.realpath(sys.base_prefix)
    if not Path(prefix).is_relative_to("/usr"):
        shown.append(prefix)
    walls = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=SIGKILL"]
    if os.geteuid() == 0:
        number = 2_000_000_000 + os.getpid()  # a user of its own, since the limit of processes counts per user
        user = f"--reuid={number} --regid={number} --clear-groups"
    else:
        walls += ["--user", "--map-root-user"]
        user = "--securebits=+noroot"
    return ["unshare", *walls, "--", "sh", "-c", _SETUP, "sandbox", root, user, python, _RUNNER, *shown]

"""Run generated programs where they can do no harm: without network, without the host's files, within limits.

The sandbox consists of Linux namespaces, which util-linux makes (`unshare`, `setpriv`; every Debian and Ubuntu has it),
and of a filter of system calls. A program runs as a user without rights. It sees only the Python that runs LEWIS,
without installed packages, and a working folder in memory. All processes that it started end with it.

The tests run in a second sandbox, which the program cannot reach. They call the program through a socket, and it
answers with plain data. So a program passes only with right answers: it sees the arguments of a call, but neither the
tests nor the verdict. It can still return memorised answers, and a helper function that the tests call and the program
defines is trusted too.
"""

import base64
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.evaluation.sandbox.system_calls import KEYCTL, seccomp_filter
from lewis.store import scratch_folder

PROCESSES, MEMORY = 4, 1 << 30
"""The most processes and threads that a program may have, and the most bytes of memory of all of them together."""

# Each process gets an equal share of the memory: only control groups limit several processes together, and an ordinary
# user cannot set these everywhere.
LIMITS = {
    "RLIMIT_AS": MEMORY // PROCESSES,
    "RLIMIT_FSIZE": 8 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
    "RLIMIT_MSGQUEUE": 0,
}
_FOLDER = 16  # MiB: the size of the working folder
_SHOWN = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
_WORDS = 300  # longest message of a failure, in characters
_CHILD = Path(__file__).with_name("child.py")

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


@dataclass(frozen=True)
class Outcome:
    """Whether a program loaded and all its tests passed, and if not, why."""

    passed: bool
    reason: str = ""


def run(program: str, tests: str = "", *, timeout_s: float = 10) -> Outcome:
    """Run a Python program in the sandbox, and its tests in another.

    The tests are Python too. They use the program's top-level names as if they stood at its end, but plain data
    (numbers, texts, bytes, containers, `collections`, decimals, fractions, dates) that pass between the two are copied.
    Other objects, such as functions and instances of the program's classes, stay with the program. The tests can call
    and iterate them and ask for attributes, but not compare them. They cannot pass functions or classes of their own.

    Args:
        program: source code. A program whose last line was not reached fails, also after an early `exit()`.
        tests: source code. They pass if they raise nothing. Without tests a program passes if it has loaded.
        timeout_s: wall-clock and CPU seconds, after which all processes are killed.

    Raises:
        InputError: if this machine cannot create the sandbox, with the reason.
    """
    with ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        its_place = stack.enter_context(_started({"program": program}, ends[0], timeout_s, subprocess.DEVNULL))
        ours = stack.enter_context(_started({"tests": tests}, ends[1], timeout_s, subprocess.PIPE))
        for end in ends:
            end.close()
        try:
            said, problem = ours.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"took longer than {timeout_s:g} s")
        verdict = json.loads(said) if said else {"began": ours.returncode > 128, "problem": "its tests were killed"}
        if verdict["problem"] is None:
            return Outcome(True)
        if verdict["problem"] == "ended early":
            with suppress(subprocess.TimeoutExpired):
                its_place.wait(1)
            problem = problem or (its_place.stderr.read() if its_place.stderr and its_place.returncode else b"")
            if (its_place.returncode or 0) > 128:
                return Outcome(False, "was killed")
        if not verdict["began"] and problem:
            words = " ".join(problem.decode(errors="replace").split())[:_WORDS]
            raise InputError(
                f"sandbox: this machine does not allow it: {words}; generated programs run only where "
                "namespaces can be made (as root, or with user namespaces allowed)"
            )
        return Outcome(False, str(verdict["problem"])[:_WORDS])


@functools.cache
def check() -> None:
    """Raise InputError, with the reason, if this machine cannot create the sandbox."""
    run("pass", timeout_s=60)


@contextmanager
def _started(role: dict[str, str], end: socket.socket, timeout_s: float, out: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a sandbox of its own; at the end of the block, kill it and all processes that it started."""
    as_user = os.geteuid() != 0
    limits = {**LIMITS, "RLIMIT_CPU": int(timeout_s) + 1}
    limits["RLIMIT_NPROC"] = PROCESSES + 2 * as_user  # an ordinary user's `unshare` and `sh` are counted with them
    request: dict[str, Any] = {"limits": limits, "socket": end.fileno(), "keyctl": KEYCTL, **role}
    request["filter"] = base64.b64encode(seccomp_filter()).decode()
    with scratch_folder("sandbox") as root, tempfile.TemporaryFile() as given:
        given.write(json.dumps(request).encode())
        given.seek(0)
        try:
            child = subprocess.Popen(
                _command(str(root)),
                stdin=given,
                stdout=out,
                stderr=subprocess.PIPE,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                pass_fds=[end.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"sandbox: {error.filename}: {error.strerror}; it needs Linux with util-linux") from error
        with child:
            try:
                yield child
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)


def _command(root: str) -> list[str]:
    python, shown = os.path.realpath(sys.executable), list(_SHOWN)
    prefix = os.path.realpath(sys.base_prefix)
    if not Path(prefix).is_relative_to("/usr"):
        shown.append(prefix)
    walls = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=SIGKILL"]
    if os.geteuid() == 0:
        number = 2_000_000_000 + secrets.randbelow(1 << 30)  # a user of its own: the limit of processes counts per user
        user = f"--reuid={number} --regid={number} --clear-groups"
    else:
        walls += ["--user", "--map-root-user"]
        user = "--securebits=+noroot"
    return ["unshare", *walls, "--", "sh", "-c", _SETUP, "sandbox", root, user, python, _CHILD.read_text(), *shown]

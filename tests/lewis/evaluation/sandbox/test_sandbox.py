"""Programs of every bad kind, run for real: what they can reach, how they end, what they leave."""

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lewis
from lewis.errors import InputError
from lewis.evaluation import sandbox
from lewis.evaluation.sandbox import system_calls

pytestmark = pytest.mark.slow

try:
    sandbox.check()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_right_and_wrong() -> None:
    code = "def double(x):\n    return 2 * x\n"
    assert sandbox.run(code, "assert double(2) == 4") == sandbox.Outcome(True)
    assert sandbox.run(code, "assert double(2) == 5, 'five'") == sandbox.Outcome(False, "AssertionError: five")
    assert sandbox.run("import re, math, heapq\nif __name__ == '__main__':\n    print('noise' * 10000)").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("import os; os.kill(os.getpid(), 9)", "was killed"),
        ("print('passed'); raise ValueError('é')", "ValueError: é"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("open('/work/big', 'wb').write(b'0' * (9 << 20))", "File too large"),
        ("for i in range(9): open(f'/work/{i}', 'wb').write(b'0' * (4 << 20))", "No space left"),
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        ("import socket; socket.create_connection(('127.0.0.1', %(port)d), 2)", "Network is unreachable"),
        ("open('%(secret)s')", "No such file"),
        ("open('%(secret)s', 'w')", "No such file"),
        ("open('/usr/lewis', 'w')", "Read-only file system"),
        ("import os; os.mkdir('/new')", "Permission denied"),
        ("import os; os.chroot('/work')", "Operation not permitted"),
        ("import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", "Operation not permitted"),
        ("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "Operation not permitted"),
        ("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "Operation not permitted"),
        ("import socket; socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)", "Operation not permitted"),
        ("import os; os.memfd_create('x')", "Operation not permitted"),
        ("import os; assert 'SECRET' not in os.environ, 'seen'; import torch", "No module named 'torch'"),
    ],
)
def test_what_fails_and_why(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_server: int
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    monkeypatch.setenv("SECRET", "mine")
    outcome = sandbox.run(program.replace("%(secret)s", str(secret)).replace("%(port)d", str(free_server)))
    assert not outcome.passed and reason in outcome.reason
    assert secret.read_text() == "mine" and not Path("/usr/lewis").exists()


def test_its_own_sockets_work() -> None:
    program = "import socket\nfor family in (1, 2, 10): socket.socket(family).close()\nsocket.socketpair()"
    assert sandbox.run(program) == sandbox.Outcome(True)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("request_key", 'b"user", b"lewis-test-key", None, 0'),
        ("keyctl", "11, -3, None, 0"),  # read the session keyring
        ("keyctl", "0, -3, 1"),
        ("shmget", "0, 4096, 0o600"),
        ("unshare", "0x10000000"),
        ("clone", "0x10000011, 0, 0, 0, 0"),
        ("ptrace", "0, 0, 0, 0"),
        ("io_uring_setup", "8, bytes(120)"),
        ("bpf", "0, bytes(120), 120"),
    ],
)
def test_system_calls_that_reach_out_are_refused(call: str, arguments: str) -> None:
    number = {"clone": 56, **{name: numbers[0] for name, numbers in system_calls._REFUSED.items()}}[call]
    if platform.machine() != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nx = libc.syscall({number}, {arguments})"
    assert sandbox.run(program + "\ne = ctypes.get_errno()", "assert (x, e) == (-1, 1), (x, e)") == sandbox.Outcome(
        True
    )


def test_the_workers_keys_are_out_of_reach_without_the_filter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the session keyring of the process that runs the sandbox, which the program's user may read."""
    if platform.machine() != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    code = (
        "import base64, ctypes, struct\nfrom lewis.evaluation import sandbox\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.syscall(250, 1, None) > 0\n"  # a keyring of its own, so that the test leaves nothing behind
        'key = libc.syscall(248, b"user", b"lewis-test-key", b"mine", 4, -3)\n'
        "assert key > 0 and libc.syscall(250, 5, key, 0x3F3F3F3F) == 0\n"
        "sandbox.seccomp_filter = lambda: struct.pack('=HBBI', 6, 0, 0, 0x7FFF0000)\n"  # allow everything
        "program = \"import ctypes\\nfound = ctypes.CDLL(None).syscall(250, 10, -3, b'user', b'lewis-test-key', 0)\"\n"
        'print(sandbox.run(program, "assert found == -1, found"))\n'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "key > 0" in done.stderr or "None) > 0" in done.stderr:
        pytest.skip("this kernel has no keys")
    assert done.stdout.strip() == str(sandbox.Outcome(True)), done.stderr


def test_all_processes_together_keep_to_the_limit_of_memory() -> None:
    program = """
import os
reading, writing = os.pipe()
children = 0
try:
    for _ in range(8):
        if os.fork() == 0:
            held = []
            while True:
                try:
                    held.append(b"x" * (1 << 20))
                except MemoryError:
                    break
                os.write(writing, b".")
            os._exit(0)
        children += 1
except OSError:
    pass
for _ in range(children):
    os.wait()
os.set_blocking(reading, False)
megabytes = 0
try:
    while part := os.read(reading, 65536):
        megabytes += len(part)
except BlockingIOError:
    pass
"""
    done = sandbox.run(program, "assert 100 < megabytes < 1024, megabytes", timeout_s=120)  # a busy machine is slow
    assert done == sandbox.Outcome(True)


def test_a_machine_with_other_system_calls_is_told() -> None:
    assert system_calls.seccomp_filter("aarch64") != system_calls.seccomp_filter("x86_64")
    with pytest.raises(InputError, match="expected one of x86_64, aarch64, got the machine riscv64"):
        system_calls.seccomp_filter("riscv64")


@pytest.fixture
def free_server() -> Iterator[int]:
    """The port of a server that does listen, outside."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def processes(word: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if word in line]


def assert_they_end(word: str) -> None:
    """The kernel kills the processes of a namespace after its first one, a moment later."""
    deadline = time.monotonic() + 60
    while processes(word) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes(word)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.setsid()\ntime.sleep(600)",
        "import os, time\n[os.fork() for _ in range(2)]\ntime.sleep(600)",
    ],
)
def test_what_does_not_end_is_ended_with_all_it_started(program: str) -> None:
    began = time.monotonic()
    assert sandbox.run(program, timeout_s=1) == sandbox.Outcome(False, "took longer than 1 s")
    assert time.monotonic() - began < 120  # and not the 600 s of the programs
    assert_they_end("lewis-tmp-sandbox-")


def test_a_child_left_behind_does_not_live_on() -> None:
    mark = f"x{os.getpid()}x"
    program = (
        "import os, sys\nif os.fork() == 0:\n    os.setsid()\n"
        f"    os.execv(sys.executable, ['python', '-S', '-c', 'import time; time.sleep(600) #{mark}'])"
    )
    assert sandbox.run(program).passed
    assert_they_end(mark)


def test_the_host_is_as_before(tmp_path: Path) -> None:
    mounts, folder = Path("/proc/self/mounts").read_text(), set(os.listdir(tmp_path.parent))
    sandbox.run("open('/work/file', 'w').write('x')")
    assert Path("/proc/self/mounts").read_text() == mounts and set(os.listdir(tmp_path.parent)) == folder
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"lewis-tmp-sandbox-*-{os.getpid()}"))


def test_a_machine_that_cannot_make_it_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "unshare"
    tool.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    tool.chmod(0o755)
    real = sandbox._command
    monkeypatch.setattr(sandbox, "_command", lambda root: [str(tool), *real(root)[1:]])
    with pytest.raises(InputError, match=r"does not allow it: unshare: unshare failed: Operation"):
        sandbox.run("pass")
    monkeypatch.setattr(sandbox, "_command", lambda root: [str(tmp_path / "none")])
    with pytest.raises(InputError, match="it needs Linux with util-linux"):
        sandbox.run("pass")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_the_same_walls(tmp_path: Path) -> None:
    """With the system's own Python, which another user can read."""
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("there is no /usr/bin/python3")
    (tmp_path / "lewis" / "evaluation" / "sandbox").mkdir(parents=True)
    source = Path(lewis.__file__).parent
    ours = (source / "evaluation/__init__.py", *(source / "evaluation/sandbox").glob("*.py"))
    for file in (*source.glob("*.py"), *ours):
        (tmp_path / "lewis" / file.relative_to(source)).write_bytes(file.read_bytes())
    # The store needs packages that the system's own Python has not.
    (tmp_path / "lewis" / "store.py").write_text("from tempfile import TemporaryDirectory as scratch_folder")
    code = (
        "import sys; sys.path.insert(0, '.'); from lewis.evaluation import sandbox\n"
        "print(sandbox.run('assert 1 == 1').passed)\n"
        'programs = (\'open("/etc/passwd")\', \'open("/usr/x", "w")\', \'import os; os.chroot("/work")\',\n'
        "'import socket; socket.socket(40)', 'import os\\nfor _ in range(9): os.fork() or os.read(os.pipe()[0], 1)',\n"
        "'x = bytearray(300 << 20)')\nfor program in programs:\n"
        "    print(sandbox.run(program).reason.split(':')[0])"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o077 == 0:  # pytest's own
            folder.chmod(0o755)
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", python, "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    if "does not allow it" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(f"no user namespaces: {done.stderr.splitlines()[-1]}")
    seen = ["FileNotFoundError", "OSError", "PermissionError", "PermissionError", "BlockingIOError", "MemoryError"]
    assert done.stdout.split() == ["True", *seen], done.stderr

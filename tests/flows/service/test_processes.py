"""What is started ends with what started it: stubs that ignore SIGTERM stand for servers whose shutdown hangs."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.store import kinds
from lewis_flows.service import processes, servers, up
from lewis_flows.service.processes import Process, answers, free_port, usable_port
from tests.support.service import children

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)  # as a worker starts its runs
print("READY", flush=True)
time.sleep(60)
"""
PARENT = f"""
import time
from lewis_flows.service.processes import Process, answers, free_port, usable_port
Process("stub", ["-c", {STUBBORN!r}], {{}}, grace=0.5, echo=lambda line: print(line, flush=True)).start()
time.sleep(60)
"""


@pytest.fixture
def parent(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has started a stubborn child and grandchild."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "READY\n"
    yield process
    process.kill()
    process.communicate()


def running(pid: int) -> bool:
    """Whether a process is there, and is more than the exit code that its parent has not read yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(*pids: int, seconds: float = 30) -> bool:
    """Whether all processes end in time; whatever is left is killed."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


@pytest.mark.skipif(sys.platform != "linux", reason="orphans of orphans are found on Linux only")
class TestNothingIsLeft:
    def test_after_a_kill_of_the_parent(self, parent: subprocess.Popen[str]) -> None:
        left = children(parent.pid)
        assert len(left) == 3  # guard, child, grandchild
        parent.kill()
        assert gone(*left)

    def test_after_a_kill_of_the_child(self, parent: subprocess.Popen[str]) -> None:
        _guard, child, grandchild = sorted(children(parent.pid))
        os.kill(child, signal.SIGKILL)
        assert gone(child, grandchild)

    def test_of_the_child_after_a_kill_of_its_guard(self, parent: subprocess.Popen[str]) -> None:
        guard, child, grandchild = sorted(children(parent.pid))
        os.kill(guard, signal.SIGKILL)
        assert gone(child)
        os.kill(grandchild, signal.SIGKILL)

    def test_of_an_orphan_that_a_look_at_proc_missed(self) -> None:
        """While /proc is read, a process can start another and end: the look finds neither."""
        missed = (
            "import sys; from lewis import guard; look, looks = guard.descendants, iter([set()])\n"
            "guard.descendants = lambda: next(looks, look())\n"
            "sys.exit(guard.Guard(int(sys.argv[1]), 0.5).run(sys.argv[2:]))"
        )
        orphan = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid)"
        command = [sys.executable, "-c", missed, str(os.getpid()), sys.executable, "-c", orphan]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not running(int(done.stdout))

    def test_of_a_command_that_is_to_end_before_it_runs(self) -> None:
        """Its process swallowed the signal, and was waited for until it was killed."""
        slow = (
            "import os, sys, time; from lewis import guard; execv = os.execv\n"
            "os.execv = lambda *given: (time.sleep(0.3), execv(*given))\n"
            "sys.exit(guard.Guard(0, 20).run(sys.argv[1:]))"  # no process has the parent 0: it counts as dead
        )
        command = [sys.executable, "-c", slow, sys.executable, "-c", "import time; time.sleep(60)"]
        assert subprocess.run(command).returncode == 128 + signal.SIGTERM

    def test_the_logs_of_the_last_starts_are_kept(self, home: Path) -> None:
        for number in range(6):
            process = Process("stub", ["-c", f"print('start', {number})"], {})
            process.start()
            while process.ended() is None or not process.log.exists() or not process.log.read_text():
                time.sleep(0.05)
        found = {path.name.partition("-")[0]: path.read_text() for path in kinds.LOGS.entries()}
        assert found == {"stub": "start 5\n", "stub.1": "start 4\n", "stub.2": "start 3\n", "stub.3": "start 2\n"}
        process.stop()
        assert len(kinds.LOGS.entries()) == 3  # of starts that failed

    def test_after_a_stop(self, home: Path) -> None:
        ready = threading.Event()
        process = Process("stub", ["-c", STUBBORN], {}, grace=0.5, echo=lambda line: ready.set())
        starter = threading.Thread(target=process.start)
        starter.start()
        starter.join()
        assert ready.wait(120)
        left = {pid: words for pid, words in children(os.getpid()).items() if "signal.SIGTERM" in words}
        assert process.ended() is None  # it does not depend on the thread that started it
        process.stop()
        assert process.ended() == 128 + signal.SIGKILL and gone(*left, seconds=5)


def test_an_exit_code_is_passed_on(home: Path) -> None:
    process = Process("stub", ["-c", "raise SystemExit(7)"], {})
    process.start()
    deadline = time.monotonic() + 120
    while process.ended() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.ended() == 7


def test_a_second_service_of_a_store_names_the_first_while_that_starts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It named the process None."""

    def start(*_: object) -> dict[str, str]:
        up.up(lambda *_: None, lambda _: None)
        return {}

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(up, "_start_servers", start)
    with pytest.raises(InputError, match=rf"already \(process {os.getpid()}\); stop it first"):
        up.up(lambda *_: None, lambda _: None)


def test_what_the_locale_cannot_write_does_not_stop_the_log(home: Path) -> None:
    """Nobody read on, and the process waited for ever once the pipe was full."""
    child = "import sys, time; sys.stdout.buffer.write(b'\\xff\\nafter\\n'); sys.stdout.flush(); time.sleep(60)"
    code = f"""
        import time
        from lewis_flows.service.processes import Process
        said = []
        process = Process("odd", ["-c", {child!r}], {{}}, echo=said.append, grace=0.1)
        process.start()
        deadline = time.monotonic() + 60
        while "after" not in said and time.monotonic() < deadline:
            time.sleep(0.05)
        print(process.log.read_bytes())
        process.stop()
    """
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    told = subprocess.run(command, env=os.environ | locale, stdout=subprocess.PIPE, text=True).stdout
    assert told == "b'\\xef\\xbf\\xbd\\nafter\\n'\n"


def test_a_full_disk_does_not_stop_the_reading_of_output(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    process = Process("odd", [], {}, echo=said.append)
    monkeypatch.setattr(store, "restrict", lambda path: None)
    full = SimpleNamespace(open=lambda *_, **__: open("/dev/full", "w"))  # noqa: SIM115  # what calls it closes it
    monkeypatch.setattr(process, "log", full)
    process._read(iter(["one\n", "two\n"]))
    assert said == ["one", "two"]


@pytest.mark.parametrize("folder", [".", "missing"])
def test_neither_a_missing_log_nor_a_closed_terminal_stops_the_reading(home: Path, tmp_path: Path, folder: str) -> None:
    """The part waited for ever once its pipe was full."""
    said = list[str]()

    def echo(line: str) -> None:
        said.append(line)
        raise BrokenPipeError

    process = Process("odd", [], {}, echo=echo)
    process.log = tmp_path / folder / "odd.log"
    process._read(iter(["one\n", "two\n"]))  # type: ignore[arg-type]
    assert said == ["one", "two"] and (folder == "missing" or process.log.read_text() == "one\ntwo\n")


def test_a_part_that_ends_while_it_starts_again_is_tried_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole service ended with the first such start."""
    starts, port, said = tmp_path / "starts", free_port(), list[str]()
    code = f"""
        import http.server, pathlib, sys
        starts = pathlib.Path({str(starts)!r})
        number = len(starts.read_text()) if starts.exists() else 0
        starts.write_text("x" * (number + 1))
        if number == 1:
            sys.exit(3)
        server = http.server.HTTPServer(("127.0.0.1", {port}), http.server.SimpleHTTPRequestHandler)
        server.handle_request() if number == 0 else server.serve_forever()
    """
    part = Process("odd", ["-c", textwrap.dedent(code)], {}, health=f"http://127.0.0.1:{port}/", grace=0.1)

    def sleep(seconds: float) -> None:
        if len(starts.read_text()) == 3:
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(up, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    part.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            up._keep_up([part], lambda _, line: said.append(line), {})
        assert answers(part._health or "") and f"odd ended with exit code 3; its log is {part.log}" in said
    finally:
        part.stop()


def test_a_part_starts_again_also_if_the_server_was_not_told_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole service ended, such as when that step met a Prefect server that answered with an error."""
    started, said = list[str](), list[str]()

    def sleep(seconds: float) -> None:
        if started:
            raise KeyboardInterrupt

    def died() -> None:
        raise LewisError("Prefect answers with an error")

    part = SimpleNamespace(name="worker", ended=lambda: 1, start=lambda: started.append("worker"))
    monkeypatch.setattr(up, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        up._keep_up([part], lambda _, line: said.append(line), {"worker": died})  # type: ignore[list-item]
    assert started == ["worker"] and said[-1] == "Prefect answers with an error"


@pytest.mark.parametrize("given", ["", "example.org", "*"])
def test_a_proxy_of_the_environment_is_not_asked_for_our_servers(home: Path, given: str) -> None:
    """`lewis up` and `lewis run` waited for their servers for seven minutes, and gave up."""
    code = (
        "import sys\nfrom lewis_flows import environment\nfrom lewis_flows.service.processes import answers\n"
        "environment.prepare()\nprint(answers(sys.argv[1]))"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url, proxied = f"http://127.0.0.1:{server.server_port}/", {"HTTP_PROXY": "http://127.0.0.1:9"}
        environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
        environment |= proxied | ({"NO_PROXY": given} if given else {})
        asked = subprocess.run([sys.executable, "-c", code, url], env=environment, stdout=subprocess.PIPE, text=True)
        server.shutdown()
    assert asked.stdout == "True\n"


def test_an_answer_that_is_no_http_is_none() -> None:
    """Where nobody listens, the kernel may connect a socket to itself: it reads its own request."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            with server.accept()[0] as connection:
                connection.sendall(connection.recv(1000))

        threading.Thread(target=echo, daemon=True).start()
        assert not answers(f"http://127.0.0.1:{server.getsockname()[1]}/health")


def test_a_port_is_taken_from_when_another_process_starts_a_server_on_it() -> None:
    port = free_port()
    processes.release(port)
    code = (
        f"from lewis_flows.service.processes import usable_port; usable_port('P', '{port}'); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdin is not None and first.stdout is not None and first.stdout.readline()
        taken = rf"127.0.0.1:{port} is taken \(by `lewis` in process {first.pid}\); stop it, or set MLFLOW_PORT"
        with pytest.raises(InputError, match=taken):
            usable_port("MLFLOW_PORT", str(port))
        first.kill()
    assert usable_port("MLFLOW_PORT", str(port)) == port


def test_a_port_that_another_process_was_given_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server listens seconds later: two runs had one server, and each took it for its own."""
    code = "from lewis_flows.service.processes import free_port; print(free_port(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        taken, own, third = int(other.stdout.readline()), 1, 2  # no server listens on these here
        found = iter([taken, own, own, taken, third, own])
        monkeypatch.setattr(processes, "_unused_port", lambda: next(found))
        assert [free_port(), free_port()] == [own, third]
        processes.release(own)
        assert free_port() == own
        processes.release(third)
        other.kill()


def test_a_port_that_another_server_listens_on_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(InputError, match="is taken"):
        usable_port("MLFLOW_PORT", str(server.getsockname()[1]))


def test_what_is_to_be_done_meanwhile_is_done_before_a_server_is_ready(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, done = free_port(), tmp_path / "done"
    code = f"""
import http.server, pathlib, time
while not pathlib.Path({str(done)!r}).exists():
    time.sleep(0.01)
http.server.HTTPServer(("127.0.0.1", {port}), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
    url, started = f"http://127.0.0.1:{port}", list[Process]()

    def process(port: int) -> tuple[Process, str]:
        started.append(Process("prefect", ["-c", code], {}, health=url))
        return started[-1], url

    monkeypatch.setattr(servers, "prefect_process", process)
    with servers.prefect_server(meanwhile=lambda url: done.write_text(url)) as found:
        assert found == url == done.read_text() and answers(url)
    done.unlink()
    with pytest.raises(ZeroDivisionError), servers.prefect_server(meanwhile=lambda url: 1 / 0):
        pytest.fail("a server that is never ready")
    assert [each.ended() is not None for each in started] == [True, True]

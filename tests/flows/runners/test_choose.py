"""The same flow in threads, in processes, on Dask and on Ray: the same merge, and the work on several processes."""

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from prefect.utilities.callables import cloudpickle_wrapped_call

from lewis.errors import InputError
from lewis_flows.runners import choose
from tests.flows.conftest import Command
from tests.flows.test_run import NO_SCORES, by_the_library, finished, leftovers, report
from tests.support.service import children

dask = pytest.mark.skipif(importlib.util.find_spec("prefect_dask") is None, reason="the extra [dask] is not installed")
ray = pytest.mark.skipif(importlib.util.find_spec("prefect_ray") is None, reason="the extra [ray] is not installed")
PLAIN = ("--set", "lewis=null", "--set", "evaluate=null", "--set", "register=null")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("LEWIS_") and name != "LEWIS_HOME"]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LEWIS_TASK_RUNNER": "spark"}, "LEWIS_TASK_RUNNER: expected thread, process, dask, ray, got 'spark'"),
        ({"LEWIS_MAX_WORKERS": "0"}, "LEWIS_MAX_WORKERS: expected a whole number from 1 up, got '0'"),
        ({"LEWIS_TASK_RUNNER": "process", "LEWIS_DEVICE_SLOTS": "x"}, "LEWIS_DEVICE_SLOTS: expected .* got 'x'"),
        ({"LEWIS_HOME": "./store"}, "LEWIS_HOME: expected an absolute path, got './store', which would be a folder in"),
    ],
)
def test_a_wrong_setting_is_told_in_the_flow_and_not_while_it_is_loaded(
    settings: dict[str, str], message: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        environment.setenv(name, value)
    assert choose.task_runner().name == "threadpool"
    with pytest.raises(InputError, match=message):
        choose.check()


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_an_extra_that_is_not_installed_is_named(name: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LEWIS_TASK_RUNNER", name)
    environment.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"pip install 'lewis-merge\[{name}\]'"):
        choose.check()


def test_as_many_workers_as_can_compute_and_one_more(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LEWIS_DEVICE_SLOTS", "3")
    assert choose.task_runner()._max_workers == 8
    environment.setenv("LEWIS_TASK_RUNNER", "process")
    assert choose.task_runner()._max_workers == 4
    environment.setenv("LEWIS_MAX_WORKERS", "2")
    assert choose.task_runner()._max_workers == 2


@pytest.mark.parametrize("name", ["merge", "search", "evaluate", "serve", "verify", "retention"])
def test_a_flow_can_be_sent_to_another_process(name: str) -> None:
    """With every task goes its flow, with what its function names: a context variable there ended all runs."""
    cloudpickle_wrapped_call(getattr(importlib.import_module(f"lewis_flows.{name}"), f"{name}_flow"))


def in_worker(step: str, code: str) -> str:
    """Python that makes the tasks of a step run `code` before their function, in whatever process runs it.

    A function of `__main__` travels to the workers as it is, a patch of a module would stay behind.
    """
    return (
        "import functools, lewis_flows.walk as walk\nmake = walk.task_of\n"
        "def task_of(node, *about):\n    task = make(node, *about)\n"
        f"    if node.step.name != {step!r}:\n        return task\n"
        "    function = task.fn\n    @functools.wraps(function)\n    def first(*arguments, **named):\n"
        f"{textwrap.indent(textwrap.dedent(code), '        ')}\n        return function(*arguments, **named)\n"
        "    task.fn = first\n    return task\nwalk.task_of = task_of"
    )


# Each pass notes its process and waits until another one is there too.
MEET = """
    import os, pathlib, time
    place, deadline = pathlib.Path(os.environ["LEWIS_HOME"], "pids"), time.monotonic() + 60
    place.mkdir(parents=True, exist_ok=True)
    (place / str(os.getpid())).touch()
    while len(list(place.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["process", pytest.param("dask", marks=dask), pytest.param("ray", marks=ray)])
def test_passes_run_on_two_workers_and_the_merge_is_the_same(
    name: str, lewis: Command, recipe: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"LEWIS_TASK_RUNNER": name, "LEWIS_DEVICE_SLOTS": "2", "LEWIS_MAX_WORKERS": "2"}
    found = report(lewis("run", recipe, "--json", *NO_SCORES, patch=in_worker("measure", MEET), **settings))
    assert len(list((home / "pids").iterdir())) >= 2
    assert not leftovers(home) and found["created"]

    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "alone"))
    digest, weights = by_the_library(recipe, tmp_path / "merged")
    assert digest == found["digest"] and weights == (Path(found["folder"]) / "model.safetensors").read_bytes()


@dask
def test_an_existing_cluster_works_on_the_store_of_the_flow(lewis: Command, recipe: Path, home: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        settings = {"LEWIS_TASK_RUNNER": "dask", "LEWIS_DASK_ADDRESS": cluster.scheduler_address}
        found = report(lewis("run", recipe, "--json", *PLAIN, **settings))
    assert Path(found["folder"]).parent == home / "merged"


@dask
def test_a_cluster_that_does_not_answer_is_named(lewis: Command, recipe: Path) -> None:
    settings = {"LEWIS_TASK_RUNNER": "dask", "LEWIS_DASK_ADDRESS": "tcp://127.0.0.1:9"}
    quick = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    code, _, err = finished(lewis("run", recipe, *PLAIN, **settings, **quick))
    assert code == 1 and "no Dask scheduler at tcp://127.0.0.1:9" in err


@ray
def test_a_cluster_of_this_machine_listens_on_loopback(tmp_path: Path) -> None:
    code = """
        import lewis_flows.merge  # as a worker does, before the runner is chosen
        from lewis_flows.runners.ray import ray, runner
        with runner("", 1):
            ray.get(ray.remote(lambda: 1).remote())
            print("READY", flush=True)
            input()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "READY\n":
            assert process.poll() is None
        addresses = listening({process.pid, *children(process.pid)})
        process.communicate("\n", timeout=60)
    assert addresses and addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}


def listening(pids: set[int]) -> set[str]:
    """The addresses that processes listen on, in the kernel's way of writing them."""
    sockets = {os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if os.path.islink(link)}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


SLOW_MERGE = """
    import os, time, lewis.merging.run as m
    f, n = m.Merge._write, []
    def write(self, *arguments):
        n.append(arguments)
        if len(n) == 5:
            print(os.getpid(), flush=True)
            from lewis_tasks.support.caching import STOPPING
            STOPPING.wait(60)
        return f(self, *arguments)
    m.Merge._write = write
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_flow(number: signal.Signals, lewis: Command, recipe: Path, home: Path) -> None:
    settings = {"LEWIS_TASK_RUNNER": "process", "LEWIS_MAX_WORKERS": "1"}
    process = lewis("run", recipe, *PLAIN, patch=in_worker("merge", SLOW_MERGE), **settings)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.send_signal(number)
    process.wait(120)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.returncode != 0 and not Path(f"/proc/{worker}").exists()
    assert number == signal.SIGKILL or not leftovers(home)

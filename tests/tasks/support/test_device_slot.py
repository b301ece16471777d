"""Device slots: kernel locks of one machine, and the limit that machines on one Prefect server share."""

import contextvars
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from lewis.devices import precision
from lewis.errors import InputError, LewisError
from lewis_tasks.support import caching
from lewis_tasks.support import device_slot as device
from lewis_tasks.support.device_slot import LIMIT, device_slot, slots
from tests.support.prefect_key import KEY, credentials
from tests.support.warm import WarmPython


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: slots are files in its temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("LEWIS_DEVICE_SLOTS", raising=False)
    return tmp_path


def held_at_once(tasks: int, expected: int) -> tuple[int, set[str]]:
    """The most slots that so many threads held at once, and the devices they got; waits until it is as expected."""
    inside, most, names, guard = 0, 0, set(), threading.Lock()
    reached = threading.Event()

    def work() -> None:
        nonlocal inside, most
        with device_slot() as name:
            with guard:
                inside += 1
                most = max(most, inside)
                names.add(name)
                if inside == expected:
                    reached.set()
            reached.wait(60)
            time.sleep(0.3)  # for one that should not come
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most, names


@pytest.mark.parametrize("number", [1, 2])
def test_as_many_tasks_hold_a_device_as_there_are_slots(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "devices", lambda: ["cpu"])
    monkeypatch.setenv("LEWIS_DEVICE_SLOTS", str(number))
    assert held_at_once(4, number) == (number, {"cpu"})


def test_each_gpu_is_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "devices", lambda: ["cuda:0", "cuda:1"])
    assert slots() == 2 and held_at_once(4, 2) == (2, {"cuda:0", "cuda:1"})
    monkeypatch.setenv("LEWIS_DEVICE_SLOTS", "3")  # two tasks on the first GPU
    with device_slot() as first, device_slot() as second, device_slot() as third:
        assert (first, second, third) == ("cuda:0", "cuda:1", "cuda:0")
    assert precision("cuda:1") == precision("cuda:0") == precision("cuda") != precision("cpu")


def test_several_gpus_are_gathered_by_one_task_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "devices", lambda: ["cuda:0", "cuda:1", "cuda:2"])
    monkeypatch.setenv("LEWIS_DEVICE_SLOTS", "4")  # two of the slots are of the first GPU
    names, done = [], []

    def work() -> None:
        with device_slot(gpus=3) as name:
            names.append(name)
            done.append(len(names))
            time.sleep(0.05)
            names.clear()

    with device_slot() as one:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert one == "cuda:0" and not any(count > 1 for count in done)
    for thread in threads:
        thread.join(120)
    assert done == [1, 1, 1]
    with device_slot(gpus=2) as two:
        assert two == "cuda:0,cuda:1"
    with pytest.raises(InputError, match=r"evaluate\.gpus: 4 GPUs are needed at once, but this machine has 3 of them"):
        device_slot(gpus=4).__enter__()
    monkeypatch.setattr(device, "devices", lambda: ["cpu"])
    with pytest.raises(InputError, match="but this machine has no GPU"):
        device_slot(gpus=2).__enter__()


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_slots_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_DEVICE_SLOTS", given)
    with pytest.raises(InputError, match=f"LEWIS_DEVICE_SLOTS: expected a whole number from 1 up, got '{given}'"):
        slots()


def test_the_slot_of_a_killed_holder_is_free_at_once(machine: Path, warm: WarmPython) -> None:
    code = (
        "import time, lewis_tasks.support.device_slot as d\n"
        "with d.device_slot(): print('HELD', flush=True), time.sleep(60)"
    )
    environment = {**os.environ, "TMPDIR": str(machine), "LEWIS_DEVICE_SLOTS": "1"}
    environment.pop("PREFECT_API_URL", None)
    holder = warm.run(code, [], folder=machine, environment=environment)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "HELD\n"
        taken = threading.Event()

        def take() -> None:
            with device_slot():
                taken.set()

        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.5)
        holder.kill()
        assert taken.wait(60)
        thread.join()
    finally:
        holder.kill()
        holder.communicate()


def test_a_task_that_waits_ends_when_it_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = threading.Event()
    monkeypatch.setattr(caching, "STOPPING", stopping)
    with device_slot():
        threading.Timer(0.3, stopping.set).start()
        with pytest.raises(LewisError, match="waiting for a device slot: stopped"), device_slot():
            pass


@pytest.fixture
def server(prefect_url: str) -> Iterator[str]:
    """The tests' server, at the end without a limit of slots."""
    with temporary_settings({PREFECT_API_URL: prefect_url, PREFECT_API_AUTH_STRING: KEY}):
        yield prefect_url
    httpx.delete(f"{prefect_url}/v2/concurrency_limits/{LIMIT}", headers=credentials())


def taken(url: str) -> int:
    return httpx.get(f"{url}/v2/concurrency_limits/{LIMIT}", headers=credentials()).json()["active_slots"]


def test_a_slot_is_a_part_of_the_servers_limit(
    server: str, machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with device_slot():  # no limit on the server: no word about it
        pass
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    limit = {"name": LIMIT, "limit": 1}
    httpx.post(f"{server}/v2/concurrency_limits/", json=limit, headers=credentials()).raise_for_status()
    with device_slot():
        assert taken(server) == 1
        other = machine / "other"
        other.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(other))  # another machine, with a free slot of its own
        waited = threading.Event()

        def work() -> None:
            with device_slot():
                waited.set()

        thread = threading.Thread(target=contextvars.copy_context().run, args=[work])
        thread.start()
        assert not waited.wait(1)
    assert waited.wait(120)
    thread.join()
    assert taken(server) == 0


def test_a_limit_of_none_is_waited_for(server: str, machine: Path) -> None:
    limits, held = f"{server}/v2/concurrency_limits", threading.Event()
    httpx.post(f"{limits}/", json={"name": LIMIT, "limit": 0}, headers=credentials()).raise_for_status()

    def work() -> None:
        with device_slot():
            held.set()

    thread = threading.Thread(target=contextvars.copy_context().run, args=[work])
    thread.start()
    computed = held.wait(1)
    httpx.patch(f"{limits}/{LIMIT}", json={"limit": 1}, headers=credentials()).raise_for_status()
    assert held.wait(120) and not computed
    thread.join()


def test_a_server_that_does_not_answer_stops_no_work(caplog: pytest.LogCaptureFixture) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), device_slot() as name:  # nobody listens
        assert name
    assert "does not answer" in caplog.text

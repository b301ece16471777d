"""Who holds the device and who waits: merges go before the trials of a search, and a person can see both."""

import errno
import logging
import os
import re
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lewis_flows.service.status_data import Part, Status
from lewis_flows.service.status_text import as_text
from lewis_tasks.support import device_queue, device_slot, events
from tests.flows.test_watch import until


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own with one device."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LEWIS_DEVICE_SLOTS", "1")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


def waiters(count: int) -> bool:
    return len([place for place in device_queue.queue() if not place.holds]) == count


def test_a_search_gives_way_between_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def work(name: str, gives_way: bool) -> None:
        monkeypatch.setattr(device_queue, "_what", lambda: name)
        with device_slot.device_slot(gives_way=gives_way):
            order.append(name)
            time.sleep(0.2)

    with device_slot.device_slot(gives_way=True):  # a trial
        threads = []
        for number, (name, gives_way) in enumerate((("next trial", True), ("merge", False), ("release", False)), 1):
            threads.append(threading.Thread(target=work, args=(name, gives_way)))
            threads[-1].start()
            until(lambda count=number: waiters(count))  # type: ignore[misc]
        held, *waits = device_queue.queue()
        assert held.holds and [(each.what, each.holds) for each in waits] == [
            ("next trial", False),
            ("merge", False),
            ("release", False),
        ]
        told = as_text(Status(parts=[Part(name="x", up=True, state="")], devices=[held, *waits]), datetime.now(UTC))
        assert re.search(r"process \d+ +holds one +\d+ s ago", told) and re.search(r"next trial +waits", told)
    for thread in threads:
        thread.join()
    assert order[2] == "next trial" and device_queue.queue() == []


def test_a_full_disk_does_not_fail_the_task_that_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """It failed runs whose work needed no place in the temporary folder."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with device_slot.device_slot() as device:
        assert device and device_queue.queue() == []


def test_the_note_of_who_died_is_removed(machine: Path) -> None:
    with device_queue.queued() as note:
        left = machine / f"lewis-device-{os.getuid()}" / "dead.json"
        left.write_text(note.place.model_dump_json())
        os.utime(left, (1, 1))
        (alive,) = device_queue.queue()
        assert alive == note.place and not left.exists()
    assert not device_queue.somebody_waits()


def test_a_long_wait_is_told_once_and_names_the_holder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(events, "post", lambda kind, _, payload, run: sent.append((kind, payload)))
    monkeypatch.setattr(events, "SHORT", timedelta(seconds=0.2))
    monkeypatch.setattr(events, "LONG", timedelta(seconds=0.3))
    with device_slot.device_slot(), caplog.at_level(logging.INFO):
        waits = threading.Thread(target=lambda: device_slot.device_slot().__enter__())
        waits.start()
        until(lambda: bool(sent))
        time.sleep(0.3)
    waits.join()
    ((kind, payload),) = sent
    held = f"which process {os.getpid()} holds since"
    assert kind == events.WAITING and "has waited 0 min for a device slot, " + held in payload["message"]
    assert caplog.text.count(f"waiting for a device slot, {held}") == 1


def test_a_short_wait_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with device_slot.device_slot(), caplog.at_level(logging.INFO):
        waits = threading.Thread(target=lambda: device_slot.device_slot().__enter__())
        waits.start()
        until(device_queue.somebody_waits)
        time.sleep(0.3)
    waits.join()
    assert "waiting" not in caplog.text

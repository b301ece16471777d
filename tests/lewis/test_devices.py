"""How many threads torch computes with."""

import threading
from typing import Any

import pytest
import torch

from lewis.devices import one_thread


def test_a_thread_that_enters_while_another_leaves_restores_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """It read the 1 of the other as the number to restore, and all threads that started later had one core."""
    real, before = torch.set_num_threads, torch.get_num_threads()
    left, second = threading.Event(), list[threading.Thread]()

    def enter() -> None:
        with one_thread():
            left.wait()

    def restore(number: int) -> None:
        if number == 3 and not second:
            second.append(threading.Thread(target=enter))
            second[0].start()
            second[0].join(0.2)  # it comes in here unless the first is waited for
        real(number)

    def number_of_a_new_thread() -> int:
        found = list[Any]()
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return int(found[0])

    real(3)
    monkeypatch.setattr(torch, "set_num_threads", restore)
    try:
        with one_thread():
            assert number_of_a_new_thread() == 1
        left.set()
        second[0].join()
        assert number_of_a_new_thread() == 3
    finally:
        left.set()
        real(before)

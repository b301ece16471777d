"""What the tasks share: keys by content, progress that can be stopped."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lewis.errors import InputError, LewisError, TransientError
from lewis_tasks.support import caching
from lewis_tasks.support.caching import RETRIES, ContentAddressed, Progress, slug, worth_reading


def key(inputs: dict[str, Any], **policy: Any) -> str:
    context: Any = SimpleNamespace(task=SimpleNamespace(name="measure"))
    return ContentAddressed(fields=("model", "set"), **policy).compute_key(context, inputs, {})


def test_a_key_covers_the_chosen_inputs_and_the_version_only() -> None:
    first = key({"model": {"a": 1, "b": Path("/x")}, "set": "s", "device": "cpu"})
    assert first == key({"model": {"b": Path("/x"), "a": 1}, "set": "s", "device": "cuda"})
    assert first != key({"model": {"a": 2, "b": Path("/x")}, "set": "s"})
    assert first != key({"model": {"a": 1, "b": Path("/x")}, "set": "s"}, version="2")
    assert "/" not in first and "." not in first


def test_a_key_of_numbers_covers_what_their_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, keys = {"model": "m", "set": "s"}, []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(caching, "default_device", lambda device=device: device)
        keys.append((key(inputs, device_of=caching.computing_in), key(inputs)))
    (on_cpu, first), (on_cuda, second) = keys
    assert on_cpu != on_cuda and first == second


def test_progress_ends_a_task_that_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = threading.Event()
    monkeypatch.setattr(caching, "STOPPING", stopping)
    report = Progress("merge", "merge x")
    report(0.5)
    stopping.set()
    with pytest.raises(LewisError, match="merge x: stopped"):
        report(0.6)


@pytest.mark.parametrize(
    ("error", "again"), [(TransientError("busy"), True), (InputError("wrong"), False), (LewisError("failed"), False)]
)
def test_only_what_can_heal_is_tried_again(error: Exception, again: bool) -> None:
    def result() -> None:
        raise error

    assert RETRIES["retry_condition_fn"](None, None, SimpleNamespace(result=result)) is again


def test_an_error_of_ours_is_logged_as_its_message() -> None:
    def record(message: str, error: Exception | None = None) -> logging.LogRecord:
        info = (type(error), error, None) if error else None
        return logging.LogRecord("prefect.task_runs", logging.ERROR, "", 0, message, None, info)

    ours, theirs = record("failed", InputError("wrong")), record("failed", KeyError("bug"))
    assert worth_reading(ours) and ours.exc_info is None
    assert worth_reading(theirs) and theirs.exc_info is not None
    full = record("failed", OSError(28, "No space left on device"))
    assert worth_reading(full) and full.exc_info is None
    assert not worth_reading(record("Finished in state NotReady(...)"))


def test_slugs_are_artifact_keys() -> None:
    assert slug("My Recipe_v1.5") == "my-recipe-v1-5" and slug("...") == "x"

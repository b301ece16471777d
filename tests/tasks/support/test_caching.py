"""What the tasks share: keys by content, progress that can be stopped."""

import logging
import re
import threading

import pytest
from prefect.states import Failed

from lewis.errors import InputError, LewisError, TransientError
from lewis.store import sealed_json
from lewis_tasks.support import caching
from lewis_tasks.support.caching import RETRIES, Progress, RecordSerializer, slug, worth_reading


def test_progress_ends_a_task_that_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = threading.Event()
    monkeypatch.setattr(caching, "STOPPING", stopping)
    report = Progress("merge", "merge x")
    report("tensor", 1, 2)
    stopping.set()
    with pytest.raises(LewisError, match="merge x: stopped"):
        report("tensor", 2, 2)


@pytest.mark.parametrize(
    ("error", "again"), [(TransientError("busy"), True), (InputError("wrong"), False), (LewisError("failed"), False)]
)
def test_only_what_can_heal_is_tried_again(error: Exception, again: bool) -> None:
    assert RETRIES["retry_condition_fn"](None, None, Failed(data=error)) is again


def test_an_error_of_ours_is_logged_as_its_message() -> None:
    def record(message: str, error: Exception | None = None) -> logging.LogRecord:
        info = (type(error), error, None) if error else None
        return logging.LogRecord("prefect.task_runs", logging.ERROR, "", 0, message, None, info)

    ours, theirs = record("failed", InputError("wrong")), record("failed", KeyError("bug"))
    assert worth_reading(ours) and ours.exc_info is None
    assert worth_reading(theirs) and theirs.exc_info is not None
    full = record("failed", OSError(28, "No space left on device"))
    assert worth_reading(full) and full.exc_info is None


@pytest.mark.parametrize("name", ["lewis.models.source.Gone", "lewis.gone.Gone"])
@pytest.mark.parametrize("several", [False, True])
def test_a_record_with_a_class_of_another_lewis_is_not_believed(name: str, several: bool) -> None:
    """Prefect gave its fields as a dict, and each run of the recipe failed with an AttributeError."""
    record = {"__class__": name, "data": {"folder": "x"}}
    blob = sealed_json.dumps({"result": [record] if several else record}, indent=None).encode()
    with pytest.raises(ValueError, match=f"this LEWIS has no class {name}"):
        RecordSerializer().loads(blob)


def test_slugs_are_artifact_keys() -> None:
    assert slug("My Recipe_v1.5") == "my-recipe-v1-5" and slug("...") == "x"
    assert (slug("Zürich"), slug("x_1")) == ("z-rich", "x-1")  # Latin, as it always was


def test_slugs_of_other_scripts_differ() -> None:
    """数学 and 代码 were both `x`."""
    found = [slug(name) for name in ("数学", "代码", "数学 7b", "代码 7b", "Жук")]
    assert len({*found}) == 5 and all(re.fullmatch("[a-z0-9-]+", each) for each in found)
    assert found[2].startswith("7b-") and slug("жук") == found[4]  # case alone makes no other key


@pytest.mark.parametrize("name", ["lewis.merging.run", "lewis_tasks.report", "lewis_flows.search"])
def test_what_the_library_the_tasks_and_the_flows_say_is_logged(name: str) -> None:
    """The scores of a search's trials were said at INFO by a logger that dropped them."""
    assert logging.getLogger(name).isEnabledFor(logging.INFO)

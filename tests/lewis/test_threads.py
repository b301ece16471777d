"""Threads know what their submitter knows, so that a log line of a thread reaches the run that it belongs to."""

import os
from contextvars import ContextVar
from pathlib import Path

import pytest

from lewis.models import source
from lewis.recipe.recipe import Recipe
from lewis.threads import ContextPool, cores

RUN: ContextVar[str] = ContextVar("run", default="none")


def test_context_variables_reach_the_threads() -> None:
    with ContextPool(2) as pool:
        for name in ("one", "two"):
            RUN.set(name)
            assert list(pool.map(lambda _: RUN.get(), range(4))) == [name] * 4


def test_a_system_that_does_not_say_which_cores_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS it was a traceback."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def test_models_are_pinned_in_the_run_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect warned of each line of the Hub's client: attempted to send logs to the API without a flow run id."""
    recipe = Recipe.parse("merge_method: linear\nmodels: [{model: org/a}, {model: org/b}]", root=tmp_path)
    monkeypatch.setattr(source, "pin", lambda *_: RUN.get())
    RUN.set("mine")
    assert source.pin_all(recipe) == (None, ["mine", "mine"])

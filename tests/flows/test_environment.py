"""What is in the environment before Prefect is imported."""

import os
from pathlib import Path

import pytest

from lewis_flows import environment


@pytest.mark.parametrize("given", [None, "", "http://127.0.0.1:1/api"])
def test_prefects_files_are_in_the_store_unless_a_server_is_named(
    home: Path, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_HOME", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "")  # so that the teardown undoes what is set
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv("PREFECT_API_URL", given)
    environment.prepare()
    assert os.environ.get("PREFECT_HOME") == (None if given else str(home / "prefect"))

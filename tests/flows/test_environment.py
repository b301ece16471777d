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


def test_paths_are_absolute_for_the_processes_of_the_service(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's worker starts each run in a temporary folder: what it made in `./store` there was lost."""
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    monkeypatch.chdir(tmp_path)
    made = {  # variable -> value, and what becomes of it
        "LEWIS_HOME": ("./store", f"{tmp_path}/store"),
        "LEWIS_RECIPES": (" recipes ", f"{tmp_path}/recipes"),
        "LEWIS_SERVE_PROGRAMS": ("/opt/programs", "/opt/programs"),
        "MLFLOW_TRACKING_URI": ("sqlite:///mlflow.db?timeout=9", f"sqlite:///{tmp_path}/mlflow.db?timeout=9"),
    }
    for name, (given, _) in made.items():
        monkeypatch.setenv(name, given)
    environment.prepare()
    assert {name: os.environ[name] for name in made} == {name: expected for name, (_, expected) in made.items()}
    for given in ("~nobody-of-this-name/store", ""):
        monkeypatch.setenv("LEWIS_RECIPES", given)
        environment.prepare()
        assert os.environ["LEWIS_RECIPES"] == given
    for given in ("http://127.0.0.1:5000", "sqlite:////var/mlflow.db", "sqlite:///:memory:"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        environment.prepare()
        assert os.environ["MLFLOW_TRACKING_URI"] == given

"""Secrets that Prefect keeps stand in for variables that are not set, and a recipe can have a token of its own."""

import os
from collections.abc import Iterator

import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, temporary_settings

from lewis.errors import InputError
from lewis_flows import secret_blocks
from lewis_flows.service import webhook

VARIABLES = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "LEWIS_WEBHOOK_SECRET")


@pytest.fixture(scope="module")
def saved(prefect_url: str) -> Iterator[None]:
    made = {
        secret_blocks.HUB_TOKEN: "hf_all",
        f"{secret_blocks.HUB_TOKEN}-my-recipe": "hf_mine",
        secret_blocks.MLFLOW_PASSWORD: "of mlflow\n",
        secret_blocks.WEBHOOK_SECRET: "of the hub",
    }
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        for name, value in made.items():
            Secret(value=value).save(name, overwrite=True)
        yield
        for name in made:
            Secret.delete(name)


@pytest.fixture
def blocks(saved: None, prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that the teardown undoes what is loaded
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield


def test_what_the_environment_has_not_is_taken_from_prefect(blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    secret_blocks.load_for_run("other")
    assert (os.environ["HF_TOKEN"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("hf_all", "of mlflow")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_worker")
    secret_blocks.load_for_run("other")
    secret_blocks.load_for_run(None)
    assert os.environ["HF_TOKEN"] == "hf_of_the_worker"
    secret_blocks.load_for_run("My_Recipe")  # its own counts first
    assert os.environ["HF_TOKEN"] == "hf_mine"


def test_a_token_of_a_recipe_in_another_script_is_not_that_of_another() -> None:
    names = [secret_blocks._own_block(recipe) for recipe in ("数学", "代码", "My_Recipe", "Zürich")]
    assert names[0] != names[1] and names[2:] == ["lewis-hub-token-my-recipe", "lewis-hub-token-z-rich"]


def test_a_secret_that_was_changed_in_prefect_is_taken_by_a_process_that_runs_on(blocks: None) -> None:
    """The receiver had the first one until it ended: it took that for a variable that is set."""
    secret_blocks.load_for_run(None)
    try:
        Secret(value="hf_new").save(secret_blocks.HUB_TOKEN, overwrite=True)
        secret_blocks.load_for_run(None)
        assert os.environ["HF_TOKEN"] == "hf_new"
        Secret.delete(secret_blocks.HUB_TOKEN)
        secret_blocks.load_for_run(None)
        assert "HF_TOKEN" not in os.environ
    finally:
        Secret(value="hf_all").save(secret_blocks.HUB_TOKEN, overwrite=True)


def test_the_receiver_asks_prefect_before_it_makes_a_secret(blocks: None, home: object) -> None:
    assert webhook._secret() == "of the hub"


def test_without_prefect_the_receiver_makes_no_secret_that_the_hub_does_not_know(
    home: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_WEBHOOK_SECRET", "")
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
        pytest.raises(InputError, match="the Prefect server, which may have the secret, does not answer"),
    ):
        webhook._secret()

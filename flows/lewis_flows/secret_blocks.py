"""Secrets that Prefect keeps: blocks of the type Secret, which stand in for environment variables that are not set.

| block | variable | read by |
| --- | --- | --- |
| `lewis-hub-token-RECIPE`, else `lewis-hub-token` | `HF_TOKEN` | runs of that recipe; of all recipes |
| `lewis-mlflow-password` | `MLFLOW_TRACKING_PASSWORD` | runs |
| `lewis-judge-key` | `LEWIS_JUDGE_KEY` | runs |
| `lewis-webhook-secret` | `LEWIS_WEBHOOK_SECRET` | the receiver |
| `lewis-serve-secret`, `lewis-serve-key` | `LEWIS_SERVE_SECRET`, `LEWIS_SERVE_KEY` | runs that serve |

Prefect encrypts them in its database. They are asked for by the process that needs them, and are then in its memory:
in no parameter, log, state or command line.
"""

import os
import re
from collections.abc import Mapping

from prefect.client.orchestration import get_client

from lewis import settings
from lewis_tasks.support.caching import beyond_latin, slug

HUB_TOKEN, MLFLOW_PASSWORD, WEBHOOK_SECRET = "lewis-hub-token", "lewis-mlflow-password", "lewis-webhook-secret"
_OF_RUNS = {
    HUB_TOKEN: "HF_TOKEN",
    MLFLOW_PASSWORD: "MLFLOW_TRACKING_PASSWORD",
    "lewis-judge-key": settings.JUDGE_KEY.name,
}
_OF_SERVING = {"lewis-serve-secret": settings.SERVE_SECRET.name, "lewis-serve-key": settings.SERVE_KEY.name}
_loaded = dict[str, str]()  # variable -> its value, as a block gave it to this process


def load_for_run(recipe: str | None) -> None:
    """Set environment variables to the secrets that a run needs, where the environment lacks them.

    Args:
        recipe: its name. A token that was made for this recipe is used in place of `HF_TOKEN`. None for a run that
            looks at all recipes.
    """
    own = _own_block(recipe) if recipe else ""
    found = _load(_OF_RUNS, own)
    if own in found:
        os.environ["HF_TOKEN"] = found[own]


def _own_block(recipe: str) -> str:
    """Return the name of the block with a recipe's own token, of lower-case letters, digits and dashes."""
    name = slug(recipe) if beyond_latin(recipe) else re.sub("[^a-z0-9]", "-", recipe.lower())
    return f"{HUB_TOKEN}-{name}"


def load_for_serving() -> None:
    """Set the variables of the secrets that sign webhooks and open servers, as far as there are blocks for them."""
    _load(_OF_SERVING)


def load_for_receiver() -> None:
    """Set the variable of the webhook's secret, if there is a block for it."""
    _load({WEBHOOK_SECRET: settings.WEBHOOK_SECRET.name})


def _load(variables: Mapping[str, str], *further: str) -> dict[str, str]:
    """Set variables that the environment lacks; return the existing secrets of these blocks and of `further` ones.

    A variable that an earlier call set is set again if its block has changed, and removed if the block is gone.
    """
    named, kind = {"name": {"any_": [*variables, *further]}}, {"slug": {"any_": ["secret"]}}
    wanted = {"block_documents": named, "block_types": kind, "include_secrets": True}
    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/block_documents/filter", json=wanted)
    given = {str(each["name"]): each["data"].get("value") for each in answer.json()}
    found = {name: value.strip() for name, value in given.items() if isinstance(value, str) and value.strip()}
    for block, name in variables.items():
        if os.environ.get(name, "") not in ("", _loaded.get(name)):
            continue
        if block in found:
            os.environ[name] = _loaded[name] = found[block]
        elif _loaded.pop(name, ""):
            os.environ.pop(name, None)
    return found

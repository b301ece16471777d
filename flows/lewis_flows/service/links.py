"""The addresses of a recipe's last run: its page and artifacts in Prefect, its version in MLflow, the Hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from pydantic import BaseModel

from lewis.errors import InputError
from lewis.registry import releases, versions
from lewis.store.secrets import PREFECT_KEY, UP_SERVE_KEY
from lewis_flows import prefect_runs, recipes_folder
from lewis_flows.service import credentials, note, servers
from lewis_flows.service.credentials import connected
from lewis_flows.service.recipes_page import KEY


class Links(BaseModel):
    """What `lewis open RECIPE` prints.

    Attributes:
        recipe: name of the recipe.
        state, message: of its last run; empty if there is none.
        ended: when that run ended; None if it goes on, or there is none.
        run: page of that run in Prefect.
        artifacts: key of an artifact of that run -> its page in Prefect.
        version, version_page: `uri` of the newest registered version, and its page in MLflow.
        champion, champion_page: the same of the champion.
        published: `org/name@commit` of the champion on the Hub; empty if it is not there.
        sign_in: server of `lewis up` -> the key or password that its pages ask for, and where that is.
    """

    recipe: str
    state: str = ""
    message: str = ""
    ended: datetime | None = None
    run: str = ""
    artifacts: dict[str, str] = {}
    version: str = ""
    version_page: str = ""
    champion: str = ""
    champion_page: str = ""
    published: str = ""
    sign_in: dict[str, str] = {}


class Pages(BaseModel):
    """What `lewis open` prints without a recipe: pages of the service by name, and `sign_in` as of `Links`."""

    pages: dict[str, str]
    sign_in: dict[str, str]


def pages() -> Pages:
    """Return the main pages of the service, those of Prefect first.

    Raises:
        InputError: if there is no Prefect server.
    """
    with server() as (_, ui):
        found = {"deployments": f"{ui}{servers.RECIPES}", "runs": f"{ui}/runs", "recipes": f"{ui}/artifacts/key/{KEY}"}
    mlflow = os.environ.get("MLFLOW_TRACKING_URI") or str(note.read().get("mlflow") or "")
    if mlflow.startswith("http"):
        found["models"] = f"{mlflow.rstrip('/')}/#/models{versions.MODE}"
    return Pages(pages=found, sign_in=_sign_in())


def _sign_in() -> dict[str, str]:
    """Return server of `lewis up` -> the key or password that its pages ask for, and where that is."""
    known, found = note.read(), dict[str, str]()
    if known and not os.environ.get("PREFECT_API_URL") and PREFECT_KEY.path().exists():
        found["Prefect"] = f"the key in {PREFECT_KEY.path()}"
    if user := known.get("mlflow_user"):
        found["MLflow"] = credentials.mlflow_asks_for(user)
    if url := known.get("champion"):
        found["Champion"] = f"the key in {UP_SERVE_KEY.path()}, at {url}/v1"
    return found


def links(recipe: str) -> Links:
    """Ask Prefect for the last run of a recipe, by its name in the folder or its path, and MLflow for its versions.

    Raises:
        InputError: if there is no such recipe, or no Prefect server.
        TransientError: if a server does not answer.
    """
    path = recipes_folder.find(recipe)
    found = Links(recipe=recipes_folder.name_of(str(path)), sign_in=_sign_in())
    with server() as (client, ui):
        if run := last_run(client, found.recipe):
            found.state, found.ended, found.run = run.state_name or "", run.end_time, f"{ui}/runs/flow-run/{run.id}"
            found.message = (run.state.message if run.state else None) or ""
            of_run = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
            newest = ArtifactSort.CREATED_DESC  # the artifact that people read first is written last
            shown = client.read_artifacts(artifact_filter=of_run, sort=newest)
            shown = [each for each in shown if each.key and each.type != "progress"]
            found.artifacts = {str(each.key): f"{ui}/artifacts/artifact/{each.id}" for each in shown}
    name = recipes_folder.registered_name(str(path))
    for number, each in enumerate(releases.merged(name) if name else []):
        uri, page = f"models:/{name}/{each.version}", versions.page(name, each.version)
        if not number:
            found.version, found.version_page = uri, page
        if "champion" in each.aliases:
            found.champion, found.champion_page, found.published = uri, page, each.published
    return found


@contextmanager
def server() -> Iterator[tuple[SyncPrefectClient, str]]:
    """Give a client of the running Prefect server, and the address of its pages.

    Raises:
        InputError: if no server is running, or it wants another key.
        TransientError: if the server does not answer.
    """
    url = servers.running()
    if not url:
        raise InputError("no Prefect server is running: start `lewis up`, or set PREFECT_API_URL")
    with connected(url), get_client(sync_client=True) as client:
        yield client, url.rstrip("/").removesuffix("/api")


def last_run(client: SyncPrefectClient, recipe: str) -> FlowRun | None:
    """Return the merge or search of a recipe that began last; None if there is none among the newest 2,000 runs.

    Skipped runs are left out: the server gives them a start time too, that at which another run began.
    """
    flows, newest = (prefect_runs.MERGE, prefect_runs.SEARCH), FlowRunSort.START_TIME_DESC
    begun, started = {"name": {"not_any_": [prefect_runs.SKIPPED]}}, {"is_null_": False}
    runs = prefect_runs.all_of_flows(client, flows, (), newest, state=begun, start_time=started)
    return next((run for run in islice(runs, 2000) if prefect_runs.recipe_of(run) == recipe), None)

"""Find out what the service is doing: ask each of its servers, the registry, and the Hub for each recipe."""

import os
from concurrent.futures import ThreadPoolExecutor

import httpx

from lewis import settings, store
from lewis.errors import LewisError
from lewis.redact import redacted
from lewis.registry import approval, releases
from lewis.registry.releases import Held
from lewis_flows import polls, recipes_folder
from lewis_flows.service import note
from lewis_flows.service.status_data import Input, Part, Status, Watched
from lewis_flows.service.status_runs import PATIENCE, ask_prefect
from lewis_tasks.support import device_queue


def status() -> Status:
    """Ask every part. One that does not answer is no error: the status says so."""
    known = note.read()
    api = os.environ.get("PREFECT_API_URL") or known.get("prefect") or ""
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or known.get("mlflow") or ""
    prefect, mlflow = _part("Prefect", api), _part("MLflow", tracking)
    if not tracking.startswith("http"):  # the registry is a file then: it needs no server
        mlflow = Part(
            name="MLflow", url=redacted(tracking) or str(store.home() / "mlflow"), up=True, state="no server; the files"
        )
    webhooks = _part("webhooks", settings.WEBHOOK_URL.get() or known.get("webhook") or "")
    found = Status(parts=[prefect, mlflow, webhooks], polled=polls.last())
    found.devices = device_queue.queue()
    if prefect.up:
        try:
            ask_prefect(found, api)
        except (httpx.HTTPError, LewisError) as error:
            found.unknown["runs"] = redacted(f"Prefect answers with an error: {error}")
    else:
        found.unknown["runs"] = f"Prefect {prefect.state}"
    try:
        names = recipes_folder.names()
    except LewisError as error:
        found.unknown["recipes"] = str(error)
        return found
    with ThreadPoolExecutor(8) as pool:
        found.recipes = list(pool.map(lambda name: _watched(name, mlflow), names))
    return found


def _part(name: str, url: str) -> Part:
    if not url:
        return Part(name=name, up=False, state="is not running; `lewis up` starts it")
    shown = redacted(url)
    try:
        answer = httpx.get(f"{url.removesuffix('/webhook').rstrip('/')}/health", timeout=PATIENCE)
        if answer.status_code == 200:
            return Part(name=name, url=shown, up=True, state="answers")
        state = f"answers with an error ({answer.status_code}); look at its log"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        state = f"does not answer ({type(error).__name__})"
    return Part(name=name, url=shown, up=False, state=state)


def _watched(name: str, mlflow: Part) -> Watched:
    """One recipe: what its champion holds, and the newest commits."""
    found = Watched(recipe=name)
    try:
        recipe = recipes_folder.load(name)
    except Exception as error:  # whatever is wrong with one recipe does not stop the others
        found.unknown.append(str(error))
        found.broken, found.registered = True, recipes_folder.registered_name(name)
        found.champion = _champion(found, mlflow)[1]
        return found
    heads: dict[str, str] = {}
    try:
        heads = releases.heads(recipe)
    except (LewisError, OSError) as error:
        found.unknown.append(f"the heads now: {error}")
    found.registered = recipe.register_as.model if recipe.register_as else ""
    champion, found.champion = _champion(found, mlflow)
    refs = [recipe.base_model, *(entry.model for entry in recipe.experts)]
    for ref in dict.fromkeys(ref for ref in refs if ref):
        found.inputs.append(Input(ref=ref, held=champion.commit_of(ref) if champion else None, head=heads.get(ref)))
    return found


def _champion(found: Watched, mlflow: Part) -> tuple[Held | None, str | None]:
    """The champion of what a recipe registers, and its version; why that could not be found out is noted."""
    try:
        if found.registered and not mlflow.up:  # MLflow's client would try again for minutes
            raise LewisError(f"MLflow {mlflow.state}")
        held = releases.merged(found.registered) if found.registered else []
    except (LewisError, OSError) as error:
        found.unknown.append(f"the champion: {error}")
        held = []
    champion = next((version for version in held if "champion" in version.aliases), None)
    waits = [
        version.version for version in held if version.verdict == approval.WAITING and "challenger" in version.aliases
    ]
    found.waiting = waits[0] if waits else None
    return champion, champion.version if champion else None

"""Handle deliveries of the Hub's webhooks: each is refused, ignored, known already, or announced to Prefect.

The payload has version 3 of the Hub's format; only the fields that are read here are checked.
"""

import base64
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any

import httpx
from huggingface_hub.utils import validate_repo_id
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lewis.errors import LewisError
from lewis.models.hub import client as hub
from lewis.redact import printable, redacted
from lewis_flows import prefect_runs, recipes_folder
from lewis_flows.release_event import announce, announced, hub_repos
from lewis_tasks.support import events
from lewis_tasks.support.patience import impatient

logger = logging.getLogger("lewis.webhook")

KEPT = 5.0  # seconds for which `Readiness` reuses an answer, so that frequent requests cause no load
_BRANCH = "refs/heads/main"
_KNOWN = timedelta(days=7)  # how long Prefect keeps events
_REMEMBERED = 4096  # repos, to recognise a release that is delivered again
_TIMEOUT = 4.0
Answer = tuple[int, dict[str, Any]]  # HTTP status, and the body as JSON data
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)  # ignores unknown keys: the Hub sends more, and may add some


class Event(_Part):
    """What happened to a repo (`action`), and to which part of it (`scope`)."""

    action: str
    scope: str


class Repo(_Part):
    """The repo of an event; `type` is `model`, `dataset` or `space`. Some old names have no `/`."""

    type: str
    name: str

    def may_be_followed(self) -> bool:
        """Whether a recipe can name this repo: `org/name`, with the characters that names of models have."""
        try:
            validate_repo_id(self.name)
        except ValueError:  # raised for `..` and the like too
            return False
        return re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", self.name) is not None


class UpdatedRef(_Part):
    """A branch or tag that moved; `oldSha` is null for a new one, `newSha` for a deleted one."""

    ref: str
    oldSha: Sha | None = None
    newSha: Sha | None = None


class Delivery(_Part):
    """The payload of a webhook of the Hub, with the fields that are read here."""

    event: Event
    repo: Repo
    updatedRefs: list[UpdatedRef] | None = None

    def push(self) -> UpdatedRef | str:
        """Return the push to the main branch of a model; if the delivery is of none, the reason as a text."""
        if self.repo.type != "model":
            return "not a model"
        if not self.repo.may_be_followed():
            return "no recipe can follow a repo of this name"
        if self.event.scope != "repo.content" or self.event.action not in ("update", "create"):
            return "not a change of the content"
        moved = [each for each in self.updatedRefs or [] if each.ref == _BRANCH and each.newSha]
        return moved[-1] if moved else "the main branch did not move"


class Receiver:
    """Takes deliveries whose sender is known to be the Hub; threads may share it."""

    def __init__(self, deploy: Callable[[], object] | None = None) -> None:
        """Start without known deliveries.

        Args:
            deploy: deploys the recipes if their folder has changed. It is called before a release is announced, as that
                starts no merge of a recipe without a deployment, such as one that was just added, or any recipe when
                the service has just started.
        """
        self._deploy = deploy
        self._taken: OrderedDict[str, str] = OrderedDict()  # repo -> its last release
        self._one_at_a_time = threading.Lock()  # of two simultaneous deliveries of one release, one is announced

    def take(self, body: bytes) -> Answer:
        """Announce the release that a delivery reports; the answer says what was done.

        Args:
            body: the body of the request, JSON as the Hub sends it.
        """
        try:
            delivery = Delivery.model_validate_json(body)
        except ValidationError as error:
            # Tell the field and the kind of error, not the value: the sender chose that.
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            return 422, {"status": "refused", "why": f"not a webhook payload of the Hub: {where}: {first['type']}"}
        push = delivery.push()
        if isinstance(push, str):
            # 200, because the Hub switches off a webhook that often answers with an error.
            return 200, {"status": "ignored", "why": push}
        try:
            with self._one_at_a_time:
                return self._announce(delivery.repo.name, push)
        except LewisError as error:
            logger.error("%s", printable(str(error)))
            return 503, {"status": "failed", "why": "the event could not be handed on; deliver it again"}

    def _announce(self, name: str, push: UpdatedRef) -> Answer:
        # Read the recipes for each delivery: the folder may have a new one.
        followers = dict(_followers(name))
        if not followers:
            return 200, {"status": "ignored", "why": "no recipe follows the main branch of this repo", "repo": name}
        new = str(push.newSha)
        paused, known, earlier = _ask(followers, new)
        if not followers.keys() - paused:  # once one is resumed, the poll announces it
            return 200, {"status": "ignored", "why": "the recipes that follow this repo are paused", "repo": name}
        about = {"repo": name, "new": new, "recipes": sorted(followers.keys() - paused)}
        if self._taken.get(name) == new:
            self._taken.move_to_end(name)
            return 200, {"status": "duplicate", **about}
        old = bool(earlier - paused) and _newest(name) not in (new, None)
        if old:
            known |= earlier
        unknown = {each: of for each, of in sorted(followers.items()) if each not in paused | known}
        if unknown and self._deploy:
            self._deploy()
        events = [announce(recipe, ref, repo, push.oldSha, new) for recipe, (repo, ref) in unknown.items()]
        if not old:
            self._taken[name] = new
            self._taken.move_to_end(name)
        if len(self._taken) > _REMEMBERED:
            self._taken.popitem(last=False)
        if not events:  # an old delivery, one that is repeated after a restart, or the poll was faster
            return 200, {"status": "duplicate", **about}
        return 202, {"status": "accepted", **about, "recipes": list(unknown), "events": events}


def _ask(followers: Mapping[str, tuple[str, str]], new: str) -> tuple[set[str], set[str], set[str]]:
    """Ask Prefect which recipes are paused, which had `new` as their last release, and which as an earlier one.

    `followers`: recipe -> repo and reference. If Prefect does not answer, the sets lack what it did not say.
    """
    paused, known, earlier = set[str](), set[str](), set[str]()
    try:
        with impatient(60) as client:
            since = events.now(client) - _KNOWN
            for recipe, (repo, ref) in followers.items():
                if prefect_runs.is_paused(client, recipe):
                    paused.add(recipe)
                payloads = (event.payload for event in announced(client, since, recipe, repo))
                commits = [each.get("new") for each in payloads if each.get("ref") == ref]
                if new in commits:
                    (known if commits[0] == new else earlier).add(recipe)
    except httpx.HTTPError:
        logger.info("Prefect does not say which recipes are paused, or which releases it knows")
    return paused, known, earlier


def _newest(repo: str) -> str | None:
    """The newest commit of a repo's main branch; None if the Hub does not say.

    An earlier commit that is delivered again is a new release if somebody took the later commits back.
    """
    try:
        if not hub.offline():
            with hub.errors(repo):
                return hub.api().model_info(repo, timeout=_TIMEOUT).sha
    except LewisError as error:
        logger.info("%s", printable(f"the newest commit is not known: {error}"))
    return None


def _followers(name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the recipes that follow a repo, each with the repo and the reference as the recipe writes them."""
    for recipe, content in recipes_folder.load_all().items():
        try:
            followed = list(hub_repos(content))
        except Exception as error:  # whatever is wrong with one recipe does not stop the others
            logger.error("%s", printable(f"recipe {recipe} is left out: {type(error).__name__}: {error}"))
            continue
        # The Hub accepts a repo's name in upper or lower case; its payload has the official spelling.
        yield from ((recipe, (repo, ref)) for repo, ref in followed if repo.lower() == name.lower())


class Readiness:
    """Checks that deliveries can be announced: needs the Prefect server, the key to it, and the folder of recipes.

    Threads may share it.
    """

    def __init__(self) -> None:
        self._lock, self._until, self._missing = threading.Lock(), 0.0, list[str]()

    def missing(self) -> list[str]:
        """Return the names of what does not work: `prefect`, `recipes`. Only the log says why, as anyone may ask."""
        with self._lock:
            if time.monotonic() >= self._until:
                before, found = self._missing, {"prefect": _prefect(), "recipes": _recipes()}
                self._missing = [name for name, why in found.items() if why]
                self._until = time.monotonic() + KEPT
                if self._missing != before:
                    told = "; ".join(f"{name}: {found[name]}" for name in self._missing)
                    logger.log(logging.WARNING if told else logging.INFO, "%s", printable(told or "ready"))
            return list(self._missing)


def _prefect() -> str:
    """What is wrong with the Prefect server; empty if it answers and takes the key."""
    secret = PREFECT_API_AUTH_STRING.value() or ""
    headers = {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"} if secret else {}
    try:
        status = httpx.get(f"{PREFECT_API_URL.value()}/admin/version", headers=headers, timeout=_TIMEOUT).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return redacted(f"{PREFECT_API_URL.value()} does not answer ({type(error).__name__})")
    if status == httpx.codes.UNAUTHORIZED:
        return "it refuses the key: set PREFECT_API_AUTH_STRING"
    return "" if status == httpx.codes.OK else f"it answers with status {status}"


def _recipes() -> str:
    """What is wrong with the folder of recipes; empty if it can be read."""
    try:
        recipes_folder.folder()
        recipes_folder.signature()
    except (LewisError, OSError) as error:
        return str(error)
    return ""

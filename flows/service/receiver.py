"""What becomes of a delivery of the Hub: refused, ignored, known already, or announced as a release to Prefect."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from lewis.errors import LewisError
from lewis.redact import printable
from lewis_flows import recipes_folder
from lewis_flows.release_event import announce, hub_repos
from lewis_flows.service.hub_payload import Delivery, UpdatedRef

logger = logging.getLogger("lewis.webhook")

_REMEMBERED = 4096  # releases, to recognise one that is delivered again

Answer = tuple[int, dict[str, Any]]
"""HTTP status, and the body as JSON data."""


class Receiver:
    """Takes deliveries whose sender is known to be the Hub; threads may share it."""

    def __init__(self) -> None:
        self._taken: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._one_at_a_time = threading.Lock()  # of two deliveries of one release at once, only one is the first

    def take(self, body: bytes) -> Answer:
        """Announce the release that a delivery tells of; the answer says what was done.

        Args:
            body: of the request, JSON as the Hub sends it.
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
        release = (name, new)
        about = {"repo": name, "new": new, "recipes": sorted(followers)}
        if release in self._taken:
            self._taken.move_to_end(release)
            return 200, {"status": "duplicate", **about}
        events = [announce(recipe, ref, repo, push.oldSha, new) for recipe, (repo, ref) in sorted(followers.items())]
        self._taken[release] = None
        if len(self._taken) > _REMEMBERED:
            self._taken.popitem(last=False)
        return 202, {"status": "accepted", **about, "events": events}


def _followers(name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """The recipes that follow a repo: each with the repo and the reference, as it writes them."""
    for recipe, content in recipes_folder.load_all().items():
        try:
            followed = list(hub_repos(content))
        except Exception as error:  # whatever is wrong with one recipe does not stop the others
            logger.error("%s", printable(f"recipe {recipe} is left out: {type(error).__name__}: {error}"))
            continue
        # The Hub takes a repo's name in any case; its payload has the official one.
        yield from ((recipe, (repo, ref)) for repo, ref in followed if repo.lower() == name.lower())

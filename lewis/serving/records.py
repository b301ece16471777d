"""Records of what is in service: a tag of the registered model for each target, so that every machine sees the same."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lewis import store
from lewis.errors import LewisError
from lewis.registry import tracking, versions
from lewis.registry.history import registered_model
from lewis.registry.versions import Version
from lewis.reports.canary import Canary, Step
from lewis.serving import slots

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "lewis.served."
CANARY = "lewis.canary."  # tag of a version, for each target that it was tried at step by step
MAX_WHY = 1500  # characters; MLflow keeps 5,000 of a tag


@dataclass(frozen=True)
class Failure:
    """A failed attempt to put a version into service at a target.

    Attributes:
        uri: of the version.
        why: what went wrong.
        time: UTC, ISO 8601.
        passes: whether the cause may pass by itself, as when a server does not answer.
    """

    uri: str
    why: str
    time: str
    passes: bool = False


@dataclass(frozen=True)
class Served:
    """The record of what one target has in service.

    Attributes:
        name: of the registered model.
        target: the target's label.
        kind: of the target.
        uri: of the version in service; empty if there is none yet.
        digest: of its merge.
        alias: the name that the server knows it by.
        since: when the target took it; UTC, ISO 8601.
        block: digest of the target's block in the recipe, as it was then.
        previous: `uri` of the version before; empty if there was none.
        previous_alias: the name that the server knows the version before by.
        checked: what the check of the server found; empty if none was made.
        failure: the newest attempt, if that failed.
        recipe: which serves the target, if several recipes may register the model (`register.group`); else empty.
    """

    name: str
    target: str
    kind: str
    uri: str = ""
    digest: str = ""
    alias: str = ""
    since: str = ""
    block: str = ""
    previous: str = ""
    previous_alias: str = ""
    checked: str = ""
    failure: Failure | None = None
    recipe: str = ""

    def took(self, uri: str, digest: str, alias: str, block: str, checked: str = "") -> "Served":
        """Return the record after the target took a version, which may be the one that it had."""
        other = uri != self.uri
        before = (self.uri, self.alias) if other else (self.previous, self.previous_alias)
        new = replace(self, uri=uri, digest=digest, alias=alias, block=block, checked=checked, failure=None)
        return replace(new, previous=before[0], previous_alias=before[1], since=_now() if other else self.since)

    def line(self) -> str:
        """A line for people: which version the target has, since when, and which one it did not take."""
        has = f"v{_number(self.uri)} since {_minute(self.since)}, as {self.alias}" if self.uri else "nothing yet"
        if self.kind == "local" and self.uri:
            here = slots.now()
            has += f", {here.share(self.alias)} % at {here.url}/v1" if here else ", while `lewis up --serve` runs"
        failed = ""
        if self.failure:
            why = " ".join(self.failure.why.split())  # it may have the output of a program
            failed = f"; v{_number(self.failure.uri)} failed {_minute(self.failure.time)}: {why}"
        return f"{self.target}{self.recipe and f' of {self.recipe}'}: {has}{failed}"

    def refused(self, uri: str, why: str, *, passes: bool = False) -> "Served":
        """Return the record after a failed attempt to serve a version; the version in service stays the same."""
        return replace(self, failure=Failure(uri, why[:MAX_WHY], _now(), passes))


def served(name: str = "") -> list[Served]:
    """Return the records of what all targets have in service, of one registered model or of all.

    Raises:
        InputError: if there is no such model, or this store was used with an MLflow that the environment does not name.
    """
    tracking.check_not_elsewhere()
    if not tracking.exists():
        return []
    with tracking.client("reading what is in service") as client:
        models = tracking.every(client.search_registered_models)
        names = [tracking.model_name(name)] if name else [each.name for each in models]
        return [each for of in names for each in read(client, of)]


def read(client: "MlflowClient", name: str) -> Iterator[Served]:
    """Yield the records of what the targets of a registered model have in service.

    Raises:
        LewisError: if a tag is no such record.
    """
    tags = registered_model(client, name).tags
    for key in sorted(each for each in tags if each.startswith(TAG)):
        try:
            found = _record(json.loads(tags[key]))
        except (ValueError, TypeError, AttributeError) as error:
            raise LewisError(
                f"{name}: its tag {key} in MLflow is no record of what is in service ({error}): a person or a newer "
                "LEWIS wrote it; remove it, and run `lewis serve` of its recipe, or install the newer one here"
            ) from error
        yield found


def _record(content: dict[str, Any]) -> Served:
    failure = content.pop("failure", None)
    found = Served(**content, failure=Failure(**failure) if failure else None)
    texts = list(content.values())
    if found.failure:
        datetime.fromisoformat(found.failure.time)
        texts += [found.failure.uri, found.failure.why]
    "".join(texts)  # raises if one is no text
    return found


def write(client: "MlflowClient", record: Served) -> None:
    """Write a record of a target, in place of its last one."""
    text = json.dumps(asdict(record), ensure_ascii=False)  # an escaped character would count as six
    client.set_registered_model_tag(record.name, _key(record), text)


def remove(client: "MlflowClient", record: Served) -> None:
    """Remove the record of a target that is no longer in the recipe."""
    client.delete_registered_model_tag(record.name, _key(record))


def _key(record: Served) -> str:
    of_recipe = f"/{store.digest(record.recipe)[:8]}" if record.recipe else ""  # a name may have more than a tag's key
    return f"{TAG}{record.target}{of_recipe}"


def write_canary(version: Version, target: str, steps: Sequence[Step], why: str = "") -> None:
    """Record a canary in a tag of its version; `why` says why that is not in service, and is empty if it is."""
    made = Canary(target, _now(), tuple(steps), why[:MAX_WHY])
    versions.tag(version, {f"{CANARY}{target}": json.dumps(asdict(made))})


def canary_of(version: Version, target: str) -> Canary | None:
    """Return the newest canary of a version at a target; None if there was none.

    Raises:
        LewisError: if the version's tag is no such record.
    """
    key = f"{CANARY}{target}"
    with tracking.client(f"reading the canary of {version.uri}") as client:
        text = client.get_model_version(version.name, version.version).tags.get(key)
    try:
        return Canary.of(json.loads(text)) if text else None
    except (ValueError, TypeError, KeyError) as error:
        raise LewisError(
            f"{version.uri}: its tag {key} in MLflow is no record of a canary ({error!r}); remove it"
        ) from error


def _number(uri: str) -> str:
    return uri.rpartition("/")[2]


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

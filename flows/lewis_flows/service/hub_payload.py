"""The payload of the Hub's webhooks, version 3: the part of it that is read here."""

from typing import Annotated

from huggingface_hub.utils import validate_repo_id
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_BRANCH = "refs/heads/main"


def _repo_name(name: str) -> str:
    validate_repo_id(name)  # refuses `..` and the like with a ValueError
    return name


RepoName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$"), AfterValidator(_repo_name)]
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)  # ignores unknown keys: the Hub sends more, and may add some


class Event(_Part):
    """What was done, and to what kind of thing."""

    action: str
    scope: str


class Repo(_Part):
    """The repo it was done to; `type` is `model`, `dataset` or `space`."""

    type: str
    name: RepoName


class UpdatedRef(_Part):
    """A branch or tag that moved; `oldSha` is null for a new one, `newSha` for a deleted one."""

    ref: str
    oldSha: Sha | None = None
    newSha: Sha | None = None


class Delivery(_Part):
    """One payload."""

    event: Event
    repo: Repo
    updatedRefs: list[UpdatedRef] | None = None

    def push(self) -> UpdatedRef | str:
        """The push to the main branch of a model; if it is none, the reason."""
        if self.repo.type != "model":
            return "not a model"
        if self.event.scope != "repo.content" or self.event.action not in ("update", "create"):
            return "not a change of the content"
        moved = [each for each in self.updatedRefs or [] if each.ref == _BRANCH and each.newSha]
        return moved[-1] if moved else "the main branch did not move"

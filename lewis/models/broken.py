"""The errors of a model whose content cannot be merged, and by what a commit of the Hub is known."""

import re

from lewis.errors import BrokenModelError, LewisError
from lewis.models.model import Model

COMMIT = re.compile(r"[0-9a-f]{40}")


def damaged(model: Model, why: str) -> LewisError:
    """The error of a model whose weights cannot be merged: if it is a commit of the Hub, only another one can help."""
    commit = model.key.partition(" as ")[0]
    if COMMIT.fullmatch(commit):
        return broken(f"{model.folder}", why, commit)
    return LewisError(f"{model.folder}: {why}; the model is damaged")


def broken(what: str, why: object, commit: str, how: str = "broken") -> BrokenModelError:
    """The error of a model, or a file of it, that is `broken` or `unusable` on the Hub, in a commit (40 hex digits)."""
    return BrokenModelError(
        f"{what} is {how} on the Hub itself, in commit {commit[:8]}: {why}; name another revision, or wait until its "
        "authors upload it again",
        commit,
    )

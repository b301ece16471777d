"""The errors of a model whose content cannot be merged, and by what a commit of the Hub is known."""

import re

from lewis.errors import BrokenModelError, LewisError
from lewis.models.model import Model

COMMIT = re.compile(r"[0-9a-f]{40}")


def damaged(model: Model, why: str) -> LewisError:
    """The error of a model whose weights cannot be merged: if it is a commit of the Hub, only another one can help."""
    commit = model.key.partition(" as ")[0]
    if COMMIT.fullmatch(commit):
        return broken(f"{model.folder}: {why}", commit)
    return LewisError(f"{model.folder}: {why}; the model is damaged")


def broken(why: str, commit: str) -> BrokenModelError:
    """The error of a model whose content is wrong as the Hub has it, in a commit (40 hex digits)."""
    return BrokenModelError(
        f"{why}; it is so on the Hub itself, in commit {commit[:8]}: name another revision, or wait until its authors "
        "upload it again",
        commit,
    )

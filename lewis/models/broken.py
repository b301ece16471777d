"""The errors for a model whose content cannot be merged, and the pattern of a Hub commit."""

import re

from lewis.errors import BrokenModelError, LewisError
from lewis.models.model import Model

COMMIT = re.compile(r"[0-9a-f]{40}")


def damaged(model: Model, why: str) -> LewisError:
    """Return the error for a model whose weights cannot be merged; for a Hub commit, it asks for another revision."""
    commit = model.key.partition(" as ")[0]
    if COMMIT.fullmatch(commit):
        return broken(f"{model.folder}", why, commit)
    return LewisError(f"{model.folder}: {why}; the model is damaged")


def broken(what: str, why: object, commit: str, how: str = "broken") -> BrokenModelError:
    """Return the error for a model or file that is `broken` or `unusable` on the Hub in a commit (40 hex digits)."""
    return BrokenModelError(
        f"{what} is {how} on the Hub itself, in commit {commit[:8]}: {why}; name another revision, or wait until its "
        "authors upload it again",
        commit,
    )

"""The exceptions of LEWIS, of two kinds: the input is wrong (exit code 2), or the work failed (exit code 1)."""

import difflib
from collections.abc import Iterable, Sequence

from lewis.redact import redacted


class LewisError(Exception):
    """The work failed while running (exit code 1). The message says what failed and what to do about it.

    Passwords in URLs are removed from the message, since it appears in states, notifications and logs.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


class InputError(LewisError, ValueError):
    """The input is wrong (exit code 2). It is never retried: only changed input can help."""


class BrokenModelError(InputError):
    """A model is broken on the Hub itself: only another commit can help.

    Attributes:
        commit: the broken commit, 40 hex digits.
    """

    def __init__(self, message: str, commit: str) -> None:
        super().__init__(message)
        self.commit = commit

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.commit)


class RecipeError(InputError):
    """A recipe has problems; `problems` lists them, each as a line that begins with its YAML path."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = tuple(map(redacted, (problems,) if isinstance(problems, str) else problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # pickle would pass the joined message, and so lose the list


class TransientError(LewisError):
    """A failure that may go away by itself, such as a busy server or a broken transfer: it is retried."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name, which suggests known names.

    Returns:
        `; did you mean ...?`; or `; expected one of ...` if no name is similar and there are at most 24; or nothing.
    """
    choices = sorted(names)
    close = difflib.get_close_matches(name, choices, n=1) if len(name) <= 200 else []
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(choices)}" if 0 < len(choices) <= 24 else ""

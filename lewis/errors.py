"""What can go wrong, in two kinds: the input is wrong (exit code 2), or the work failed half way (exit code 1)."""

from collections.abc import Sequence


class LewisError(Exception):
    """The work failed while running. The message says what failed and what to do about it."""


class InputError(LewisError, ValueError):
    """The input is wrong: running again without changing it cannot help, so it is never retried."""


class RecipeError(InputError):
    """One or more problems of a recipe, each a line that begins with its YAML path."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class TransientError(LewisError):
    """A failure that can heal by itself (a busy server, a broken transfer): worth a retry."""

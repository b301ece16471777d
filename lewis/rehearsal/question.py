"""The contract of a rehearsal: what a library is shown before expensive work, and what it says to that.

A question is asked in a child process (`lewis.rehearsal.child`), since the library takes seconds to import and
runs on files of others. The answer is plain data, which is kept in the store under the question's key.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Self

from lewis import store
from lewis.errors import InputError


class Refused(InputError):
    """A library refuses a config, an adapter or a task, or it does not fit the weights; the message names the key.

    Attributes:
        problems: the item of each question that is refused -> the message, which begins with the item.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("\n".join(problems.values()))
        self.problems = dict(problems)

    def __reduce__(self) -> tuple[type, tuple[dict[str, str]]]:
        return type(self), (self.problems,)


class UnfitError(Exception):
    """Raised by `ask` for what the library takes, but reports as unusable, such as missing weights."""


class DoubtError(Exception):
    """Raised by `ask` for a failure that our way of asking may have caused; it counts if a key of a file is to blame.

    Attributes:
        answer: what counts if none is.
        failure: what went wrong.
    """

    def __init__(self, answer: dict[str, Any], failure: Exception) -> None:
        super().__init__(str(failure))
        self.answer, self.failure = answer, failure


@dataclass(frozen=True)
class Question:
    """What a library is shown. A subclass adds no fields, since only these are sent to the child.

    Attributes:
        item: what a message calls it, such as a folder or the reference of a model.
        files: name -> text that the library is shown: config files, headers as JSON, task files. A refusal may name a
            key of those whose names end with .json, .yaml or .yml.
        settings: further plain JSON that decides the answer.
        place: a folder whose files `ask` reads, too; neither `item` nor `place` is part of the key.
        name: of the kind of question.
        semantics: to be raised when the same question would get another answer.
        libraries: distributions whose versions decide the answer; the first is the one that is asked.
        imports: modules of these libraries that take long to import; the child's server imports them once.
    """

    item: str
    files: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""

    name: ClassVar[str]
    semantics: ClassVar[int]
    libraries: ClassVar[tuple[str, ...]]
    imports: ClassVar[tuple[str, ...]] = ()

    @property
    def key(self) -> str:
        """Digest (64 hex digits) of everything that decides the answer."""
        return store.digest(
            {
                "name": self.name,
                "semantics": self.semantics,
                "files": dict(self.files),
                "settings": dict(self.settings),
                "versions": {library: version_of(library) for library in self.libraries},
                "python": platform.python_version(),
            }
        )

    @property
    def code(self) -> bool:
        """Whether `ask` runs code that a recipe or a model brings."""
        return False

    def ask(self) -> dict[str, Any]:
        """Show the library the files, in the child.

        Returns:
            Plain JSON data.

        Raises:
            UnfitError: for what the library takes and cannot use.
            DoubtError: for a failure that counts only if a key is to blame.
            Exception: whatever the library raises.
        """
        raise NotImplementedError

    def takes(self, answer: Mapping[str, Any]) -> bool:
        """Whether an answer says that the library knows the item; `blame` counts others as no answer."""
        return True

    def sizes(self) -> Sequence[int]:
        """Numbers that a key of a file may have had, such as the dimensions of tensors; `blame` tries them."""
        return ()

    def texts(self) -> Sequence[str]:
        """Texts that a key of a file may have, whatever it is for; `blame` tries them."""
        return ()

    def reads(self) -> Sequence[str]:
        """Folders and files that `ask` reads."""
        return [self.place] if self.place else []

    def with_file(self, name: str, text: str) -> Self:
        """The same question with another text of one file."""
        return replace(self, files={**self.files, name: text})


def version_of(library: str) -> str:
    """The version of an installed distribution; empty if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""

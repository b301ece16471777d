"""What the local Hub keeps: files by content, and repos whose commits are whole trees of them."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from starlette.responses import JSONResponse

LFS = re.compile(
    r"\.(safetensors|bin|pt|parquet|model)$"
)  # kept outside git: identified by SHA-256, not by git's SHA-1


class Blob(NamedTuple):
    """A stored file. `oid` is git's blob id (of the pointer, for an LFS file); `sha256` is the content's."""

    path: Path
    size: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @classmethod
    def of(cls, data: bytes, place: Path) -> "Blob":
        """A file that is kept in git itself."""
        return cls(place, len(data), _git_id(data), None)

    @classmethod
    def of_lfs(cls, sha256: str, size: int, place: Path) -> "Blob":
        """A file that git keeps only a pointer to."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(place, size, _git_id(pointer.encode()), sha256)


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits (each a whole tree), the names that point at them, and who may read."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    readers: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit id."""
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


class Refusal(Exception):
    """An error answer, with the header that the client reads the kind of error from."""

    def __init__(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self.response = JSONResponse({"error": message}, status, headers)

"""References to entries of the store: small, frozen, printable, checked against the disk when loaded."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from lewis.errors import LewisError
from lewis.store import entries


class Reference(BaseModel):
    """A small reference to files on disk; it cannot be made or loaded if its files are gone or cut short."""

    model_config = ConfigDict(frozen=True)


class JsonReference(Reference):
    """A reference to a JSON file of the store, which is whole if it has a value under the key `holds`."""

    holds: ClassVar[str]
    digest: str
    path: Path

    @model_validator(mode="after")
    def _on_disk(self) -> Self:
        if entries.entry(self.path, self.holds) is None:
            raise ValueError(f"{self.path} is gone or damaged")
        return self

    def content(self, key: str) -> Any:
        """Return the file's value under `key`.

        Raises:
            LewisError: if the file is gone or damaged, or has no such value.
        """
        found = entries.entry(self.path, key)
        if found is None:
            raise LewisError(f"{self.path} is gone or damaged; run again to make it")
        return found

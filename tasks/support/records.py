"""Prefect's records of finished tasks: small references as JSON, with a checksum: a damaged one is not believed.

Prefect takes a record that cannot be read as none, and runs the task, whose step finds what the store has.
"""

import json
from pathlib import Path
from typing import Any

from prefect.serializers import JSONSerializer
from pydantic import Field

from lewis.store import sealed_json
from lewis.store.kinds import Kind

_PATHS = ("path", "folder", "adapter", "base", "statistics")  # fields of references that are paths


class RecordSerializer(JSONSerializer):
    """Prefect's JSON of a task's result, with its checksum."""

    type: str = Field(default="lewis-record", frozen=True)

    def dumps(self, obj: Any) -> bytes:
        """The result as bytes."""
        return sealed_json.dumps({"result": json.loads(super().dumps(obj))}, indent=None).encode()

    def loads(self, blob: bytes) -> Any:
        """The result.

        Raises:
            ValueError: if the bytes are damaged, or what they refer to is.
        """
        return super().loads(json.dumps(sealed_json.loads(blob)["result"]).encode())


def _content(record: bytes) -> dict[str, Any]:
    """What a record holds under `result`, without making it a reference, which would note a use.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if LEWIS did not write it, or it is damaged.
    """
    return sealed_json.loads(json.loads(record)["result"].encode())


def _targets(record: Path) -> list[Path]:
    """The files and folders that a record refers to; none if LEWIS did not write it."""
    try:
        found = _content(record.read_bytes())["result"]
        named = list[str | None]()
        for fields in [each["data"] for each in (found if isinstance(found, list) else [found])]:
            named += [*map(fields.get, _PATHS), *fields.get("sizes", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [Path(name) for name in named if name]


# Files outside the store do not note their use.
RESULTS = Kind("results", "*", check=_content, notes_use=False, refers_to=_targets)
"""Prefect's records of finished tasks: one file for each key, which goes with what it refers to."""

"""Prefect's records of finished tasks: small references as JSON, with a checksum: a damaged one is not believed.

Prefect takes a record that cannot be read as none, and runs the task, whose step finds what the store has.
"""

import json
from typing import Any

from prefect.serializers import JSONSerializer
from pydantic import Field

from lewis.store import sealed_json


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

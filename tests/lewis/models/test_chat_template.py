"""One answer to what chat template a folder has, wherever a version of transformers keeps it."""

import json
from pathlib import Path

import pytest

from lewis.models.chat_template import FILE, PROCESSOR, SETTINGS, template_in

NAMED = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({FILE: "J", SETTINGS: {"chat_template": "S"}}, "J"),
        ({PROCESSOR: {"chat_template": "P"}, SETTINGS: {"chat_template": "S"}}, "P"),
        ({SETTINGS: {"chat_template": "S"}}, "S"),
        ({SETTINGS: {"chat_template": NAMED}}, "D"),
        ({SETTINGS: {"chat_template": NAMED[:1]}}, None),  # transformers would want its name
        ({SETTINGS: {"chat_template": 3}}, None),
        ({SETTINGS: ["chat_template"]}, None),
        ({SETTINGS: "{broken"}, None),
        ({FILE: b"\xff\xfe", SETTINGS: {"chat_template": "S"}}, "S"),
    ],
)
def test_the_template_of_a_folder(tmp_path: Path, files: dict[str, object], expected: str | None) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert template_in(tmp_path) == expected

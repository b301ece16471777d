"""One answer to what chat template a folder has, wherever a version of transformers keeps it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lewis.models.chat_template import FILE, PROCESSOR, SETTINGS, template_in, write_template

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


def test_a_template_is_written_next_to_settings_that_are_no_object(tmp_path: Path) -> None:
    """A merge of such a base ended with TypeError."""
    (tmp_path / SETTINGS).write_text('["chat_template"]')
    write_template(tmp_path, "J")
    assert template_in(tmp_path) == "J"


def test_files_are_utf_8_in_every_locale(tmp_path: Path) -> None:
    """An entry of the store counted as absent, a plan ended in a traceback, and a template could not be written."""
    code = (
        "import sys; from pathlib import Path; from lewis import store\n"
        "from lewis.models.chat_template import template_in, write_template\n"
        "from lewis.merging.vocabulary.tokens import _add_tokens, plain_entry\n"
        "folder, text = Path(sys.argv[1]), 'gr\\xfc\\xdfe'\n"
        "store.write_json(folder / 'tokenizer_config.json', {'chat_template': 'old', 'name': text})\n"
        "write_template(folder, text); store.write_json(folder / 'x.json', [text])\n"
        "assert template_in(folder) == text and store.read_json(folder / 'x.json') == [text]\n"
        "store.write_json(folder / 'tokenizer.json', {}); _add_tokens(folder, [plain_entry(text, 3)])\n"
        "assert store.read_json(folder / 'tokenizer.json')['added_tokens'][0]['content'] == text\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, env=os.environ | plain)
    assert done.returncode == 0, done.stderr.decode()

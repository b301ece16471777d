"""`lewis new` in a terminal: it asks for rows, shows the plan and what an inspection finds, and offers to run."""

import io
import json
import os
import pty
import re
import shutil
from pathlib import Path

import pytest

from lewis.inspection.draft import GENERAL, draft
from lewis.recipe.recipe import Recipe
from lewis_flows.cli.ask import rows_of
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.support.warm import WarmPython

PROGRAM = """
import os, sys
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
print(flush=True)
for stream in range(3):
    os.dup2(terminal, stream)
os.close(terminal)
from lewis_flows.cli.main import program
program()
"""


def typed(warm: WarmPython, arguments: list[str], asked: list[tuple[str, str]], folder: Path) -> tuple[int, str]:
    """Run `lewis` in a terminal of its own, and answer each question by its end; gives what it shows."""
    ours, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    with warm.run(PROGRAM, [os.ttyname(its), *arguments], folder=folder, environment=environment) as process:
        assert process.stdout and process.stdout.readline()  # it has opened the terminal
        os.close(its)
        shown, left = "", list(asked)
        while True:
            try:
                part = os.read(ours, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                break
            shown += part
            if left and shown.rstrip().endswith(left[0][0]):
                os.write(ours, left.pop(0)[1].encode() + b"\n")
        os.close(ours)
        assert not left, shown
        return process.wait(60), shown


@pytest.mark.slow
def test_it_asks_for_rows_and_shows_what_it_found(
    home: Path, lm_eval_tasks: Path, family: Family, tmp_path: Path, warm: WarmPython
) -> None:
    shutil.copytree(lm_eval_tasks.parent, home / lm_eval_tasks.parent.name)
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i + 2}", "level": "1"} for i in range(20)]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "two.csv").write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    asked = [
        ("[gsm8k, by its name or card]:", "gone.jsonl"),
        ("[gsm8k, by its name or card]:", "one/train.jsonl"),
        ("[{question}]:", "Q: {question}\\nA:"),
        ("[{answer}]:", "{wrong}"),
        ("[{answer}]:", ""),
        ("[mbpp, by its name or card]:", "two.csv"),
        ("[{question}]:", ""),
        ("[{answer}]:", ""),
        ("run it now? [y/N]", "n"),
    ]
    arguments = ["new", str(family.base), *map(str, family.experts), "-o", "r.yaml"]
    code, shown = typed(warm, arguments, asked, tmp_path)
    assert code == 0, shown
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.lewis
    first, second = recipe.lewis.calibrations.values()
    assert first.prompt == "Q: {question}\nA:" and first.answer == "{answer}<eos>" and second.prompt == "{question}"
    assert first.data_files == str(tmp_path / "one" / "train.jsonl") and len(recipe.lewis.calibrations) == 2
    assert "columns: question, answer, level" in shown and "memory  about" in shown
    assert re.search("no findings|warnings?: ", shown)  # of an inspection, as the models are here


@pytest.mark.usefixtures("home")
def test_a_name_with_a_blank_is_quoted_in_the_commands_to_type(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my own.yaml"
    assert main(["new", str(family.base), str(family.math), "-o", str(file)]) == 0
    assert f"`lewis plan '{file}'`" in capsys.readouterr().out and "# lewis run 'my own.yaml' " in file.read_text()


@pytest.mark.parametrize("row", [{"text": "w1 w2"}, {"text": "w1 w2", "source": "web"}, {"body": "w1 w2"}])
def test_a_file_of_texts_is_no_prompt_that_is_its_own_answer(
    row: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path / 'rows.jsonl'}\n\n"))
    rows = rows_of("math", GENERAL)
    assert rows.prompt == "" and rows.answer == f"{{{next(iter(row))}}}"  # a `text` of the recipe


@pytest.mark.parametrize("name", ["2026_12_01", "no"])
def test_a_file_of_rows_may_have_a_name_that_yaml_takes_for_a_number_or_a_truth_value(
    name: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all questions, it ended with: models[0].calibration: input should be a valid string, got 20261201."""
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "w1", "answer": "w2"}))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path / name}.jsonl\n\n\n"))
    made = draft(str(family.base), [str(family.math)], tmp_path / "r.yaml", rows_of)
    recipe = Recipe.parse(made.text, root=tmp_path)
    assert recipe.lewis and list(recipe.lewis.calibrations) == [name] == [recipe.models[0].calibration]


def test_a_csv_of_a_spreadsheet_begins_with_a_mark_that_is_no_part_of_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe was refused by its first run: there is no column '\\ufeffquestion'."""
    (tmp_path / "rows.csv").write_text("question,answer\nw1,w2\n", encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path / 'rows.csv'}\n\n\n"))
    assert rows_of("math", GENERAL).prompt == "{question}"


@pytest.mark.parametrize("text", ["question,answer\n\n", "w1,w1\nw2,w2\n"])
def test_a_csv_of_a_header_alone_is_asked_for_again_and_one_name_is_one_column(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one made a recipe of no samples, which was refused after all questions; the other, a traceback."""
    (tmp_path / "rows.csv").write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path / 'rows.csv'}\n\n"))
    expected = GENERAL.answer if "question" in text else "{w1}"
    assert rows_of("math", GENERAL).answer == expected
    assert ("it has no rows with columns" in capsys.readouterr().out) == ("question" in text)

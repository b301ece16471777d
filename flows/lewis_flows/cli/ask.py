"""What `lewis new` asks in a terminal: the rows that each expert is good at, which no config says."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

from lewis.inspection.draft import GENERAL, SAMPLES, TOPICS, Topic

PROMPTS = ("prompt", "question", "instruction", "input", "text", "query")
ANSWERS = ("answer", "response", "output", "completion", "solution", "code")
_KINDS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_KNOWN = ", ".join(_KINDS)


def rows_of(ref: str, found: Topic) -> Topic:
    """Ask which rows an expert is good at; an empty answer takes what its name or card suggests, `found`."""
    topics = {topic.name: topic for topic in (*TOPICS, GENERAL)}
    why = "nothing says what it is good at" if found is GENERAL else "by its name or card"
    print(f"\n{ref}: which rows is it good at? Best are rows of its training, as a file: {_KNOWN}.")
    while True:
        given = _input(f"  a file, or one of {', '.join(topics)} [{found.name}, {why}]: ")
        if given in ("", *topics):
            return topics.get(given, found)
        path = Path(given).expanduser()
        if path.suffix not in _KINDS or not path.is_file():
            print(f"  {given}: expected a file that exists ({_KNOWN}), or one of these names")
            continue
        columns, count = _rows(path)
        if columns and count:
            return _of_file(path, columns, count, found)
        print(f"  {given}: it has no rows with columns")


def yes(question: str) -> bool:
    """Ask a yes-or-no question; an empty answer is no."""
    return _input(f"{question} [y/N] ").lower() in ("y", "yes")


def _of_file(path: Path, columns: list[str], count: int, found: Topic) -> Topic:
    """Return the topic of a file's rows, with templates that the user confirms; the task stays that of `found`."""
    name, kind = re.sub(r"\W+", "_", path.stem), _KINDS[path.suffix]
    own = replace(found, name=name, dataset=kind, files=str(path.absolute()), config=None, note="")
    own = replace(own, samples=min(SAMPLES, count))
    if "messages" in columns:
        return replace(own, prompt="", answer="", messages="messages")
    print(f"  columns: {', '.join(columns)}")
    prompt = next((name for name in PROMPTS if name in columns), columns[0])
    answer = next((name for name in ANSWERS if name in columns and name != prompt), None)
    if answer is None and (prompt == "text" or len(columns) == 1):  # one column has all of it
        return replace(own, prompt="", answer=_template("text", f"{{{prompt}}}", columns))
    answer = answer or next(name for name in reversed(columns) if name != prompt)
    return replace(
        own,
        prompt=_template("prompt", f"{{{prompt}}}", columns),
        answer=_template("answer", f"{{{answer}}}", columns),
    )


def _template(what: str, default: str, columns: list[str]) -> str:
    """Ask for a template of the format of the expert's training, until the answer names a column."""
    while True:
        given = _input(f"  {what} as the expert was trained on it, columns in braces, \\n a new line [{default}]: ")
        text = given.replace("\\n", "\n") or default
        if any(f"{{{name}" in text for name in columns):
            return text
        print(f"  expected one of {', '.join(f'{{{name}}}' for name in columns)} in it")


def _rows(path: Path) -> tuple[list[str], int]:
    """Return the columns of a file's first row, and the number of rows; none if the file cannot be read."""
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            found = ParquetFile(path)
            return list(found.schema_arrow.names), int(found.metadata.num_rows)
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin a CSV with a BOM
            if path.suffix == ".csv":
                first, *others = filter(None, csv.reader(file))
                return list(dict.fromkeys(first)), len(others)
            row, rest = json.loads(file.readline()), sum(1 for line in file if line.strip())
    except (OSError, ValueError, csv.Error):
        return [], 0
    return (list(row), 1 + rest) if isinstance(row, dict) else ([], 0)


def _input(question: str) -> str:
    """A line that a person types, without blanks at its ends; empty at the end of the input."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""

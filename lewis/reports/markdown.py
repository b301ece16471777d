"""Markdown for any text: tables, code spans, links, pictures.

Names and references come from users, so they are put into code spans, in which Markdown and HTML have no effect.
"""

import base64
import re
from collections.abc import Mapping, Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|&~$])")
_SPAN_OR_TAG = re.compile(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)|(?<!\\)<")  # in a code span, `<` begins no HTML


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as a Markdown table; empty without rows. The first row decides the columns."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines: list[list[object]] = [[*columns], ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """Return any text as a code span on one line; its fence is longer than any sequence of backticks in the text."""
    line = " ".join(text.split()) or " "
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def block(text: str, language: str) -> str:
    """Return any text as a code block; its fence is longer than any sequence of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def plain(text: str) -> str:
    """Return any text on one line, with everything escaped that Markdown or HTML would interpret."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def picture(name: str, png: bytes) -> str:
    """Return a picture as a data URL inside the Markdown, so that no second file is needed."""
    return f"![{plain(name)}](data:image/png;base64,{base64.b64encode(png).decode()})"


def link(text: str, url: str) -> str:
    """Return a link with any text, to any address."""
    address = "".join(c if c.isalnum() or c in "-._~:/?#@!$&+,;=%" else f"%{ord(c):02X}" for c in url if c.isascii())
    return f"[{plain(text)}]({address})"


def _cell(value: object) -> str:
    line = " ".join(str(value).splitlines()).replace("|", "\\|")
    return _SPAN_OR_TAG.sub(lambda found: found[0] if found[1] else "\\<", line)

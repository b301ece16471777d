"""Texts on how two models answer the same documents: both answers side by side, and where the merged model is worse."""

from collections.abc import Callable, Mapping, Sequence

from lewis.evaluation.documents import Document, SideBySide
from lewis.reports.markdown import code, markdown_table, plain

SHOWN, LOST = 20, 5  # documents in the tables
LAYERS = (
    "The layers that moved most: the norm of the expert's task vector, relative to the base's weights; and how much of "
    "it is kept."
)


def answer_rows(found: SideBySide) -> list[dict[str, str]]:
    """Return a row for each of the first `SHOWN` documents: prompt, right answer and both answers, each with its mark.

    The documents on which the two differ come first. There are no rows if the texts were not kept.
    """
    rows = []
    for each in found.shown()[:SHOWN]:
        assert each.texts is not None
        ours, theirs = each.texts
        row = {"task": each.name[0], "end of the prompt": ours.prompt, "expected": ours.target}
        row[f"answer of {found.reference}"] = f"{_mark(each.theirs, each)} {theirs.answer}"
        row[f"answer of {found.ours}"] = f"{_mark(each.ours, each)} {ours.answer}"
        rows.append(row)
    return rows


def answers_text(found: SideBySide) -> str:
    """Format the rows of `answer_rows` as Markdown, with the number of documents; empty if there are no rows."""
    rows = answer_rows(found)
    if not rows:
        return ""
    known = sum(each.texts is not None for each in found.documents)
    differ = sum(bool(each.gain) for each in found.documents)
    text = (
        f"{len(rows)} of the {known} documents whose answers were kept; those that differ in score come first. "
        f"Of all {len(found.documents)} documents {differ} differ in score."
    )
    return f"{text}\n\n{_blocks(rows)}"


def losses_text(found: SideBySide, layers: Sequence[Mapping[str, str]] = ()) -> str:
    """Describe as Markdown why the merged model is worse; empty if it is not worse on any document.

    Args:
        layers: rows of `lewis.reports.tables.moved_rows`.
    """
    rows = lost_rows(found)
    if not rows:
        return ""
    lines = "\n".join(f"* {line}" for line in loss_lines(found, code))
    first = f"The first {LOST} that are lost:" if len(found.lost()) > LOST else ""
    parts = [lines, first, _blocks(rows)]
    if layers:
        table = markdown_table([{name: code(cell) for name, cell in row.items()} for row in layers])
        parts += [LAYERS, table]
    return "\n\n".join(part for part in parts if part)


def loss_lines(found: SideBySide, mark: Callable[[str], str] = str) -> list[str]:
    """Return a sentence for each metric on which documents are lost: how many, and which experts are better on them.

    Args:
        mark: formats a name, for example as a code span.
    """
    lines = []
    for key in dict.fromkeys(each.key for each in found.documents):
        of_metric = [each for each in found.documents if each.key == key]
        if worse := [each for each in of_metric if each.gain < 0]:
            gained = sum(each.gain > 0 for each in of_metric)
            lines.append(
                f"{mark(key)}: {len(worse)} of {len(of_metric)} documents are lost against {mark(found.reference)}; "
                f"gained: {gained}.{_experts(found, worse, mark)}"
            )
    return lines


def lost_rows(found: SideBySide) -> list[dict[str, str]]:
    """Return a row for each of the first `LOST` documents on which the merged model is worse."""
    return [_lost_row(found, each) for each in found.lost()[:LOST]]


def _experts(found: SideBySide, worse: Sequence[Document], mark: Callable[[str], str]) -> str:
    if not found.experts:
        where = f"{mark('experts')} in {mark('evaluate.baselines')}"
        return f" With {where}, the next report says which expert has them right."
    counts = {label: sum(label in each.had for each in worse) for label in found.experts}
    listed = ", ".join(f"{mark(label)} on {number}" for label, number in counts.items())
    return f" There the experts are better: {listed}; none on {sum(not each.had for each in worse)}."


def _lost_row(found: SideBySide, document: Document) -> dict[str, str]:
    row, answer = {"task": document.name[0]}, _mark(document.ours, document)
    if document.texts:
        ours = document.texts[0]
        row |= {"end of the prompt": ours.prompt, "expected": ours.target}
        answer += f" {ours.answer}"
    else:
        row["document"] = document.name[1]
    row[f"answer of {found.ours}"] = answer
    return row | ({"experts that are better": ", ".join(document.had)} if found.experts else {})


def _mark(value: float, of: Document) -> str:
    """Return ✓ (right) or ✗ (wrong) for a document's value of 0 or 1; any other value in brackets."""
    if value in (0, 1):
        return "✓" if (value == 1) == of.higher_is_better else "✗"
    return f"({value:.3g})"


def _blocks(rows: Sequence[Mapping[str, str]]) -> str:
    """Each row as a list, since Prefect's page does not wrap the cells of a table; empty cells are left out."""
    blocks = []
    for number, row in enumerate(rows, 1):
        lines = [f"* {plain(name)}: {code(cell)}" for name, cell in row.items() if cell]
        blocks.append(f"**{number}.**\n\n" + "\n".join(lines))
    return "\n\n".join(blocks)

"""The text of a row of a calibration set, and where the answers are in it: by templates, or by a chat template."""

import re
import string
from collections.abc import Mapping
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Any, NamedTuple

from lewis.errors import InputError
from lewis.recipe.schema import CalibrationSet

MAX_FIELDS = 100  # of a template, each of four digits of width at most: with more, a text could take gigabytes
_MARK = re.compile(r"\{%-?\s*generation\b")
_KINDS = {list: "a list", tuple: "a list", dict: "a mapping", bytes: "bytes"}
Spans = tuple[tuple[int, int], ...]  # where each begins and ends, in characters


class Text(NamedTuple):
    """A text, where its answers begin and end, and whether the tokenizer adds its special tokens to it."""

    content: str
    answers: Spans
    special: bool = True

    def tokens(self, encode: Any, spec: CalibrationSet) -> tuple[list[int], list[float]]:
        """Token ids and how much each counts: 1 where it, or the one that it predicts, is of an answer."""
        alike = spec.prompt_weight == 1
        offsets = {} if alike else {"return_offsets_mapping": True}
        try:
            found = encode(self.content, truncation=False, add_special_tokens=self.special, **offsets)
        except NotImplementedError as error:  # a tokenizer in Python has no offsets
            raise InputError(
                "this model's tokenizer does not say which characters a token is of (it has no tokenizer.json), so "
                "prompts cannot be distinguished from answers; set weight: {prompt: 1}"
            ) from error
        ids: list[int] = found["input_ids"][: spec.max_tokens]
        if alike:
            return ids, [1.0] * len(ids)
        of_answer = [
            any(start < end and end > first and start < last for first, last in self.answers)
            for start, end in found["offset_mapping"]
        ]
        counts = [here or after for here, after in zip_longest(of_answer, of_answer[1:], fillvalue=False)]
        weights = [1.0 if one else spec.prompt_weight for one in counts]
        return ids, weights[: spec.max_tokens]


def text_of(where: str, spec: CalibrationSet, row: Any, tokenizer: Any) -> Text:
    """The text of a row.

    Args:
        where: what to call the set in errors.
        spec: its block.
        row: of the dataset; a text if the texts are given inline.
        tokenizer: of the base, which may have a chat template.

    Raises:
        InputError: naming the key that does not fit the row.
    """
    if isinstance(row, str):
        return Text(row, ())
    if spec.messages:
        return _chat(where, spec.messages, row, tokenizer)
    if spec.text:
        content = _fill(f"{where}.text", spec.text, row)
        begin = (
            len(content) if spec.prompt_weight == 1 else _begin_of_last_field(f"{where}.text", spec.text, row, content)
        )
        return Text(content, ((begin, len(content)),))
    prompt, answer = (_fill(f"{where}.{key}", getattr(spec, key) or "", row) for key in ("prompt", "answer"))
    return Text(prompt + answer, ((len(prompt), len(prompt + answer)),))


def _begin_of_last_field(where: str, template: str, row: Mapping[str, Any], content: str) -> int:
    """Where the last field of a template begins in the text that it was filled to."""
    parts = list(string.Formatter().parse(template))
    last = max((i for i, part in enumerate(parts) if part[1] is not None), default=len(parts))
    after = "".join(literal for literal, *_ in parts[last + 1 :])
    for _, field, form, conversion in parts[last : last + 1]:
        alone = "{" + (field or "") + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "") + "}"
        after = _fill(where, alone, row) + after
    return len(content) - len(after)


def _chat(where: str, column: str, row: Mapping[str, Any], tokenizer: Any) -> Text:
    """A chat as the chat template of the base writes it; the assistant's turns are its answers."""
    where = f"{where}.messages"
    if column not in row:
        raise InputError(f"{where}: there is no column {column!r}; the dataset has {', '.join(row)}")
    if not tokenizer.chat_template:
        raise InputError(f"{where}: the base's tokenizer has no chat template; write `prompt` and `answer` instead")
    turns = row[column]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    ):
        raise InputError(
            f"{where}: expected a list of turns with `role` and `content` in column {column!r}, got {turns!r:.80}"
        )

    try:
        marked = _MARK.search(str(tokenizer.get_chat_template()))
        content, answers = (_marked if marked else _found)(turns, tokenizer)
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"{where}: the base's chat template does not take a row: {' '.join(str(error).split())[:200]}"
        ) from error
    return Text(content, answers, special=False)


def _marked(turns: list[dict[str, Any]], tokenizer: Any) -> tuple[str, Spans]:
    """A chat and its answers, by a template that marks what an assistant writes (`{% generation %}`)."""
    offsets = {"tokenizer_kwargs": {"return_offsets_mapping": True}}
    tokens = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True, **offsets)
    places = zip(tokens["assistant_masks"], tokens["offset_mapping"], strict=True)
    runs = [list(run) for marked, run in groupby(places, key=itemgetter(0)) if marked]
    answers = tuple((run[0][1][0], run[-1][1][1]) for run in runs)
    return str(tokenizer.apply_chat_template(turns, tokenize=False)), answers


def _found(turns: list[dict[str, Any]], tokenizer: Any) -> tuple[str, Spans]:
    """A chat and its answers, by what the template adds for each turn of the assistant."""

    def written(count: int, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=ask))

    content, answers = written(len(turns)), list[tuple[int, int]]()
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = written(i, ask=True) if i else "", written(i + 1)
        said = str(turn["content"]).strip()
        if content.startswith(before) and content.startswith(after):
            answers.append((len(before), len(after)))
        elif i == len(turns) - 1:  # a template that shows the thoughts of the last turn alone
            answers.append((len(written(i)), len(content)))
        elif said and content.startswith(before) and (begin := content.find(said, len(before))) >= 0:
            # A template that writes this turn otherwise while it is the last.
            end, ends = begin + len(said), after[after.rfind(said) + len(said) :]
            answers.append((len(before), end + len(ends) * content.startswith(ends, end)))
    return content, tuple(answers)


def _fill(where: str, template: str, row: Mapping[str, Any]) -> str:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{where}: {template!r} is no template: {error}; write {{{{ for a brace") from error
    if len(parts) > MAX_FIELDS:
        raise InputError(f"{where}: expected at most {MAX_FIELDS} fields, got {len(parts)}")
    for _, field, format_spec, conversion in parts:
        if field is None:
            continue
        column = field.split("[")[0]
        if any(len(number.lstrip("0")) > 4 for number in re.findall(r"\d+", format_spec or "")):
            raise InputError(f"{where}: {{{field}:{format_spec}}}: expected a width of at most 9999 characters")
        if not column or "." in field or "{" in (format_spec or ""):
            raise InputError(f'{where}: {{{field}}}: expected names of columns, such as "{{question}} {{answer}}"')
        if column not in row:
            raise InputError(f"{where}: there is no column {column!r}; the dataset has {', '.join(row)}")
        value = _value_of(where, template, field, row)
        if not conversion and isinstance(value, list | tuple | dict | bytes):
            raise InputError(
                f"{where}: {{{field}}} is {_KINDS[type(value)]} in a row, expected a text or a number; name a "
                f"part of it ({{{field}[0]}}), or write {{{field}!s}} for its Python form"
            )
    try:
        return template.format_map({column: "" if value is None else value for column, value in row.items()})
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {template!r} cannot be filled from a row: {error}") from error


def _value_of(where: str, template: str, field: str, row: Mapping[str, Any]) -> Any:
    try:
        return string.Formatter().get_field(field, (), row)[0]
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {template!r} cannot be filled from a row: {error}") from error

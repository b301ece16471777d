"""Turn rows of a calibration set into texts, with the places of their answers, by templates or a chat template."""

import re
import string
from collections.abc import Mapping, Sequence
from datetime import datetime, time
from itertools import zip_longest
from typing import Any, NamedTuple

from lewis.errors import InputError
from lewis.importance.chats import Spans, render
from lewis.recipe.schema import CalibrationSet

MAX_FIELDS = 100  # of a template; a field's width has four digits at most: with more, a text could take gigabytes
_LEAST, _PER_TOKEN = 10_000, 64  # characters of a text that are tokenised first: at least, and for each token to keep
_KINDS = {list: "a list", tuple: "a list", dict: "a mapping", bytes: "bytes"}


class Text(NamedTuple):
    """A text, where its answers begin and end, and whether the tokenizer adds its special tokens to it."""

    content: str
    answers: Spans
    special: bool = True

    def tokens(self, encode: Any, spec: CalibrationSet) -> tuple[list[int], list[float]]:
        """Return token ids and their weights: 1 if a token or the next one is of an answer, else `prompt_weight`."""
        alike = spec.prompt_weight == 1
        offsets = {} if alike else {"return_offsets_mapping": True}
        length = max(_LEAST, _PER_TOKEN * spec.max_tokens)
        try:
            # Of a long text, only a part with twice the tokens to keep is tokenised: 90 MB took 7 GB and minutes.
            while True:
                found = encode(self.content[:length], truncation=False, add_special_tokens=self.special, **offsets)
                if length >= len(self.content) or len(found["input_ids"]) >= 2 * spec.max_tokens:
                    break
                length *= 4
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


def texts_of(where: str, spec: CalibrationSet, rows: Sequence[Any], tokenizer: Any) -> list[Text]:
    """Turn rows of a calibration set into texts.

    Args:
        where: what to call the set in errors.
        spec: the set's block of the recipe.
        rows: of the dataset; texts if these are given inline.
        tokenizer: of the base, which may have a chat template.

    Raises:
        InputError: naming the key that does not fit a row, or the base whose chat template does not take one.
    """
    if spec.messages:
        return _chats(where, spec.messages, rows, tokenizer)
    return [_text_of(where, spec, row) for row in rows]


def _text_of(where: str, spec: CalibrationSet, row: Any) -> Text:
    if isinstance(row, str):
        return Text(row, ())
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


def _chats(where: str, column: str, rows: Sequence[Any], tokenizer: Any) -> list[Text]:
    """Chats as the chat template of the base writes them; the assistant's turns are their answers."""
    where = f"{where}.messages"
    for row in rows:
        if column not in row:
            raise InputError(f"{where}: there is no column {column!r}; the dataset has {', '.join(row)}")
    if not tokenizer.chat_template:
        raise InputError(f"{where}: the base's tokenizer has no chat template; write `prompt` and `answer` instead")
    for turns in (row[column] for row in rows):
        if not (isinstance(turns, list) and turns) or not all(
            isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
        ):
            raise InputError(
                f"{where}: expected a list of turns with `role` and `content` in column {column!r}, got {turns!r:.80}"
            )
    try:
        template = str(tokenizer.get_chat_template())
        found = render(template, tokenizer.special_tokens_map, [row[column] for row in rows])
    except (InputError, ValueError) as error:  # of several templates, none is the default
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"{where}: the chat template of the base ({tokenizer.name_or_path}) does not take the rows: {why}"
        ) from error
    return [Text(content, answers, special=False) for content, answers in found]


def _fill(where: str, template: str, row: Mapping[str, Any]) -> str:
    parts = list(string.Formatter().parse(template))
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
            part = next(iter(value), 0) if isinstance(value, dict) else 0
            raise InputError(
                f"{where}: {{{field}}} is {_KINDS[type(value)]} in a row, expected a text or a number; name a "
                f"part of it ({{{field}[{part}]}}), or write {{{field}!s}} for its Python form"
            )
    try:
        return _Template().vformat(template, (), row)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {template!r} cannot be filled from a row: {error}") from error


class _Template(string.Formatter):
    """Fills in fields: nothing for a null, and the date alone for midnight, as which dates in JSON are read."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, column = super().get_field(field_name, args, kwargs)
        if isinstance(value, datetime) and value.tzinfo is None and value.time() == time():
            value = value.date()
        return "" if value is None else value, column


def _value_of(where: str, template: str, field: str, row: Mapping[str, Any]) -> Any:
    try:
        return _Template().get_field(field, (), row)[0]
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {template!r} cannot be filled from a row: {error}") from error

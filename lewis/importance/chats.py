"""Render chats with a chat template, and find their answers, in a separate process with limits on time and memory.

A template comes with a model, and may compute for hours or take all memory. The separate process reads a template and
chats as JSON, and writes the rendered chats. It ends at the latest when its parent ends.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from lewis import guard, private_names
from lewis.errors import InputError

# The date that templates write as today's, so that they write the same on every day. It is Llama 3.2's default.
DATE = datetime(2024, 7, 26)
MEMORY = 4 << 30  # bytes of address space
LONGEST = 1 << 28  # characters that all rendered chats of a set have together at most
_SECONDS, _OF_EACH = 60, 0.5  # seconds of CPU time: for all chats together, and in addition for each chat
_OUT_OF_TIME = 128 + 24  # exit code after SIGXCPU
_MARK = re.compile(r"\{%-?\s*generation\b")

Spans = tuple[tuple[int, int], ...]  # where each answer begins and ends, in characters
Turns = list[dict[str, Any]]


def render(template: str, special: Mapping[str, Any], chats: Sequence[Turns]) -> list[tuple[str, Spans]]:
    """Render each chat with a template, and find where its answers, the assistant's turns, are in the text.

    A template that asks for the date (`strftime_now`) gets `DATE`.

    Args:
        template: Jinja text.
        special: the tokenizer's special tokens, which a template may name.
        chats: turns with `role` and `content`.

    Raises:
        InputError: if the template refuses a chat, or needs too much time or memory.
    """
    seconds = int(_SECONDS + _OF_EACH * len(chats))
    request = {"template": template, "special": dict(special), "chats": chats, "seconds": seconds, "most": LONGEST}
    done = subprocess.run(
        guard.guarded([sys.executable, "-P", "-m", __name__], 0),
        input=json.dumps(request, default=str).encode(),
        capture_output=True,
    )
    if done.returncode == _OUT_OF_TIME:
        raise InputError(f"it computes for more than {seconds} s for {len(chats)} chats; is this a chat template?")
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        raise InputError(f"its process ended with exit code {done.returncode}: {words or 'out of memory?'}")
    answer = json.loads(done.stdout)
    if "problem" in answer:
        raise InputError(answer["problem"])
    return [(text, tuple((first, last) for first, last in spans)) for text, spans in answer["rendered"]]


class _Template:
    def __init__(self, template: str, special: Mapping[str, Any]) -> None:
        self._render, self._template, self._special = private_names.CHAT_TEMPLATES.get(), template, special
        self._marks = bool(_MARK.search(template))

    def render(self, turns: Turns) -> tuple[str, Spans]:
        # As transformers does: a key whose value is None counts as missing.
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        return self._marked(turns) if self._marks else self._found(turns)

    def _marked(self, turns: Turns) -> tuple[str, Spans]:
        """Render a chat with a template that marks the assistant's text (`{% generation %}`): these are its answers."""
        (content,), (spans,) = self._rendered(turns, return_assistant_tokens_mask=True)
        return content, tuple(spans)

    def _found(self, turns: Turns) -> tuple[str, Spans]:
        """Render a chat, and find its answers by the text that the template adds for each turn of the assistant."""

        def first(count: int, ask: bool = False) -> str:
            (content,), _ = self._rendered(turns[:count], add_generation_prompt=ask)
            return str(content)

        content, answers = first(len(turns)), list[tuple[int, int]]()
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before, after = first(i, ask=True) if i else "", first(i + 1)
            said = str(turn.get("content")).strip()
            if content.startswith(before) and content.startswith(after):
                answers.append((len(before), len(after)))
            elif i == len(turns) - 1:  # a template that shows thoughts in the last turn only
                answers.append((len(first(i)), len(content)))
            elif said and content.startswith(before) and (begin := content.find(said, len(before))) >= 0:
                # A template that renders a turn differently while it is the last one.
                end, ends = begin + len(said), after[after.rfind(said) + len(said) :]
                answers.append((len(before), end + len(ends) * content.startswith(ends, end)))
        return content, tuple(answers)

    def _rendered(self, turns: Turns, **options: Any) -> Any:
        return self._render(conversations=[turns], chat_template=self._template, **options, **self._special)


def main() -> None:
    """Render the chats of the request on standard input, within its limits, and write them to standard output."""
    request = json.load(sys.stdin)
    private_names.CHAT_CLOCK.put(SimpleNamespace(now=lambda: DATE))
    template = _Template(request["template"], request["special"])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"] + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer: dict[str, Any] = {"rendered": _render_all(template, request["chats"], request["most"])}
    except Exception as error:  # a template may raise anything
        answer = {"problem": " ".join(str(error).split())[:200] or type(error).__name__}
    json.dump(answer, sys.stdout)


def _render_all(template: _Template, chats: Sequence[Turns], most: int) -> list[tuple[str, Spans]]:
    found, length = list[tuple[str, Spans]](), 0
    for turns in chats:
        found.append(template.render(turns))
        length += len(found[-1][0])
        if length > most:
            raise ValueError(f"it makes more than {most:,} characters of {len(found)} chats")
    return found


if __name__ == "__main__":
    main()

"""Find the key of a file that makes a library refuse it, by asking again with another value; no key is known by name.

First each key is left out, then its number or text is replaced by those that the item suggests (`Question.sizes`,
`Question.texts`). A try takes milliseconds, as the library is imported.
"""

import copy
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import yaml

from lewis.rehearsal.question import DoubtError, Question, UnfitError, version_of

_SECONDS = 15.0  # of the processor, for all tries of one question
_WORDS = 300  # longest quotation of a library, in characters
_DEEP = 3  # keys of objects in objects are tried down to this depth
_LEFT_OUT = object()
_WORD = re.compile(r"[^\W\d]\w{2,}")
_Path = tuple[str, ...]


def refusal(question: Question, error: BaseException) -> str:
    """What a library said, as a message for the user, without the key."""
    said = sentence(error)
    if isinstance(error, UnfitError):
        return f"{question.item}: {said}"
    library = _speaker(question, error)
    return f'{question.item}: {library} {version_of(library)} says "{said}"'


def blamed(question: Question, error: BaseException) -> str | None:
    """The message of `refusal` with file and key, if there is a key without which the library takes the item."""
    found = _Search(question, sentence(error)).culprit()
    if found is None:
        return None
    message, begin = refusal(question, error), f"{question.item}: "
    file, path, end = found
    return f"{begin}{file}: {'.'.join(path)}: {message.removeprefix(begin)}{end}"


def sentence(error: BaseException) -> str:
    """An error's text on one line; with its kind in front where the text alone says little, such as `'nope'`."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # else it is in quotation marks
    text = " ".join(str(said).split())[:_WORDS]
    plain = isinstance(error, UnfitError) or " " in text
    return text if plain else f"{type(error).__name__}: {text}" if text else type(error).__name__


def _speaker(question: Question, error: BaseException) -> str:
    """The library whose code the error went through last; the one that is asked if it went through none."""
    packages = {library.replace("-", "_"): library for library in question.libraries}
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [packages[each] for each in (module.partition(".")[0] for module in modules) if each in packages]
    return names[-1] if names else question.libraries[0]


class _Search:
    """The tries for one question: the library is asked again until the time is over."""

    def __init__(self, question: Question, said: str) -> None:
        self._question, self._said = question, said
        self._files = {name: (content, write) for name, content, write in _contents(question)}
        self._deadline = time.process_time() + _SECONDS

    def culprit(self) -> tuple[str, _Path, str] | None:
        """The file, the key, and what to do; keys that the library names are tried first. None: no key by itself."""
        keys = [
            (not re.search(rf"(?<!\w){re.escape(path[-1])}(?!\w)", self._said), len(path), name, path)
            for name, (content, _) in self._files.items()
            for path in _paths(content)
        ]
        keys.sort(key=lambda each: each[:2])
        others = list[tuple[str, _Path]]()  # keys without which the library says something else
        for _, _, name, path in keys:
            said = self._without(name, path)
            if said == "":
                return name, self._narrowed(name, path), "; accepted without it"
            if said not in (None, self._said):
                others.append((name, path))
        for _, _, name, path in keys:
            if isinstance(value := _at(self._files[name][0], path), bool) and self._asked(name, path, not value) == "":
                return name, path, f"; accepted with {json.dumps(not value)}"
        if found := self._with_a_number([(name, path, bool(unnamed)) for unnamed, _, name, path in keys]):
            return found
        if found := self._with_a_text([(name, path) for _, _, name, path in keys]):
            return found
        if len(others) == 1:
            return (*others[0], "; without it the answer is another")
        return None

    def _narrowed(self, name: str, path: _Path) -> _Path:
        """The innermost key in a culprit's value that is enough to be left out."""
        value = _at(self._files[name][0], path)
        if isinstance(value, dict) and len(value) > 1 and len(path) < _DEEP:
            for key in value:
                if self._without(name, (*path, key)) == "":
                    return self._narrowed(name, (*path, key))
        return path

    def _with_a_number(self, keys: Sequence[tuple[str, _Path, bool]]) -> tuple[str, _Path, str] | None:
        """As `culprit`, for a key that should have another number: one in what was said, else the nearest."""
        sizes, said = sorted(set(self._question.sizes())), set(map(int, re.findall(r"\d+", self._said)))
        tries = list[tuple[int, int, str, _Path, int]]()
        for place, (name, path, unnamed) in enumerate(keys if sizes else ()):
            value = _at(self._files[name][0], path)
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if isinstance(value, bool | dict | list) or (unnamed and not is_number):
                continue
            number = value if is_number else 0
            if number > 0 and unnamed and self._asked(name, path, 2 * number) == self._said:
                continue  # the key has no part in it
            others = (each for each in sizes if each != value)
            near = sorted(others, key=lambda each: (each not in said, abs(each - number)))
            tries += [(rank, place, name, path, each) for rank, each in enumerate(near)]
        for _, _, name, path, number in sorted(tries):
            if self._asked(name, path, number) == "":
                return name, path, f"; accepted with {number}"
        return None

    def _with_a_text(self, keys: Sequence[tuple[str, _Path]]) -> tuple[str, _Path, str] | None:
        """As `culprit`, for a key that should have another text: one like it of the same file, or a suggested one.

        Keys whose texts share a word with what the library says are tried first.
        """
        said = set(_WORD.findall(self._said))
        tries = list[tuple[bool, int, str, _Path, str]]()
        for name, path in keys:
            content = self._files[name][0]
            value = _at(content, path)
            if value is None or isinstance(value, str):
                alike = get_close_matches(value or "", {*_words(content)} - {value}, n=2)
                unnamed = said.isdisjoint(_WORD.findall(value or ""))
                tries += [(unnamed, 0, name, path, text) for text in alike]
                tries += [(unnamed, 1, name, path, text) for text in self._question.texts() if text != value]
        for _, _, name, path, text in sorted(tries, key=lambda each: each[:2]):
            if self._asked(name, path, text) == "":
                return name, path, f"; accepted with {json.dumps(text)}"
        return None

    def _without(self, name: str, path: _Path) -> str | None:
        return self._asked(name, path, _LEFT_OUT)

    def _asked(self, name: str, path: _Path, value: Any) -> str | None:
        """What the library says with another value of a key: empty if it takes the item; None if the time is over."""
        if time.process_time() > self._deadline:
            return None
        content, write = self._files[name]
        changed = copy.deepcopy(content)
        block = _at(changed, path[:-1])
        if value is _LEFT_OUT:
            del block[path[-1]]
        else:
            block[path[-1]] = value
        question = self._question.with_file(name, write(changed))
        try:
            return "" if question.takes(question.ask()) else None
        except Exception as error:
            return sentence(error.failure if isinstance(error, DoubtError) else error)


def _at(content: Any, path: _Path) -> Any:
    for key in path:
        content = content[key]
    return content


def _contents(question: Question) -> Iterator[tuple[str, dict[str, Any], Callable[[Any], str]]]:
    """Yield name, content and writer of each file that holds an object in JSON or YAML."""
    for name, text in question.files.items():
        is_json = name.endswith(".json")
        if is_json or name.endswith((".yaml", ".yml")):
            with suppress(ValueError, yaml.YAMLError):
                content = json.loads(text) if is_json else yaml.load(text, Loader=_Loader)
                if isinstance(content, dict):
                    yield name, content, json.dumps if is_json else _write_yaml


def _paths(content: Mapping[str, Any], above: _Path = ()) -> Iterator[_Path]:
    """All keys of an object and of the objects in it."""
    for key, value in content.items():
        if isinstance(key, str):
            yield (*above, key)
            if isinstance(value, dict) and len(above) + 1 < _DEEP:
                yield from _paths(value, (*above, key))


def _words(content: Any) -> Iterator[str]:
    """All texts in a file's content, keys among them."""
    if isinstance(content, str):
        yield str(content)
    elif isinstance(content, dict | list):
        for each in (*content, *content.values()) if isinstance(content, dict) else content:
            yield from _words(each)


class _Tagged(str):
    """A scalar of YAML with a tag of its own, such as `!function`."""

    tag: str


class _Loader(yaml.SafeLoader):
    """Reads scalars with any tag as texts."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.YAMLError(f"a tag {tag} of something else than a text")
    value = _Tagged(node.value)
    value.tag = f"!{tag}"
    return value


_Loader.add_multi_constructor("!", _tagged)
_Dumper.add_representer(_Tagged, lambda dumper, value: dumper.represent_scalar(value.tag, str(value)))


def _write_yaml(content: Any) -> str:
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))

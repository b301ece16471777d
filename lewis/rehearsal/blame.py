"""Find the key of a file that makes a library refuse it, by asking again without each key; no key is known by name."""

import copy
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import yaml

from lewis.rehearsal.question import Question, UnfitError, version_of

_SECONDS = 20.0  # for all tries of one question
_WORDS = 600  # longest quotation of a library, in characters
_DEEP = 3  # keys of objects in objects are tried down to this depth
_Path = tuple[str, ...]


def refusal(question: Question, error: BaseException) -> str:
    """What a library said, as a message for the user, without the key."""
    said = sentence(error)
    if isinstance(error, UnfitError):
        return f"{question.item}: {said}"
    library = _speaker(question, error)
    return f'{question.item}: {library} {version_of(library)} says "{said}"'


def blamed(question: Question, error: BaseException) -> str:
    """The message of `refusal` with the file and the key without which the library takes the item, if there is one."""
    message, begin = refusal(question, error), f"{question.item}: "
    deadline = time.monotonic() + _SECONDS
    found = _culprit(question, sentence(error), deadline)
    if found is None:
        return message
    file, path = found
    return f"{begin}{file}: {'.'.join(path)}: {message.removeprefix(begin)}; accepted without it"


def sentence(error: BaseException) -> str:
    """An error's text on one line; with its kind in front where the text alone says little, such as `'nope'`."""
    text = " ".join(str(error).split())[:_WORDS]
    plain = isinstance(error, UnfitError) or (" " in text and not isinstance(error, KeyError))
    return text if plain else f"{type(error).__name__}: {text}" if text else type(error).__name__


def _speaker(question: Question, error: BaseException) -> str:
    """The library whose code the error went through last; the one that is asked if it went through none."""
    packages = {library.replace("-", "_"): library for library in question.libraries}
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [packages[each] for each in (module.partition(".")[0] for module in modules) if each in packages]
    return names[-1] if names else question.libraries[0]


def _culprit(question: Question, said: str, deadline: float) -> tuple[str, _Path] | None:
    """The file and the key without which the question is answered; those that the library names are tried first."""
    tries = [
        (not _named(path[-1], said), len(path), number, name, path)
        for number, (name, content, _) in enumerate(_contents(question))
        for path in _paths(content)
    ]
    for _, _, _, name, path in sorted(tries):
        if time.monotonic() > deadline:
            return None
        if _accepted_without(question, name, path):
            return name, _narrowed(question, name, path, deadline)
    return None


def _narrowed(question: Question, name: str, path: _Path, deadline: float) -> _Path:
    """The innermost key in a culprit's value that is enough to be left out."""
    content = next(content for each, content, _ in _contents(question) if each == name)
    value: Any = content
    for key in path:
        value = value[key]
    if isinstance(value, dict) and len(value) > 1 and len(path) < _DEEP:
        for key in value:
            if time.monotonic() < deadline and _accepted_without(question, name, (*path, key)):
                return _narrowed(question, name, (*path, key), deadline)
    return path


def _accepted_without(question: Question, name: str, path: _Path) -> bool:
    content, write = next((content, write) for each, content, write in _contents(question) if each == name)
    block = changed = copy.deepcopy(content)
    for key in path[:-1]:
        block = block[key]
    del block[path[-1]]
    try:
        question.with_file(name, write(changed)).ask()
    except Exception:
        return False
    return True


def _contents(question: Question) -> Iterator[tuple[str, dict[str, Any], Callable[[Any], str]]]:
    """Yield name, content and writer of each file that holds an object in JSON or YAML."""
    for name, text in question.files.items():
        for read, write in ((json.loads, json.dumps), (_read_yaml, _write_yaml)):
            with suppress(ValueError, yaml.YAMLError):
                content = read(text)
                if isinstance(content, dict):
                    yield name, content, write
                break


def _paths(content: Mapping[str, Any]) -> Iterator[_Path]:
    """The keys at the top, which are tried; `_narrowed` looks into their values."""
    for key in content:
        yield (str(key),)


def _named(key: str, said: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", said) is not None


class _Tagged(str):
    """A scalar of YAML with a tag of its own, such as `!function`."""

    tag: str


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.YAMLError(f"a tag {tag} of something else than a text")
    value = _Tagged(node.value)
    value.tag = f"!{tag}"
    return value


_Loader.add_multi_constructor("!", _tagged)
_Dumper.add_representer(_Tagged, lambda dumper, value: dumper.represent_scalar(value.tag, str(value)))


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _write_yaml(content: Any) -> str:
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))

"""The child process that asks the libraries: all questions of a call, one after another, inside walls and limits.

It has no network and no secrets (`lewis.walls`), a limit of memory beyond what the libraries take, and a limit of time
for each question. It is forked by a server that has imported the libraries, so that further questions of this process
cost no import.
"""

import importlib
import json
import os
import resource
import select
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import LewisError
from lewis.rehearsal.blame import blamed, refusal
from lewis.rehearsal.question import DoubtError, Question
from lewis.walls import isolation
from lewis.walls.fork_server import Child, Program, new_child, scratch_folder
from lewis.walls.isolation import without_secrets

MEMORY = 4 << 30
"""Bytes that a question may take beyond what the libraries take."""
SECONDS = 300.0
"""For one question, on a busy machine."""
_OFFLINE = {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")}
_imports: set[str] = set()  # of all questions that this process has asked


def ask_all(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Ask all questions in one child.

    Returns:
        For each question, `{"answer": ...}`, or `{"refused": message}`.

    Raises:
        LewisError: if the child cannot be started.
        InputError: as `isolation.check`, if a question runs code.
    """
    code = any(question.code for question in questions)
    if code:
        isolation.check()
    _imports.update(name for question in questions for name in question.imports)
    environment = without_secrets(os.environ) | _OFFLINE | {"CUDA_VISIBLE_DEVICES": ""}
    places = [Path(each) for question in questions for each in question.reads()]
    program = Program("lewis.rehearsal.child", tuple(sorted(_imports)))
    with scratch_folder() as scratch:
        child = new_child(program, environment, loaded=True, network=False, shown=places, code=code)
        try:
            child.send(
                {
                    "environment": environment | {"TMPDIR": str(scratch)},
                    "folder": str(scratch),
                    "questions": [_as_json(question) for question in questions],
                }
            )
            problem = _wait(child, scratch, len(questions))
        finally:
            child.end()
        return [_found(scratch, number, question, problem) for number, question in enumerate(questions)]


def _as_json(question: Question) -> dict[str, Any]:
    kind = type(question)
    fields = {"item": question.item, "files": dict(question.files), "settings": dict(question.settings)}
    return {"module": kind.__module__, "class": kind.__qualname__, "fields": {**fields, "place": question.place}}


def _wait(child: Child, scratch: Path, count: int) -> str:
    """Wait until the child has ended; return why it did not answer all questions, empty if it did."""
    done, said, deadline = 0, b"", time.monotonic() + SECONDS
    while child.poll() is None:
        while done < count and _answer_file(scratch, done).exists():
            done, deadline = done + 1, time.monotonic() + SECONDS
        if time.monotonic() > deadline:
            return f"gives no answer within {SECONDS:g} s"
        if select.select([child.stdout], [], [], 0.2)[0]:
            said = (said + os.read(child.stdout, 65536))[-2000:]
            if child.poll() is None:
                time.sleep(0.01)  # it may have closed its output
    ended = f"exit code {child.returncode}" if (child.returncode or 0) >= 0 else f"signal {-(child.returncode or 0)}"
    output = said.decode(errors="replace").strip().splitlines()
    return f"ends the process that asks ({ended})" + (f": {output[-1]}" if output else "")


def _found(scratch: Path, number: int, question: Question, problem: str) -> dict[str, Any]:
    """What the child wrote for a question; for one that ended it, a refusal."""
    for file in (_answer_file(scratch, number), _first_file(scratch, number)):
        if (found := store.read_json(file)) is not None:
            return dict(found)
    if number and not _answer_file(scratch, number - 1).exists():  # the child ended before this question
        [found] = ask_all([question])
        return found
    return {"refused": f"{question.item}: {question.libraries[0]} {problem}"}


def _answer_file(scratch: Path, number: int) -> Path:
    return scratch / f"answer-{number}.json"


def _first_file(scratch: Path, number: int) -> Path:
    """What the library said to a question, before the key is looked for."""
    return scratch / f"first-{number}.json"


def answer() -> None:
    """Read the request, and write a file for each question; the program of the child."""
    request = json.loads(sys.stdin.buffer.readline())
    os.environ.clear()
    os.environ.update(request["environment"])
    folder = Path(request["folder"])
    os.chdir(folder)
    questions = [_from_json(each) for each in request["questions"]]
    _limit_memory()
    for number, question in enumerate(questions):
        store.write_json(_answer_file(folder, number), _asked(question, _first_file(folder, number)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to take down the interpreter would copy most of the memory that the fork shares


def _asked(question: Question, first: Path) -> dict[str, Any]:
    """Ask; what the library says first is written to a file, in case the search for the key ends this process."""
    try:
        return {"answer": question.ask()}
    except MemoryError:
        return {"refused": f"{question.item}: {question.libraries[0]} needs more than {MEMORY >> 30} GB for it"}
    except DoubtError as error:
        store.write_json(first, {"answer": error.answer})
        message = blamed(question, error.failure)
        return {"refused": message} if message else {"answer": error.answer}
    except Exception as error:
        message = refusal(question, error)
        store.write_json(first, {"refused": message})
        return {"refused": blamed(question, error) or message}


def _from_json(given: Mapping[str, Any]) -> Question:
    kind: Any = importlib.import_module(given["module"])
    for name in given["class"].split("."):
        kind = getattr(kind, name)
    question: Question = kind(**given["fields"])
    return question


def _limit_memory() -> None:
    """Limit the memory that this process writes to, to `MEMORY` more than it has; only on Linux."""
    with suppress(OSError, ValueError, LewisError):
        status = Path("/proc/self/status").read_text()
        held = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))

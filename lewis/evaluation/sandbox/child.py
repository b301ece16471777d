"""What runs inside the sandbox: in one process a generated program, in another its tests.

`lewis.evaluation.sandbox` hands this file's text to a Python that sees no other file of LEWIS, so it imports only the
standard library. Each process first leaves the worker's keyring, sets its limits, and puts itself under the filter of
system calls. The two are connected by a socket. The program's process loads the program and then does what the tests'
process asks: call a function, or return the value of a name. The answers are pickles of plain data, which the tests'
process compares by itself. So a program can choose its answers, as it should, but not the verdict.
"""

import ast
import base64
import builtins
import collections
import ctypes
import datetime
import decimal
import errno
import fractions
import importlib
import io
import json
import operator
import os
import pickle
import pickletools
import resource
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

_BASES = (int, float, str, bytes, list, tuple, dict, set, frozenset)
_CLASSES = (
    *(*_BASES, type(None), bool, complex, bytearray, range, slice),
    *(collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque),
    *(decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone),
)
"""The classes of plain data: their comparisons are Python's own, whatever values they hold."""

_NAMES = {(each.__module__, each.__qualname__): each for each in _CLASSES}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, /, *arguments, **named: function(*arguments, **named),
    **{each.__name__: each for each in (getattr, setattr, iter, len, bool, str, repr, hash)},
    **{each.__name__: each for each in (operator.getitem, operator.setitem, operator.delitem, operator.contains)},
}


class _Program:
    """The program's process: answers requests about the program's objects."""

    def __init__(self, source: str) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self._objects: list[Any] = []  # by number: those that are not plain data, which stay here
        exec(compile(source, "program.py", "exec"), self.names)

    def answer(self, request: bytes) -> bytes:
        """Carry out a pickled request; return, pickled too, its value, or the kind and message of its error."""
        try:
            operation, arguments, named = self._read(request)
            if operation == "name":
                return self._write(("value", self.names[arguments[0]]))
            if operation == "next":
                try:
                    return self._write(("value", next(arguments[0])))
                except StopIteration:
                    return self._write(("end", None))
            return self._write(("value", _OPERATIONS[operation](*arguments, **named)))
        except BaseException as error:
            kinds = (each.__name__ for each in type(error).__mro__ if each.__module__ == "builtins")
            return self._write(("raised", (next(kinds), str(error))))

    def _read(self, request: bytes) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(request))
        unpickler.persistent_load = self._objects.__getitem__  # type: ignore[method-assign]
        return unpickler.load()

    def _write(self, answer: Any) -> bytes:
        out, objects = io.BytesIO(), self._objects

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> int | None:
                if type(value) in _CLASSES or isinstance(value, _BASES):
                    return None
                if isinstance(value, type) and value in _CLASSES:
                    return None
                objects.append(value)
                return len(objects) - 1

            def reducer_override(self, value: Any) -> Any:
                base = next((base for base in _BASES if isinstance(value, base) and type(value) not in _CLASSES), None)
                return NotImplemented if base is None else (base, (base(value),))

        Pickler(out, protocol=4).dump(answer)
        return out.getvalue()


class _Remote:
    """A stand-in for an object in the sandboxed program, such as a function; calls are sent to that program.

    Comparing it raises TypeError: the program could answer as it likes.
    """

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, /, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", self, key)

    def __contains__(self, value: Any) -> bool:
        return bool(self._ask("contains", self, value))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iter", self)
        while (each := self._ask("next", iterator)) is not _END:
            yield each

    def __next__(self) -> Any:
        if (each := self._ask("next", self)) is _END:
            raise StopIteration
        return each

    def __len__(self) -> int:
        return int(self._ask("len", self))

    def __bool__(self) -> bool:
        return bool(self._ask("bool", self))

    def __str__(self) -> str:
        return str(self._ask("str", self))

    def __repr__(self) -> str:
        return str(self._ask("repr", self))

    def _refuse(self, other: Any) -> bool:
        raise TypeError("the program's answer is no plain data, so it cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]


_END = object()  # an iterator of the program has no more values


class _Tests:
    """The tests in their process: passes what they do with the program's objects on to the program's process."""

    def __init__(self, exchange: Callable[[bytes], bytes]) -> None:
        self._exchange = exchange

    def run(self, tests: str, names: list[str]) -> None:
        """Run the tests; raise the error of the first one that fails."""
        code, modules = compile(tests, "tests.py", "exec"), _modules(tests)
        values = {name: self._value(name, modules) for name in _needed(code, names)}
        exec(code, {"__name__": "__main__", **values})

    def ask(self, operation: str, /, *arguments: Any, **named: Any) -> Any:
        """Send a request to the program's process; return the value that it answers.

        Raises:
            Exception: of the kind that the program raised, if that is a built-in one, else RuntimeError.
        """
        kind, value = self._read(self._exchange(self._write((operation, arguments, named))))
        if kind == "raised":
            name, words = value
            raise _exception(str(name))(str(words))
        return _END if kind == "end" else value

    def _value(self, name: str, modules: set[str]) -> Any:
        if name in modules:  # a program imports it for the tests; the tests get the real one
            return importlib.import_module(name)
        return self.ask("name", name)

    def _write(self, request: Any) -> bytes:
        out = io.BytesIO()
        pickler = pickle.Pickler(out, protocol=4)
        pickler.persistent_id = lambda value: value._number if type(value) is _Remote else None  # type: ignore
        pickler.dump(request)
        return out.getvalue()

    def _read(self, answer: bytes) -> Any:
        tests = self
        if any(each.name == "BUILD" for each, _, _ in pickletools.genops(answer)):  # of a class too, as its `__eq__`
            raise TypeError("the program's answer sets attributes, which is no plain data")

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                if (module, name) not in _NAMES:
                    raise TypeError(f"the program's answer names {module}.{name}, which is no plain data")
                return _NAMES[module, name]

            def persistent_load(self, number: Any) -> Any:
                return _Remote(tests.ask, number)

        return Unpickler(io.BytesIO(answer)).load()


def _needed(code: types.CodeType, names: list[str]) -> set[str]:
    """Which of the program's names the tests use.

    A built-in name stays Python's own, unless the tests use no other: then the function that they test has that name.
    """
    used, pending = set(), [code]
    for each in pending:
        used |= set(each.co_names)
        pending += [constant for constant in each.co_consts if isinstance(constant, types.CodeType)]
    used &= set(names)
    return {name for name in used if not hasattr(builtins, name)} or used


def _modules(tests: str) -> set[str]:
    """The names of standard modules that the tests use as modules are used: for their attributes alone.

    A program's function may have such a name, too. The tests decide which it is, since a program could lie.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    loads = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    others = {node.id for node in loads if id(node) not in owners}
    return set(sys.stdlib_module_names) - others


def _exception(name: str) -> type[Exception]:
    """The built-in exception of this name if it takes a single text and would not end a loop, else RuntimeError."""
    kind = getattr(builtins, name, None)
    usable = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
    return kind if usable and kind not in (StopIteration, StopAsyncIteration) else RuntimeError  # type: ignore


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class _Line:
    """The connection between the two processes. A message is its length, an unsigned 32-bit integer, and its bytes."""

    def __init__(self, socket: int) -> None:
        self._reader, self._writer = os.fdopen(socket, "rb"), os.fdopen(os.dup(socket), "wb")

    def receive(self) -> bytes:
        """The next message; EOFError if the other process has ended."""
        size = self._reader.read(4)
        data = self._reader.read(struct.unpack("=I", size)[0]) if len(size) == 4 else b""
        if not data:
            raise EOFError
        return data

    def send(self, data: bytes) -> None:
        self._writer.write(struct.pack("=I", len(data)) + data)
        self._writer.flush()

    def exchange(self, request: bytes) -> bytes:
        self.send(request)
        return self.receive()


def serve(source: str, line: _Line) -> None:
    """Load the program in this process, then answer the requests of the tests' process until that ends."""
    ours, program = os.getpid(), None
    loaded: dict[str, Any] = {}
    try:
        program = _Program(source)
        loaded["names"] = [name for name in program.names if isinstance(name, str)]
    except BaseException as error:
        loaded["problem"] = _message(error)
    if os.getpid() != ours:  # a process that the program forked
        os._exit(0)
    line.send(json.dumps(loaded).encode())
    while program:
        line.send(program.answer(line.receive()))


def judge(tests: str, line: _Line) -> dict[str, Any]:
    """Run the tests, in their process, once the program has loaded.

    Returns:
        the verdict: `began`, whether the program's process ever answered, and `problem`, None if all tests passed.
    """
    began = False
    try:
        loaded = json.loads(line.receive())
        began = True
        if "problem" in loaded:
            return {"began": True, "problem": str(loaded["problem"])}
        _Tests(line.exchange).run(tests, [str(name) for name in loaded["names"]])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return {"began": began, "problem": "ended early"}
    except BaseException as error:
        return {"began": True, "problem": _message(error)}
    return {"began": True, "problem": None}


def _leave_keys(keyctl: int) -> None:
    """Join a new session keyring, before anything else: a program could read the keys in the worker's keyring."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(keyctl, 1, None) < 0 and ctypes.get_errno() != errno.ENOSYS:  # 1: KEYCTL_JOIN_SESSION_KEYRING
        raise OSError(ctypes.get_errno(), "a new session keyring cannot be joined")


def _close_in(limits: dict[str, int], instructions: bytes) -> None:
    """Set the limits and the filter of system calls of this process: for good, and for all processes that it starts."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))

    class Filter(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    given = Filter(len(instructions) // 8, instructions)
    for option, *arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.byref(given), 0, 0)):  # NO_NEW_PRIVS, SECCOMP
        if libc.prctl(option, *arguments):
            raise OSError(ctypes.get_errno(), f"prctl({option}) is refused")


def main() -> None:
    """Serve the program of the request on standard input, or run its tests and write the verdict to standard output."""
    request = json.load(sys.stdin)
    _leave_keys(request["keyctl"])
    verdict, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
    _close_in(request["limits"], base64.b64decode(request["filter"]))
    os.chdir("/work")
    for stream in range(3):
        os.dup2(null, stream)
    line = _Line(request["socket"])
    if "program" in request:
        os.close(verdict)
        serve(request["program"], line)
    else:
        os.write(verdict, json.dumps(judge(request["tests"], line)).encode())
    os._exit(0)


if __name__ == "__main__":
    main()

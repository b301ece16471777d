"""Tests judge a program through a line of messages: honest programs pass as in one interpreter, no other does."""

import socket
import threading
from contextlib import suppress

import pytest

from lewis.errors import InputError
from lewis.evaluation import sandbox
from lewis.evaluation.sandbox.child import _Line, judge, serve


def verdict(program: str, tests: str) -> str | None:
    """What the tests' process says of a program that runs here, in a thread."""
    its, ours = socket.socketpair()

    def program_process() -> None:
        with suppress(EOFError):
            serve(program, _Line(its.detach()))

    thread = threading.Thread(target=program_process, daemon=True)
    thread.start()
    found = judge(tests, _Line(ours.detach()))
    assert found["began"]
    problem = found["problem"]
    assert problem is None or isinstance(problem, str)
    return problem


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return [x, (x,), {x: {x}}, None, 1.5, 2j, b'b', 'é', frozenset([x]), range(x)]",
         "assert f(2) == [2, (2,), {2: {2}}, None, 1.5, 2j, b'b', 'é', frozenset([2]), range(2)]"),
        ("from collections import *\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("from collections import *\ndef f():\n d = defaultdict(list)\n d[1].append(2)\n return d",
         "assert f() == {1: [2]}"),
        ("from collections import *\nP = namedtuple('P', 'x y')\ndef f(): return [P(1, 2)]", "assert f() == [(1, 2)]"),
        ("from collections import *\ndef f(): return OrderedDict(a=1), deque([1])",
         "from collections import deque\nassert f() == ({'a': 1}, deque([1]))"),
        ("import enum\nclass E(enum.IntEnum): A = 1\ndef f(): return E.A", "assert f() == 1"),
        ("from fractions import *\nfrom decimal import *\ndef f(): return Fraction(1, 3), Decimal('0.1')",
         "from fractions import Fraction as F\nfrom decimal import Decimal as D\nassert f() == (F(1, 3), D('0.1'))"),
        ("import datetime\ndef f(): return datetime.date(2020, 1, 2)", "assert f() == datetime.date(2020, 1, 2)"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0"),
        ("def f(): return iter('ab')", "it = f()\nassert next(it) == 'a' and [*it] == ['b'] and next(it, 9) == 9"),
        ("def f(x): raise KeyError(x)", "try: f(1)\nexcept KeyError: pass\nelse: assert 0"),
        ("class E(ValueError): pass\ndef f(): raise E('no')",
         "try: f()\nexcept ValueError as e: assert str(e) == 'no'"),
        ("class N:\n    def __init__(self, v): self.v, self.next = v, None\n"
         "def total(n): return n.v + total(n.next) if n else 0",
         "a = N(1)\na.next = N(2)\nassert total(a) == 3 and a.v == 1 and a.next.v == 2"),
        ("class B(list): pass\nclass C:\n    def __len__(self): return 2\n    def __bool__(self): return False\n"
         "    def __contains__(self, x): return x == 3\n    def __getitem__(self, i): return i\n"
         "    def __str__(self): return 'c'\n"
         "    def __setitem__(self, i, v): self.v = v\n    def __delitem__(self, i): self.v = -1",
         "c = C()\nassert len(c) == 2 and not c and 3 in c and c[7] == 7 and str(c) == 'c'\n"
         "c[0] = 5\nassert c.v == 5\ndel c[0]\nassert c.v == -1 and B([1]) == [1] and repr(c).startswith('<')"),
        ("def sum(a, b): return a * b", "assert sum(3, 4) == 12"),
        ("import math\ndef f(): return 0.1 + 0.2", "assert math.isclose(f(), 0.3)"),
        ("LIMIT = 3\ndef f(candidate): return candidate + LIMIT",
         "def check(candidate):\n    assert candidate(1) == 4\n    assert LIMIT == 3\ncheck(f)"),
        ("if __name__ == '__main__':\n    x = 1", "assert x == 1"),
        ("def queue(n): return n + 1", "assert queue(1) == 2"),
        ("import math\ndef bisect(x): return x / 2",
         "def check(candidate): assert math.isclose(candidate(1), 0.5)\ncheck(bisect)"),
    ],
)  # fmt: skip
def test_honest_programs_pass(program: str, tests: str) -> None:
    assert verdict(program, tests) is None
    exec(program + "\n" + tests, {"__name__": "__main__"})  # as in one interpreter


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def f(): return 4", "assert f() == 5", "AssertionError"),
        ("def f(): return 4", "assert g() == 5", "NameError"),
        ("class Any:\n    def __eq__(self, other): return True\ndef f(): return Any()", "assert f() == 5", "TypeError"),
        ("class Any:\n    def __eq__(self, other): return True\ndef f(): return [Any()]",
         "assert f() == [5]", "TypeError"),
        ("class Any:\n    def __ne__(self, other): return True\ndef f(): return Any()", "assert f() != 5", "TypeError"),
        ("class Any:\n    def __gt__(self, other): return True\ndef f(): return Any()", "assert f() > 5", "TypeError"),
        ("class Any:\n    def __hash__(self): return 5\ndef f(): return Any()", "assert f() in {5}", "TypeError"),
        ("class Any(int):\n    def __eq__(self, other): return True\ndef f(): return Any(4)",
         "assert f() == 5", "Assertion"),
        ("def f(x): raise StopIteration", "assert all(map(f, [1])) and False in map(f, [1])", "RuntimeError"),
        ("def f(x): raise StopIteration", "assert [*map(f, [1])] == []", "RuntimeError"),
        ("import sys\ndef f(): sys.exit(0)", "assert f() == 5", "RuntimeError"),
        ("import builtins\nbuiltins.AssertionError = ValueError\ndef f(): return 4\n",
         "assert f() == 5", "AssertionError"),
        ("def isinstance(*a): return True\ndef len(x): return 5\ndef f(): return 4",
         "assert len([f()]) == 5", "Assertion"),
        ("class math:\n    isclose = lambda *a: True\ndef f(): return 4",
         "assert math.isclose(f(), 5)", "AssertionError"),
        ("def f(g): return g", "assert f(lambda: 1)", "PicklingError|AttributeError"),
        ("raise ValueError('é')", "", "ValueError: é"),
        ("def f(:", "", "SyntaxError"),
    ],
)  # fmt: skip
def test_programs_that_are_wrong_or_cheat_do_not(program: str, tests: str, reason: str) -> None:
    import builtins

    kept = builtins.AssertionError
    try:
        problem = verdict(program, tests)
    finally:
        builtins.AssertionError = kept  # type: ignore[misc]
    assert problem and any(each in problem for each in reason.split("|")), problem


def test_the_built_in_names_are_not_the_programs() -> None:
    """Unless the function under test has such a name."""
    assert verdict("def sum(a): return 0\ndef f(x): return x", "assert sum(f([3, 4])) == 7") is None


WIRE = """
import json, os, struct, time
names = json.dumps({"names": ["f"]}).encode()
evil = b"cposix\\nsystem\\n(S'touch /work/x'\\ntR."
fine = b"\\x80\\x04\\x8c\\x05value\\x94K\\x05\\x86\\x94."
answer = {answer}
message = b"".join(struct.pack("=I", len(each)) + each for each in (names, answer, answer))
for number in range(3, 64):
    try:
        os.write(number, message)
    except OSError:
        pass
time.sleep(600)
"""


# Replaces the program's process's answers, to let a class of plain data compare as the program likes.
EQUALS_ALL = r"""
import __main__
def f(): pass
def answer(self, request):
    kind, arguments, _ = self._read(request)
    if kind == "name":
        return self._write(("value", f))
    if arguments[0] is not f:
        return self._write(("value", True))
    self._objects.append(answer)
    return (b"\x80\x04\x8c\x09fractions\x8c\x08Fraction\x93N}\x8c\x06__eq__K\x01Qs\x86b0"
            b"\x8c\x05value\x8c\x09fractions\x8c\x08Fraction\x93)R\x86.")
__main__._Program.answer = answer
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nos._exit(0)", "ended early"),
        (EQUALS_ALL, "sets attributes"),
        # Walk up the frames and through all objects for anything that would end the tests well.
        ("import sys, gc, os\nframe = sys._getframe()\nwhile frame:\n    for value in [*frame.f_locals.values()]:\n"
         "        if isinstance(value, (str, bytes)):\n            for n in range(3, 20):\n                try:\n"
         "                    os.write(n, value.encode() if isinstance(value, str) else value)\n"
         "                except OSError: pass\n    frame = frame.f_back\nos._exit(0)", ""),
        (WIRE.replace("{answer}", "evil"), "posix.system, which is no plain data"),
        (WIRE.replace("{answer}", "b'{\"began\": true, \"problem\": null}'"), ""),
        ("import os, json\nfor n in range(3, 64):\n    try:\n"
         "        os.write(n, json.dumps({'began': True, 'problem': None}).encode())\n"
         "    except OSError: pass\nos._exit(0)", ""),
    ],
)  # fmt: skip
def test_no_program_forges_its_pass(program: str, reason: str) -> None:
    try:
        sandbox.check()
    except InputError as error:
        pytest.skip(str(error))
    outcome = sandbox.run(program, "assert f() == 6", timeout_s=60)
    assert not outcome.passed and reason in outcome.reason

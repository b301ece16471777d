"""What the tests of killed runs and of a killed service share: who is killed, when, and what has to be right after it.

Each kind of kill has POINTS points: three in five hit `lewis run`, the others `lewis up`, which takes twice as long. A
kill that ends the run is followed by a run of the same recipe, which the next kill hits, until a test has no more of
them; then it may end. A kill that finds its victim gone is no point, and is tried again in a new run. After each kill
no process is left and no traceback was printed. Digest and bytes of a run that ends are those of a run that nobody
disturbed, and there is one version, which is the champion.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import POINTS
from tests.faults.running import Tally, half_done, logged_weights, merged, until
from tests.support.service import children

GROUP, ALL, SERVER, EVALUATION, WORKER = "group", "everything", "prefect_app", "harness.child", "worker start"
OF_A_RUN = {
    "the group, SIGKILL": (GROUP, signal.SIGKILL),
    "every process, SIGKILL": (ALL, signal.SIGKILL),
    "the Prefect server, SIGKILL": (SERVER, signal.SIGKILL),
    "the evaluation's child, SIGKILL": (EVALUATION, signal.SIGKILL),
    "the group, SIGTERM": (GROUP, signal.SIGTERM),
    "the group, SIGINT": (GROUP, signal.SIGINT),
}
OF_THE_SERVICE = {**OF_A_RUN, "the worker, SIGKILL": (WORKER, signal.SIGKILL)}
"""Who is killed, and by what."""
PARTS = 10
"""How many tests share the points of each of them."""


@dataclass
class Undisturbed:
    """What nobody disturbed: the model, and for each victim when it was there, in seconds from the start."""

    store: Path = Path()  # an empty one, with the tables of both databases
    digest: str = ""
    files: dict[str, str] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    first_step: float = 0.0  # when that began, in seconds from the start

    def watch(self, parts: Callable[[], dict[int, str]], step: Callable[[], str], ended: Callable[[], bool]) -> None:
        begun = time.monotonic()
        self.spans[GROUP] = self.spans[ALL] = (0.0, 0.0)
        while not ended():
            now, there = time.monotonic() - begun, list(parts().values())
            if not self.first_step and step() != "the start":
                self.first_step = now
            for victim in (GROUP, ALL, SERVER, EVALUATION, WORKER):
                if victim in (GROUP, ALL) or any(victim in words for words in there):
                    self.spans[victim] = (self.spans.get(victim, (now, now))[0], now)
            time.sleep(0.2)

    def compare(self, tally: Tally, home: Path, digest: str, where: str, name: str = "tiny") -> None:
        files = merged(home, digest) if digest else {}
        weights = {self.files["model.safetensors"]}
        # The registry's card and picture, and the manifest that counts them, are not in what the library merges.
        differ = [name for name, sha256 in self.files.items() if files.get(name) != sha256]
        wrong = digest != self.digest or bool(set(differ) - (set() if name == "tiny" else {"lewis.json"}))
        tally.note("wrong models", bool(digest) and wrong, f"{where}: {digest} for {self.digest}, {differ}")
        logged = logged_weights(home)
        wrong = logged != weights if name == "tiny" else not weights <= logged  # the store of a service has more
        tally.note("wrong models", bool(digest) and wrong, f"{where}: MLflow's weights")
        wrong = half_done(home, name) if digest else ""
        tally.note("half versions", bool(wrong), f"{where}: {wrong}")


def in_parts(kinds: dict[str, tuple[str, int]], of: str) -> list[object]:
    """For each kind, the numbers of its parts: parameters of tests with a process each."""
    return [
        pytest.param(name, part, marks=pytest.mark.xdist_group(f"{of}: {name} {part}"))
        for name in kinds
        for part in range(min(PARTS, POINTS) or 1)
        if name not in OF_A_RUN or (part % 5 < 3) == (of == "run")
    ]


def points(part: int) -> list[float]:
    """A part of the points; they are between 0 and 1.

    As many of all as are used are spread evenly (van der Corput's sequence).
    """
    every = [int(f"{i:b}"[::-1], 2) / 2 ** i.bit_length() for i in range(1, POINTS + 1)]
    parts = min(PARTS, POINTS)
    return every[part * POINTS // parts : (part + 1) * POINTS // parts]


@dataclass
class Striker:
    """Kills one victim at points of the time in which it is there, in one run of a recipe after the other."""

    undisturbed: Undisturbed
    victim: str
    number: int
    done: float = 0.0  # seconds that the next run is expected to be shorter, for what earlier runs of its recipe did

    def strike(self, point: float, parts: Callable[[], dict[int, str]], leader: int) -> dict[int, str]:
        """Wait for the point in a run that begins now, and kill the victim.

        Gives the processes that have to end then, by their ids: the victim and all below it. None if it was gone.
        """
        begun = time.monotonic()
        first, last = self.undisturbed.spans[self.victim]
        if self.victim not in (GROUP, ALL):
            until(lambda: any(self.victim in words for words in parts().values()), 60 + 3 * last, 0.05)
        time.sleep(max(0.0, last - first - self.done) * point)
        self.done = max(self.done, self.done + time.monotonic() - begun - self.undisturbed.first_step)
        there = parts()
        # The evaluation's child is the last that was forked; a guard is older than what it guards.
        struck = max((pid for pid, words in there.items() if self.victim in words), default=0)
        try:
            if self.victim == GROUP:
                os.killpg(leader, self.number)
            elif self.victim == ALL:
                for pid in (leader, *there):  # the leader first, else it starts again what ended
                    with suppress(ProcessLookupError):
                        os.kill(pid, self.number)
            elif struck:
                there = {struck: self.victim, **children(struck)}
                os.kill(struck, self.number)
            else:
                return {}
        except ProcessLookupError:
            return {}
        return there


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""The part `champion` of `lewis up --serve`: HAProxy on the port of clients, and a server in each slot with a model.

    python -m lewis_flows.service.champion choose [RECIPE]
    python -m lewis_flows.service.champion run PORT

`choose` checks that the programs are there, and notes the model of a recipe as the one to serve; `run` starts what
`lewis.serving.slots` says is wanted. It restarts servers that end or hang, with growing pauses. HAProxy asks clients
for the key, lets them use the OpenAI API and nothing else, and answers 503 while no server has the model.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lewis import guard, settings, store
from lewis.errors import InputError, LewisError
from lewis.serving import slots
from lewis.serving.slots import NAMES, Now, Running, Slot
from lewis.store import kinds
from lewis.store.secrets import UP_SERVE_KEY
from lewis_flows.service.champion_router import Router, program
from lewis_flows.service.processes import answers, free_port

_TICK = 0.2  # seconds between two rounds of `run`
_GRACE = 10.0  # seconds from SIGTERM to SIGKILL, for a server or its orphans
_DRAIN = 600.0  # seconds that a server may take to answer its open requests before it is ended
_ASK = 10.0  # seconds between two checks whether a server that is ready still answers
_SILENT = 120.0  # seconds without an answer after which a server that was ready counts as hanging
_STABLE = 60.0  # seconds after which the failures of a server that runs are counted from zero again
_MOST = 60.0  # longest pause between two starts, seconds
_SHOWN = 1500  # characters at the end of a server's log that a message shows
# On a CPU vLLM would bind its threads to cores and spin there, and what else runs on these cores can come to a halt.
_SHARES_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


class Server:
    """The model server of a slot; `follow` starts and ends its process.

    Attributes:
        has: what the process was started with, or has loaded since; None if there is no process.
        ready: whether it answers.
        failures, problem: as of `slots.Running`.
    """

    def __init__(self, name: str, port: int, model: str, router: Router, folder: Path) -> None:
        """Start nothing yet.

        Args:
            name: of the slot.
            port: that it listens on.
            model: the name that clients ask for.
            router: in front of it.
            folder: for its files.
        """
        self.name, self.url, self._port, self._model = name, f"http://127.0.0.1:{port}", port, model
        self.has: Slot | None = None
        self.ready, self.failures, self.problem = False, 0, ""
        self._router, self._folder = router, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path()
        self._started = self._next = self._closed = self._asked = self._heard = 0.0
        self._ending = False

    @property
    def runs(self) -> bool:
        """Whether the server has a process."""
        return self._process is not None

    def follow(self, wanted: Slot | None, *, start: bool) -> None:
        """Take the next step towards the wanted server, None: no server; `start`: whether one may be started now."""
        if self._process and self._process.poll() is not None:
            self._ended()
        if wanted is None or (self.has and wanted.alias != self.has.alias):
            self.failures, self.problem, self._next = 0, "", 0.0
        if self._process is None:
            self.has = None
            if wanted and start and time.monotonic() >= self._next:
                self._start(wanted)
        elif self._ending:
            return
        elif wanted and self.has and self._fits(wanted):
            self.has, self._closed = wanted, 0.0
            self._look()
        else:
            self._drain()

    def _look(self) -> None:
        """Check whether the server answers; end one that hangs, which then starts again like one that died."""
        if self.ready and time.monotonic() < self._asked + _ASK:
            return
        if answers(f"{self.url}/health"):
            self.ready, self._heard = True, time.monotonic()
        elif self.ready and time.monotonic() > self._heard + _SILENT:
            assert self._process is not None
            print(f"{self.name}: the server has not answered for {_SILENT:.0f} s; it is ended", flush=True)  # noqa: T201
            self._router.close(self.name)
            self._process.send_signal(signal.SIGTERM)  # the guard kills it if it does not end
            self.ready = False
        self._asked = time.monotonic()

    def now(self, share: int) -> Running:
        """The state of the server, for the note that other processes read."""
        alias = self.has.alias if self.has else ""
        return Running(alias, self.url, self.ready, share, self.failures, self.problem)

    def _fits(self, wanted: Slot) -> bool:
        """Whether the process serves what is wanted; adapters are loaded before, so that base and rank decide."""
        assert self.has is not None
        same = (self.has.base, self.has.rank) == (wanted.base, wanted.rank)
        return same if wanted.base else wanted == self.has

    def _start(self, wanted: Slot) -> None:
        folder = store.make_folder(self._folder / self.name)
        log = kinds.LOGS.path(f"champion-{self.name}-{store.writer()}")
        self._log = log
        store.make_folder(log.parent)
        words = command(wanted, self._model, self._port, folder)
        with log.open("wb") as output:
            store.restrict(log)
            self._process = subprocess.Popen(
                guard.guarded(words, _GRACE),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        self.has, self._started, self._closed, self._ending = wanted, time.monotonic(), 0.0, False
        print(f"{self.name}: starting a server of {wanted.alias}; its log is {log}", flush=True)  # noqa: T201

    def _ended(self) -> None:
        assert self._process is not None
        code = self._process.returncode
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None
        self._router.close(self.name)
        self.ready = False
        if self._ending:
            self._log.unlink(missing_ok=True)
            return
        self.failures = self.failures + 1 if time.monotonic() - self._started < _STABLE else 1
        self._next = time.monotonic() + min(_MOST, 2.0 ** (self.failures - 1) - 1)
        end = self._log.read_bytes()[-_SHOWN:].decode(errors="replace").strip()
        self.problem = f"exit code {code}; its log is {self._log}, at the end:\n{end}"
        print(f"{self.name}: the server ended with exit code {code}; its log is {self._log}", flush=True)  # noqa: T201

    def _drain(self) -> None:
        """End the server once it has answered its open requests."""
        assert self._process is not None
        self.ready, now = False, time.monotonic()
        if not self._closed:
            self._router.close(self.name)
            self._closed = now
        if not self._router.sessions(self.name) or now - self._closed > _DRAIN:
            self._process.send_signal(signal.SIGTERM)
            self._ending = True


def words() -> list[str]:
    """Return the command that starts a server of vLLM or of transformers, without the arguments of a model.

    Raises:
        InputError: if neither is installed, or there is no such program as LEWIS_UP_SERVE_COMMAND names.
    """
    if given := settings.UP_SERVE_COMMAND.get():
        found = program(given[0])
        if found is None:
            raise InputError(f"LEWIS_UP_SERVE_COMMAND: there is no program {given[0]!r}; install it, or give its path")
        return [os.path.abspath(found), *given[1:]]
    if found := program("vllm"):
        return [os.path.abspath(found), "serve"]
    if importlib.util.find_spec("openai") is None:
        raise InputError(
            "lewis up --serve: there is no server: `pip install 'lewis-merge[serve]'` for `transformers serve`, or "
            "install vLLM and name its program in LEWIS_UP_SERVE_COMMAND"
        )
    return [sys.executable, "-m", "transformers.cli.transformers", "serve"]


def kind_of(words: Sequence[str]) -> str:
    """Return the kind of server that a command starts: `vllm` or `transformers`."""
    return "vllm" if Path(words[0]).name == "vllm" else "transformers"


def command(slot: Slot, model: str, port: int, folder: Path) -> list[str]:
    """Return the command that starts the server of a slot.

    Args:
        slot: what the server is to have.
        model: the name that clients ask for.
        port: where the server listens.
        folder: its working directory; `transformers serve` names a model by its path, so a link there gets the name.
    """
    start = words()
    at = start.index("serve") + 1
    own = ["--host", "127.0.0.1", "--port", str(port)]
    if kind_of(start) == "transformers":
        for each in folder.iterdir():
            each.unlink()
        (folder / model).symlink_to(slot.folder)
        own = [model, *own]
    elif slot.base:
        modules = [json.dumps({"name": name, "path": slot.folder}) for name in (model, slot.alias)]
        own = [slot.base, *own, "--enable-lora", "--max-lora-rank", str(slot.rank), "--max-loras", "3"]
        own += ["--lora-modules", *modules]
    else:
        own = [slot.folder, *own, "--served-model-name", model]
    return [*start[:at], *own, *start[at:]]


def _environment() -> dict[str, str]:
    """Return a server's environment: no secrets of other parts, but a key for vLLM, as all users can reach its port."""
    from lewis.walls.isolation import without_secrets

    own = {**_OFFLINE, "VLLM_API_KEY": UP_SERVE_KEY.read()}
    return {**_SHARES_CORES, **without_secrets(os.environ), **own}


def choose(recipe: str) -> None:
    """Note the model of a recipe as the one that this machine serves.

    Args:
        recipe: its name; may be empty if the folder has exactly one that registers a model.

    Raises:
        InputError: if the name is empty and there are several or none, it names none of them, or a program is missing.
    """
    from lewis_flows import recipes_folder

    if program("haproxy") is None:
        raise InputError("lewis up --serve: HAProxy is missing; install it (`apt install haproxy`)")
    words()
    models = {name: recipes_folder.registered_name(name) for name in recipes_folder.names()}
    models = {name: model for name, model in models.items() if model}
    if recipe and recipe not in models:
        known = ", ".join(models) or "none"
        raise InputError(f"--serve {recipe}: expected a recipe that registers a model, of these: {known}")
    if not recipe and len(models) != 1:
        where = recipes_folder.folder()
        have = f"choose a recipe, `--serve NAME`: {', '.join(models)}" if models else f"{where} has no recipe"
        raise InputError(f"--serve: {have}" + ("" if models else " that registers a model; put one there"))
    model = models[recipe or next(iter(models))]
    before = slots.wanted()
    if before is None or before.model != model:
        slots.want(slots.Wanted(model))


def run(port: int) -> None:
    """Keep HAProxy and the servers that are wanted running until SIGTERM; `port` is that of clients.

    Raises:
        LewisError: if nothing is chosen to be served, or HAProxy does not start.
    """
    wanted = slots.wanted()
    if wanted is None:
        raise LewisError("nothing is chosen to be served; `lewis up --serve` does that")
    what, url = kind_of(words()), f"http://127.0.0.1:{port}"
    with store.scratch_folder("champion") as folder:
        ports = {name: free_port() for name in NAMES}
        os.chdir(folder)
        router = Router(port, ports)
        servers = {name: Server(name, ports[name], wanted.model, router, folder) for name in NAMES}
        noted: Now | None = None
        try:
            while True:
                router.start()
                wanted = slots.wanted() or wanted
                for name, server in servers.items():
                    may = wanted.only in ("", name)
                    others = any(each.runs for each in servers.values() if each is not server)
                    start = may and not (wanted.only and others)
                    server.follow(wanted.slots.get(name) if may else None, start=start)
                shares = {name: 100 * (name == wanted.traffic) for name, each in servers.items() if each.ready}
                router.share(shares)
                does = {name: each.now(shares.get(name, 0)) for name, each in servers.items()}
                now = Now(store.writer(), url, what, does)
                if now != noted:
                    slots.note(now)
                    noted = now
                time.sleep(_TICK)
        finally:
            slots.note(None)


def main() -> int:
    """Run `choose` or `run`, as the arguments say; the exit code is 2 if the input is wrong; errors go to stdout."""
    what, *arguments = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if what == "choose":
            choose(*arguments or [""])
        else:
            run(int(arguments[0]))
    except LewisError as error:
        print(error, flush=True)  # noqa: T201
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

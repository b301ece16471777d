"""HAProxy on the port that clients use, in front of the slots of `lewis up --serve`."""

import csv
import io
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lewis import guard
from lewis.errors import LewisError
from lewis.serving import haproxy_socket
from lewis.serving.slots import NAMES
from lewis.store.secrets import UP_SERVE_KEY

_KEY = "CHAMPION_KEY"  # in the environment of HAProxy alone

# A server is enabled through the runtime socket once it answers. Connections to servers are not reused: a request fails
# if the server closes its connection at the moment in which it is reused.
_CONFIG = """
global
  stats socket unix@haproxy.sock mode 600 level admin
defaults
  mode http
  option http-server-close
  timeout connect 5s
  timeout http-request 30s
  timeout http-keep-alive 60s
  timeout client 1h
  timeout server 1h
frontend clients
  bind 127.0.0.1:{port}
  monitor-uri /health
  monitor fail if {{ nbsrv(champion) lt 1 }}
  http-request return status 200 content-type text/plain string up if {{ path /up }}
  http-request deny deny_status 401 unless {{ req.hdr(authorization) -m str "Bearer ${{{key}}}" }}
  http-request deny deny_status 404 unless {{ path_beg /v1/ }}
  http-request deny deny_status 404 if {{ path,url_dec -m sub lora_adapter }}
  default_backend champion
backend champion
  server blue 127.0.0.1:{blue} weight 0 disabled
  server green 127.0.0.1:{green} weight 0 disabled
"""


class Router:
    """The process of HAProxy in front of the slots, which `start` starts again if it has ended."""

    def __init__(self, port: int, servers: Mapping[str, int]) -> None:
        """Write its configuration into the working directory, which is of this user alone; `servers`: name -> port.

        The path of its socket is relative, since the length of such a path is limited.
        """
        self._port, self._socket, self._shares = port, Path("haproxy.sock"), dict[str, int]()
        file = Path("haproxy.cfg")
        file.write_text(_CONFIG.format(port=port, key=_KEY, **servers))
        self._command = guard.guarded([program("haproxy") or "", "-q", "-db", "-f", str(file)], 1.0)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start HAProxy if it does not run, and wait until its runtime socket exists.

        Raises:
            LewisError: if HAProxy ends before that.
        """
        if self._process and self._process.poll() is None:
            return
        if self._process:
            print("HAProxy has ended; starting it again", flush=True)  # noqa: T201
        self._socket.unlink(missing_ok=True)
        self._shares = dict.fromkeys(NAMES, 0)
        self._process = subprocess.Popen(self._command, env={**os.environ, _KEY: UP_SERVE_KEY.read()})
        while not self._socket.exists():
            if self._process.poll() is not None:
                raise LewisError(f"HAProxy ends with exit code {self._process.returncode}; is port {self._port} free?")
            time.sleep(0.05)

    def share(self, shares: Mapping[str, int]) -> None:
        """Set each server's percentage of the requests, the largest first, so that some server always has traffic."""
        for name, share in sorted(shares.items(), key=lambda each: -each[1]):
            if self._shares[name] != share:
                self._ask(f"set server champion/{name} weight {share}; set server champion/{name} state ready")
                self._shares[name] = share

    def close(self, name: str) -> None:
        """Send no further requests to a server."""
        self._ask(f"set server champion/{name} state maint; set server champion/{name} weight 0")
        self._shares[name] = 0

    def sessions(self, name: str) -> int:
        """Return how many requests a server is answering now."""
        rows = csv.DictReader(io.StringIO(self._ask("show stat").removeprefix("# ")))
        return next((int(row["scur"]) for row in rows if (row["pxname"], row["svname"]) == ("champion", name)), 0)

    def _ask(self, text: str) -> str:
        with suppress(OSError):  # HAProxy has ended, and is started again soon
            return haproxy_socket.ask(str(self._socket), text)
        return ""


def program(name: str) -> str | None:
    """Return the path of a program on PATH or in the folders of daemons; None if there is none."""
    places = (os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")
    return shutil.which(name, path=os.pathsep.join(places))

"""Containers without a container runtime, for services as a compose file describes them.

A container here is a copy-on-write view of this machine's files, in which the secrets, volumes and files that its
service names are where it says. All share one network, in which each name of a service is an address of loopback.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.production.fleet import postgres_programs
from tests.support.service import PYTHONPATH, REPO

FOLDER = REPO / "deployments"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
USER = 10001  # of the image
HOSTS = ("db.example.org", "s3.example.org")
"""Names that each container knows as addresses of loopback, next to those of the services."""
# What PostgreSQL's image does on an empty volume.
POSTGRES = """
bin=%s; data=/var/lib/postgresql/data; mkdir -p $data; chown -R postgres /var/lib/postgresql; cd /tmp
cp "$POSTGRES_PASSWORD_FILE" /tmp/password; chown postgres /tmp/password
as() { runuser -u postgres -- "$@"; }
as $bin/initdb -N -D $data -U "$POSTGRES_USER" -E UTF8 --auth-local=trust --auth-host=scram-sha-256 \\
  --pwfile=/tmp/password
as $bin/pg_ctl -D $data -o "-c listen_addresses='' -k /tmp" -w start
for file in /docker-entrypoint-initdb.d/*.sql; do as $bin/psql -h /tmp -U "$POSTGRES_USER" -d postgres -f $file; done
as $bin/pg_ctl -D $data -w stop
exec runuser -u postgres -- $bin/postgres -D $data -c listen_addresses=* -k /tmp
"""
MAKE = """
set -e
work=%(work)s; mount -t tmpfs none $work; mkdir $work/up $work/scratch $work/root
mount -t overlay overlay -o lowerdir=/,upperdir=$work/up,workdir=$work/scratch $work/root
cd $work/root; mount -t proc proc proc; mount --rbind /dev dev; chmod 711 root tmp; chmod 1777 tmp
printf '127.0.0.1 localhost %(names)s\\n' > etc/hosts
mkdir -p run/secrets home/lewis store recipes; chown %(user)d home/lewis store
%(files)s
exec chroot %(as)s . %(command)s
"""


class Container:
    """One service as a process."""

    def __init__(self, name: str, root: Path, network: int, service: dict[str, Any] | None = None) -> None:
        """
        Args:
            name: of the service.
            root: folder of all containers; the files of secrets are in `secrets` there.
            network: process that holds the network that they share.
            service: what the compose file would say of it; by default, what it does say.
        """
        self.name, self.service = name, service or SERVICES[name]
        self._network = ["nsenter", f"--net=/proc/{network}/ns/net"]
        self._work, self.log = root / name, root / f"{name}.log"
        self._work.mkdir()
        self._secrets = root / "secrets"
        self.ours = self.service["image"] == "lewis"
        paths = [
            Path(sys.executable).parent,
            *filter(None, [postgres_programs()]),
            "/usr/sbin",
            "/usr/bin",
            "/sbin",
            "/bin",
        ]
        python = {"PYTHONPATH": PYTHONPATH} if self.ours else {}
        own = {"PATH": ":".join(map(str, paths)), "HOME": "/home/lewis" if self.ours else "/root", **python}
        given = {key: self._plain(value) for key, value in self.service.get("environment", {}).items()}
        self._environment = ["env", "-i", *(f"{key}={value}" for key, value in (own | given).items())]
        self._as = f"--userspec={USER}:{USER}" if self.ours else ""
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def _plain(text: Any) -> str:
        return str(text).replace("$$", "$")

    def _files(self) -> Iterator[str]:
        for secret in self.service.get("secrets", []):
            yield f"cp {self._secrets / secret} run/secrets/; chmod 644 run/secrets/{secret}"
        for volume in self.service.get("volumes", []):
            source, _, target = volume.removesuffix(":ro").rpartition(":")
            target = target.lstrip("/")
            if source.startswith("./"):
                yield f"mkdir -p {Path(target).parent}; rm -rf {target}; cp -r {FOLDER / source} {target}"
            else:
                yield f"rm -rf {target}; mkdir -p {target}; chown {USER if self.ours else 0} {target}"

    def start(self) -> None:
        command = [
            self._plain(each) for each in [*self.service.get("entrypoint", []), *self.service.get("command", [])]
        ]
        if self.service["image"].startswith("postgres"):
            command = ["sh", "-ec", POSTGRES % postgres_programs()]
        if self.ours:
            command = ["python", "-m", "lewis_flows.service.from_files", *command]
        making = MAKE % {
            "work": self._work,
            "names": " ".join((*SERVICES, *HOSTS)),
            "user": USER,
            "files": "\n".join(self._files()),
            "as": self._as,
            "command": shlex.join([*self._environment, *command]),
        }
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", making]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*self._network, *apart], stdout=log, stderr=log, start_new_session=True)

    def run(self, *command: str) -> int:
        """Run a command in it, as its health check is; gives the exit code."""
        return self.told(*command).returncode

    def told(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it; gives its exit code and output."""
        assert self.process
        inner = self._inside()
        if not inner:
            return subprocess.CompletedProcess(command, 1, "", "the container has ended")
        enter = ["nsenter", f"--target={inner[0]}", "--mount", "--pid", "--net", "chroot"]
        place = [*filter(None, [self._as]), f"{self._work}/root"]
        return subprocess.run(
            [*enter, *place, *self._environment, *command], capture_output=True, text=True, timeout=300
        )

    def wait(self, condition: str) -> None:
        """Wait until it is as another service's `depends_on` wants it."""
        assert self.process
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            code = self.process.poll()
            if condition == "service_completed_successfully":
                if code is not None:
                    break
            elif code is not None or self.run(*self.service["healthcheck"]["test"][1:]) == 0:
                break
            time.sleep(1)
        code = self.process.poll()
        good = code == 0 if condition == "service_completed_successfully" else code is None
        assert good and time.monotonic() < deadline, f"{self.name} ({code}):\n{self.log.read_text()[-4000:]}"

    def kill(self) -> None:
        if self.process:
            for first in self._inside():  # who changes its user loses what --kill-child asked for
                os.kill(first, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def _inside(self) -> list[int]:
        """The first process of the container, with which all others end."""
        assert self.process
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(each) for each in found.stdout.split()]


@contextmanager
def network() -> Iterator[int]:
    """A network that has only loopback; gives the process that holds it."""
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up; exec sleep 7200"])
    try:
        time.sleep(1)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()

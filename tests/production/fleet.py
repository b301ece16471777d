"""Real servers on loopback: PostgreSQL, S3, Prefect, MLflow, the receiver, and workers without a shared disk.

Each worker has a PID namespace, a host name and a store of its own, as on a machine of its own.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.production.s3_server import BUCKET, S3Server
from tests.support.local_hub import LocalHub, Webhook
from tests.support.service import PYTHONPATH, REPO, free_port

KEY, SECRET, PASSWORD = "lewis:the key of the fleet", "what the Hub sends", "the password of the databases"
USER = "lewis"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def postgres_programs() -> Path | None:
    """The newest PostgreSQL that Debian installed; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


class Postgres:
    """A PostgreSQL that asks for a password; it does not run as root."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make the databases, and start it."""
        programs = postgres_programs()
        assert programs
        self.root.mkdir()
        shutil.chown(self.root, "postgres")
        (self.root / "password").write_text(PASSWORD)
        shutil.chown(self.root / "password", "postgres")
        user, data = ["runuser", "-u", "postgres", "--"], self.root / "data"
        made = [str(programs / "initdb"), "-U", USER, "-A", "scram-sha-256", "--pwfile", str(self.root / "password")]
        subprocess.run(
            [*user, *made, "-N", "--encoding=UTF8", "-D", str(data)], check=True, capture_output=True, cwd=self.root
        )
        self.run()
        for name in ("prefect", "mlflow", "mlflow_users"):
            made = [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, name]
            for _ in range(60):
                if not subprocess.run(made, env={**os.environ, "PGPASSWORD": PASSWORD}, capture_output=True).returncode:
                    break
                time.sleep(0.5)
            else:
                raise AssertionError((self.root / "log").read_text())

    def run(self) -> None:
        """Start it on the databases that are there."""
        programs = postgres_programs()
        command = [f"{programs}/postgres", "-D", f"{self.root}/data", "-p", str(self.port), "-k", str(self.root)]
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["runuser", "-u", "postgres", "--", *command, *options],
                stdout=log,
                stderr=log,
                cwd=self.root,
                start_new_session=True,
            )

    def url(self, database: str, driver: str = "postgresql") -> str:
        return f"{driver}://{USER}:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.port}/{database}"

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(60)


class Part:
    """One process of the fleet; `kill` is `kill -9` of it and all that it started."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path, *, alone: bool) -> None:
        self.name, self._environment, self.log = name, environment, log
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        named = ["sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        self._command = [*apart, *named, *command] if alone else command
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, cwd=REPO, start_new_session=True
            )

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


class Fleet:
    """All parts; `start` starts those that every test needs, the tests start workers.

    Attributes:
        recipes: the folder of recipes.
        parts: name -> part.
    """

    def __init__(self, root: Path, hub: LocalHub, s3: S3Server) -> None:
        self.root, self.hub, self.s3 = root, hub, s3
        self.postgres = Postgres(root / "postgres")
        self.recipes = root / "recipes"
        self.recipes.mkdir()
        ports = {name: free_port() for name in ("prefect", "mlflow", "webhook")}
        self.api, self.mlflow = (f"http://127.0.0.1:{ports[name]}" for name in ("prefect", "mlflow"))
        self.webhook = f"http://127.0.0.1:{ports['webhook']}/webhook"
        self.parts: dict[str, Part] = {}
        left_out = ("PREFECT_", "MLFLOW_", "LEWIS_", "AWS_")
        self._common = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        self._common |= {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._common["PYTHONPATH"] = PYTHONPATH
        self.client = self._common | {
            **hub.environment(root / "hub-client"),
            **s3.environment(),
            "PREFECT_API_URL": f"{self.api}/api",
            "PREFECT_API_AUTH_STRING": KEY,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            "LEWIS_RECIPES": str(self.recipes),
            "LEWIS_STORE": f"s3://{BUCKET}/store",
            "LEWIS_STORE_MERGED": "1",
            "LEWIS_WEBHOOK_SECRET": SECRET,
            "LEWIS_WEBHOOK_PORT": str(ports["webhook"]),
            "LEWIS_POLL_SECONDS": "0",  # releases come by the webhook: a run begins when a test wants one
        }
        self._ports = ports

    def start(self) -> None:
        """Start databases, servers and the receiver, and deploy."""
        self.postgres.start()
        prefect = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.postgres.url("prefect", "postgresql+asyncpg"),
            "PREFECT_SERVER_API_AUTH_STRING": KEY,
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": str(self._ports["prefect"]),
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": str(self.root / "prefect"),
        }
        self.add("prefect", ["-m", "lewis_flows.service.prefect_app"], self._common | prefect)
        settings = self.root / "auth.ini"
        settings.write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\nauth_cache_ttl_seconds = 60\n"
            f"database_uri = {self.postgres.url('mlflow_users').replace('%', '%%')}\n"
        )
        mlflow = {
            **self.s3.environment(),
            "MLFLOW_S3_ENDPOINT_URL": self.s3.url,
            "MLFLOW_BACKEND_STORE_URI": self.postgres.url("mlflow"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_USERNAME": USER,
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "forms",
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": self.mlflow,
        }
        command = [
            "-m",
            "lewis_flows.service.mlflow_app",
            "--app-name",
            "basic-auth",
            "--workers",
            "1",
            "--host",
            "127.0.0.1",
        ]
        command += ["--port", str(self._ports["mlflow"]), "--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        self.add("mlflow", command, self._common | mlflow)
        for url in (f"{self.api}/api/health", f"{self.mlflow}/health"):
            self.until(lambda url=url: self.answers(url), 240)  # type: ignore[misc]
        done = self.lewis("deploy")
        assert done.returncode == 0, done.stdout + done.stderr
        self.add("webhook", ["-m", "lewis_flows.service.webhook"], self.client | self._home("webhook"))
        self.until(lambda: self.answers(self.webhook.replace("webhook", "health/ready")), 120)
        self.hub.webhooks.append(Webhook(self.webhook, SECRET))

    def stop(self) -> None:
        """End all, the servers last."""
        self.hub.webhooks.clear()
        for part in reversed(self.parts.values()):
            part.kill()
        self.postgres.stop()

    def add(self, name: str, command: list[str], environment: dict[str, str], *, alone: bool = False) -> Part:
        part = Part(name, [sys.executable, *command], environment, self.root / f"{name}.log", alone=alone)
        self.parts[name] = part
        part.start()
        return part

    def worker(self, name: str, patch: str = "", *, queue: str = "", **settings: str) -> Part:
        """Start a worker with a store of its own.

        Args:
            patch: Python that its processes run first.
            queue: the only work queue that it takes runs from.
            settings: its environment, beyond that of all workers.
        """
        environment = self.client | self._home(name) | settings
        if patch:
            folder = self.root / f"{name}-patch"
            folder.mkdir(exist_ok=True)
            (folder / "sitecustomize.py").write_text(patch)
            environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment['PYTHONPATH']}"
        command = ["-m", "lewis_flows.service.worker", "--name", name]  # which asks for work every 2 s, not every 10
        command += ["--work-queue", queue] if queue else []
        return self.add(name, command, environment, alone=True)

    def home(self, name: str) -> Path:
        """The store of a worker."""
        return self.root / name / "home"

    def _home(self, name: str) -> dict[str, str]:
        temporary = self.root / name / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        hub = self.hub.environment(self.root / name / "client")
        own = {"LEWIS_HOME": self.home(name), "PREFECT_HOME": self.root / name / "prefect", "TMPDIR": temporary}
        return hub | {key: str(path) for key, path in own.items()}

    def lewis(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line on a machine of its own."""
        command = [sys.executable, "-m", "lewis_flows.cli.main", *arguments]
        given = self.client | self._home("desk") | environment
        return subprocess.run(command, env=given, cwd=REPO, capture_output=True, text=True, timeout=600)

    def ask(self, path: str, body: Any = None) -> Any:
        """One request of Prefect's API."""
        data = None if body is None else json.dumps(body).encode()
        key = base64.b64encode(KEY.encode()).decode()
        headers = {"content-type": "application/json", "authorization": f"Basic {key}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.api}/api{path}", data, headers), timeout=30) as got:
            return json.loads(got.read() or "null")

    def run(self, recipe: str) -> str:
        """Start a merge by hand, as the UI does; gives its id."""
        found = self.ask(f"/deployments/name/merge/{recipe}")
        body = {"state": {"type": "SCHEDULED"}}
        return str(self.ask(f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def ended(self, run: str, timeout: float = 400) -> dict[str, Any]:
        """Wait for a run."""

        def look() -> dict[str, Any] | None:
            found = self.ask(f"/flow_runs/{run}")
            return found if found["state_type"] in ENDED else None

        return self.until(look, timeout)

    def runs(self, recipe: str) -> list[dict[str, Any]]:
        """The merges of a recipe that have begun, oldest first."""
        wanted = {"flows": {"name": {"any_": ["merge"]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.ask("/flow_runs/filter", wanted)
        return [run for run in found if run["parameters"].get("recipe") == recipe and run["start_time"]]

    def versions(self, name: str) -> list[Any]:
        """The registered versions, oldest first."""
        from mlflow import MlflowClient

        client = MlflowClient(self.mlflow)
        found = sorted(client.search_model_versions(f"name='{name}'"), key=lambda each: int(each.version))
        return [client.get_model_version(name, each.version) for each in found]  # with its aliases

    @staticmethod
    def answers(url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def until(self, found: Callable[[], Any], timeout: float) -> Any:
        """Wait for a true value; `found` may fail while a server is away."""
        deadline, last = time.monotonic() + timeout, None
        while time.monotonic() < deadline:
            try:
                if last := found():
                    return last
            except OSError as error:
                last = error
            time.sleep(0.5)
        told = "\n".join(f"== {part.name}\n{part.log.read_text()[-2500:]}" for part in self.parts.values())
        raise AssertionError(f"not within {timeout} s: {last}\n{told}")

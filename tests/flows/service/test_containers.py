"""Dockerfile, compose file and manifests agree with the package: programs, variables, secrets, addresses, users."""

import configparser
import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import InputError
from lewis.settings import IN_FILES
from lewis_flows.service import deploy, from_files

REPO = Path(__file__).resolve().parents[3]
FOLDER = REPO / "deployments"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"] == "lewis"]
MANIFESTS = [
    document for path in sorted((FOLDER / "kubernetes").glob("*.yaml")) for document in yaml.safe_load_all(path.open())
]
JOB, EVALUATE = (json.loads((FOLDER / "kubernetes" / name).read_text()) for name in ("job.json", "evaluate.json"))
GENERATED = next(each for each in MANIFESTS if each["kind"] == "Kustomization")


def lines(instruction: str) -> list[str]:
    """The arguments of all instructions of a name, in order."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", "")
    return [line.partition(" ")[2] for line in text.splitlines() if line.startswith(f"{instruction} ")]


def test_a_secret_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the key\n")
    given = {"HF_TOKEN_FILE": str(tmp_path / "key"), "SSL_CERT_FILE": "/etc/none", "PGPASSWORD": "x"}
    assert from_files.secrets(given) == {"HF_TOKEN": "the key"}
    of_kubernetes = {"PGPASSWORD": "the password\n", "HF_TOKEN": "x", "OTHER": "x\n"}
    assert from_files.secrets(of_kubernetes) == {"PGPASSWORD": "the password"}
    with pytest.raises(InputError, match="HF_TOKEN: expected a value or a file, got both"):
        from_files.secrets({**given, "HF_TOKEN": "x"})
    with pytest.raises(InputError, match=r"HF_TOKEN_FILE: .*none cannot be read"):
        from_files.secrets({"HF_TOKEN_FILE": str(tmp_path / "none")})
    (tmp_path / "key").write_text("\n")
    with pytest.raises(InputError, match=r"HF_TOKEN_FILE: .*key is empty"):
        from_files.secrets(given)


def test_the_image_has_the_packages_and_starts_as_a_user(tmp_path: Path) -> None:
    assert lines("USER") == ["10001"] and [each for each in lines("RUN") if "useradd --uid 10001" in each]
    for line in lines("RUN"):
        assert subprocess.run(["sh", "-n", "-c", line], capture_output=True).returncode == 0, line
    listing = next(line for line in lines("RUN") if "tomllib" in line)
    subprocess.run(
        ["sh", "-c", listing.replace("python ", f"{sys.executable} ").replace("requirements.txt", f"{tmp_path}/found")],
        cwd=REPO,
        check=True,
    )
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("kubernetes", "postgres", "s3")]
    assert (tmp_path / "found").read_text().splitlines() == sum(extras, project["dependencies"])
    (module,) = {json.loads(line)[2] for line in lines("ENTRYPOINT")}
    assert module == from_files.__name__
    assert f"{project['name']}" in lines("RUN")[-1]
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    needed = {
        *lines("COPY")[0].split()[:-1],
        "README.md",
        "LICENSE",
        "lewis",
        "tasks",
        "flows",
        "deployments",
    }
    assert needed <= {each.removeprefix("!") for each in kept if each.startswith("!")}
    assert [each for each in lines("FROM") if "/" in each.split()[0]] == []  # a short name


def test_the_parts_of_the_compose_file_find_each_other() -> None:
    for name, service in SERVICES.items():
        assert "/" not in service["image"] or service["image"].count("/") == 1
        for where in service.get("depends_on", {}):
            assert where in SERVICES
            wanted = service["depends_on"][where]["condition"]
            assert wanted != "service_healthy" or "healthcheck" in SERVICES[where]
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        environment = service.get("environment", {})
        for variable, value in environment.items():
            if variable.endswith("_FILE") and name in OURS:
                assert variable.removesuffix("_FILE") in IN_FILES
            if str(value).startswith("/run/secrets/"):
                assert Path(value).name in service["secrets"], f"{name}: {value}"
            for host in re.findall(r"(?:://|@)([a-z0-9]+)(?=[:/])", str(value)):
                assert host in SERVICES or host in ("lewis", "localhost") or host.isdigit(), f"{name}: {value}"
    given = {
        Path(value).name for service in SERVICES.values() for value in map(str, service.get("environment", {}).values())
    }
    assert set(COMPOSE["secrets"]) - given == {"s3-secret-key"} - given
    assert all(Path(each["file"]).parts == ("secrets", name) for name, each in COMPOSE["secrets"].items())


@pytest.mark.parametrize("name", OURS)
def test_no_part_gets_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for variable, value in service.get("environment", {}).items():
        secret = variable.endswith(("KEY", "PASSWORD", "SECRET", "TOKEN", "AUTH_STRING"))
        assert not secret, f"{variable} is in the file: {value}"
    used = {
        Path(str(value)).name for value in service["environment"].values() if str(value).startswith("/run/secrets/")
    }
    assert used == set(service["secrets"])


def test_the_manifests_are_of_one_piece() -> None:
    made = {each["name"] for each in GENERATED["configMapGenerator"]}
    pods = [each["spec"]["template"]["spec"] for each in MANIFESTS if each["kind"] == "Deployment"]
    pods += [each["job_configuration"]["job_manifest"]["spec"]["template"]["spec"] for each in (JOB, EVALUATE)]
    services = {each["metadata"]["name"] for each in MANIFESTS if each["kind"] == "Service"}
    accounts = {each["metadata"]["name"] for each in MANIFESTS if each["kind"] == "ServiceAccount"}
    for pod in pods:
        assert pod["serviceAccountName"] in accounts and pod["securityContext"]["runAsNonRoot"]
        volumes = {each["name"]: each for each in pod.get("volumes", [])}
        for volume in volumes.values():
            assert "configMap" not in volume or volume["configMap"]["name"] in made
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert {each["name"] for each in container.get("volumeMounts", [])} <= set(volumes)
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            for each in container["env"]:
                secret = each["name"] in IN_FILES and "://" not in each.get("value", "")
                assert secret == ("valueFrom" in each), each
    settings = next(each for each in GENERATED["configMapGenerator"] if each["name"] == "settings")["literals"]
    for setting in settings:
        host = re.search(r"://([a-z0-9.]+)[:/]", setting)
        assert not host or host[1] in services or host[1] in ("s3.storage", "lewis"), setting
    ingress = next(each for each in MANIFESTS if each["kind"] == "Ingress")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/webhook", "Exact")
    resources = {each for each in GENERATED["resources"]}
    apart = {"kustomization.yaml", "kserve.yaml"}  # the latter is for the namespace of the models
    assert resources == {path.name for path in (FOLDER / "kubernetes").glob("*.yaml")} - apart


def test_the_leases_of_the_prefect_server_outlive_its_container() -> None:
    """Else it forgets at an update which tasks hold a device."""
    service = SERVICES["prefect"]
    volume, _, folder = service["volumes"][0].partition(":")
    assert volume in COMPOSE["volumes"] and folder == service["environment"]["PREFECT_HOME"]
    assert any(folder in line.split() for line in lines("RUN") if "-o lewis" in line)  # a new volume has its owner
    named = {(each["kind"], each["metadata"]["name"]): each for each in MANIFESTS if "metadata" in each}
    pod = named["Deployment", "prefect"]["spec"]["template"]["spec"]
    (mount,), (kept,) = pod["containers"][0]["volumeMounts"], pod["volumes"]
    assert ("PersistentVolumeClaim", kept["persistentVolumeClaim"]["claimName"]) in named
    home = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}["PREFECT_HOME"]
    assert mount == {"name": kept["name"], "mountPath": home}


def test_the_receiver_is_probed_where_it_answers() -> None:
    from lewis_flows.service.webhook import create_app

    receiver = next(
        each for each in MANIFESTS if each["kind"] == "Deployment" and each["metadata"]["name"] == "receiver"
    )
    (container,) = receiver["spec"]["template"]["spec"]["containers"]
    probes = {name: each["httpGet"]["path"] for name, each in container.items() if name.endswith("Probe")}
    assert probes == {
        "startupProbe": "/health/live",
        "livenessProbe": "/health/live",
        "readinessProbe": "/health/ready",
    }
    assert set(probes.values()) <= {getattr(route, "path", "") for route in create_app("x").routes}


def test_a_run_chooses_nothing_of_its_job() -> None:
    for template in (JOB, EVALUATE):
        assert template["variables"] == deploy.TEMPLATE["variables"] and "{{" not in json.dumps(template)


def test_jobs_that_score_differ_in_their_gpu_alone() -> None:
    jobs = [copy.deepcopy(each["job_configuration"]) for each in (JOB, EVALUATE)]
    pods = [job["job_manifest"]["spec"]["template"]["spec"] for job in jobs]
    limits = [pod["containers"][0]["resources"]["limits"] for pod in pods]
    slots = next(each["value"] for each in pods[1]["containers"][0]["env"] if each["name"] == "LEWIS_DEVICE_SLOTS")
    assert limits[1].pop("nvidia.com/gpu") == slots and "nvidia.com/gpu" not in limits[0]
    assert pods[1].pop("tolerations")[0]["key"] == "nvidia.com/gpu" and pods[1].pop("nodeSelector")
    assert jobs[1]["job_manifest"]["metadata"].pop("generateName") == "lewis-evaluate-"
    assert jobs[0]["job_manifest"]["metadata"].pop("generateName") == "lewis-"
    assert jobs[0] == jobs[1]


def test_each_work_pool_has_a_template_and_a_worker() -> None:
    deployments = {each["metadata"]["name"]: each for each in MANIFESTS if each["kind"] == "Deployment"}
    pod = deployments["worker"]["spec"]["template"]["spec"]
    made = re.findall(r"work-pool create (\w+) .*?/etc/lewis/(\S+)", pod["initContainers"][0]["args"][2])
    job = next(each for each in GENERATED["configMapGenerator"] if each["name"] == "job")
    settings = next(each for each in GENERATED["configMapGenerator"] if each["name"] == "settings")["literals"]
    assert [file for _, file in made] == job["files"] and made[0][0] == deploy.POOL
    assert [f"--pool={pool}" for pool, _ in made] == [container["args"][3] for container in pod["containers"]]
    assert f"LEWIS_EVALUATE_POOL={made[1][0]}" in settings
    ports = [container["ports"][0]["containerPort"] for container in pod["containers"]]
    assert ports == [8080, 8081]
    for container, port in zip(pod["containers"], ports, strict=True):
        given = {each["name"]: each.get("value") for each in container["env"]}
        assert int(given.get("PREFECT_WORKER_WEBSERVER_PORT", 8080)) == port
        probes = [each["httpGet"]["port"] for name, each in container.items() if name.endswith("Probe")]
        assert probes == [port] * 3


@pytest.mark.parametrize("file", ["mlflow-auth.ini", "kubernetes/mlflow-auth.ini"])
def test_mlflow_can_read_its_settings(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = configparser.ConfigParser()
    parser.read(FOLDER / file)
    assert parser["mlflow"]["default_permission"] == "NO_PERMISSIONS" and "admin_password" not in parser["mlflow"]
    assert "@" in parser["mlflow"]["database_uri"] and not re.search(r":[^/]*@", parser["mlflow"]["database_uri"][13:])


def test_the_databases_of_the_compose_file_are_made() -> None:
    made = set(re.findall(r"CREATE DATABASE (\w+);", (FOLDER / "databases.sql").read_text()))
    prefect, mlflow = SERVICES["prefect"]["environment"], SERVICES["mlflow"]["environment"]
    users = (FOLDER / "mlflow-auth.ini").read_text()
    named = {prefect["PREFECT_SERVER_DATABASE_NAME"], mlflow["MLFLOW_BACKEND_STORE_URI"].rpartition("/")[2]}
    assert made == named | set(re.findall(r"@postgres/(\w+)", users))
    for service in (SERVICES["s3"],):
        assert shlex.split(service["entrypoint"][2].replace("$$", "$"))  # a command line that a shell reads

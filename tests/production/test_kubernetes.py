"""The manifests' workers make the jobs of runs: Prefect's server and workers are real, the cluster only takes jobs."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

from lewis.evaluation import work_queue
from lewis_flows import evaluate_elsewhere
from lewis_flows.service.processes import free_port
from lewis_flows.service.servers import prefect_process
from tests.production.test_schemas import FOLDER, KUBERNETES, as_taken, kubernetes_validate
from tests.support.databases import put_prefect
from tests.support.prefect_key import KEY
from tests.support.service import REPO

pytest.importorskip("prefect_kubernetes")

MANIFESTS = FOLDER / "kubernetes"
POD = next(each for each in yaml.safe_load_all((MANIFESTS / "worker.yaml").open()) if each["kind"] == "Deployment")[
    "spec"
]["template"]["spec"]
SETTINGS = dict(
    literal.split("=", 1)
    for made in yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["configMapGenerator"]
    for literal in made.get("literals", [])
)
DANGEROUS: dict[str, Any] = {
    "command": "touch /tmp/evil",
    "env": {"LD_PRELOAD": "/tmp/x"},
    "image": "evil",
    "namespace": "kube-system",
    "service_account_name": "admin",
    "job_manifest": {},
    "gpus": 8,
}


class Cluster(ThreadingHTTPServer):
    """Takes jobs, and knows nothing of what became of them."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        jobs = self.jobs

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                job = json.loads(self.rfile.read(int(self.headers["content-length"])))
                jobs.append({"path": self.path, **job})
                self._answer(201, {**job, "metadata": {**job["metadata"], "name": f"job-{len(jobs)}", "uid": "1"}})

            def do_GET(self) -> None:
                self._answer(404, {"kind": "Status", "code": 404})

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def configuration(self, folder: Path) -> Path:
        """What `kubectl` is given to find a cluster."""
        where = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": "here", "namespace": "lewis"}}
        content = {"clusters": [where], "contexts": [context], "users": [{"name": "here", "user": {}}]}
        (folder / "kubeconfig").write_text(yaml.safe_dump({"current-context": "here", **content}))
        return folder / "kubeconfig"


@pytest.fixture
def client(tmp_path: Path, home: Path, common: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    put_prefect(common, home)
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    server, url = prefect_process(free_port())
    server.start()
    try:
        monkeypatch.setenv("PREFECT_API_URL", url)
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            yield client
    finally:
        server.stop()


def environment(container: dict[str, Any], folder: Path, api: str, cluster: Cluster) -> dict[str, str]:
    """What the manifest gives the container, with the addresses of this machine, and what it needs to run on it."""
    given = {each["name"]: each.get("value", KEY) for each in container["env"]}
    for name in ("recipes", "store"):
        (folder / name).mkdir(exist_ok=True)
    return {
        **{"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))},
        **SETTINGS,
        **given,
        **{"PREFECT_API_URL": api, "LEWIS_RECIPES": f"{folder}/recipes", "LEWIS_HOME": f"{folder}/store"},
        **{"HOME": str(folder), "KUBECONFIG": str(cluster.configuration(folder)), "LEWIS_STORE": ""},
        **{"PREFECT_WORKER_WEBSERVER_PORT": str(free_port()), "PREFECT_WORKER_QUERY_SECONDS": "1"},
        "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED": "false",  # it watches pods, which there are none of
    }


def test_scoring_gets_a_gpu_and_a_merge_none_and_a_run_chooses_nothing(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, api = Cluster(), str(client.api_url)
    (deploy,) = POD["initContainers"]
    command = [each.replace("/etc/lewis", str(MANIFESTS)) for each in deploy["args"]]
    given = environment(deploy, tmp_path, api, cluster)
    recipe = "{merge_method: ties, base_model: org/base, models: [{model: org/math}]}"
    (tmp_path / "recipes" / "tiny.yaml").write_text(recipe)
    done = subprocess.run(command, env=given, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr

    monkeypatch.setenv("LEWIS_EVALUATE_POOL", SETTINGS["LEWIS_EVALUATE_POOL"])
    parameters = {"recipe": "evil", "models": {"evil": "evil"}, "tasks": "evil", "base": "evil", "task": "evil"}
    scoring = evaluate_elsewhere._start(client, work_queue.queue(), parameters | DANGEROUS)
    nightly = client.read_deployment_by_name("merge/tiny")
    of_merge: dict[str, Any] = {"recipe": "tiny", "overrides": ["evil"]}
    for name, value in DANGEROUS.items():
        with pytest.raises(PrefectHTTPStatusError, match=f"409.*Additional properties are not allowed .*{name}"):
            client.create_flow_run_from_deployment(nightly.id, parameters=of_merge | {name: value})
    merge = client.create_flow_run_from_deployment(nightly.id, parameters=of_merge, name="merge evil")
    evaluate = client.read_deployment_by_name(evaluate_elsewhere.DEPLOYMENT)
    for deployment, needed in ((nightly, of_merge), (evaluate, parameters)):
        for name, value in DANGEROUS.items():
            with pytest.raises(PrefectHTTPStatusError, match="422"):
                client.create_flow_run_from_deployment(deployment.id, parameters=needed, job_variables={name: value})

    with ExitStack() as stack:
        for container in POD["containers"]:
            log = stack.enter_context((tmp_path / f"{container['name']}.log").open("w"))
            given = environment(container, tmp_path, api, cluster)
            worker = subprocess.Popen(container["args"], env=given, cwd=REPO, stdout=log, stderr=log)
            stack.callback(worker.wait)
            stack.callback(worker.kill)
        deadline = time.monotonic() + 200
        while len(cluster.jobs) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
    assert len(cluster.jobs) == 2, "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert {each.pop("path") for each in cluster.jobs} == {"/apis/batch/v1/namespaces/lewis/jobs"}
    jobs = {each["metadata"]["labels"]["prefect.io/flow-run-id"]: each for each in cluster.jobs}
    assert set(jobs) == {str(scoring.id), str(merge.id)}
    pods = [jobs[str(run.id)]["spec"]["template"]["spec"] for run in (scoring, merge)]
    for pod in pods:
        (container,) = pod["containers"]
        assert container["args"] == ["prefect", "flow-run", "execute"] and container["image"] == "lewis"
        assert KEY not in json.dumps(pod) and "evil" not in json.dumps(pod)
    wanted = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods]
    assert wanted == ["1", None]
    assert [pod.get("nodeSelector") for pod in pods] == [{"nvidia.com/gpu.present": "true"}, None]
    assert [pod.get("tolerations", [{}])[0].get("key") for pod in pods] == ["nvidia.com/gpu", None]
    for job in jobs.values():
        kubernetes_validate.validate(as_taken(job), KUBERNETES, strict=True)

"""The compose file and the manifests are what their schemas say."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

compose_spec = pytest.importorskip("compose_spec")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

FOLDER = Path(__file__).resolve().parents[2] / "deployments"
KUBERNETES = "1.34"
MANIFESTS = [
    pytest.param(document, id=f"{path.name}-{document['kind']}-{number}")
    for path in sorted((FOLDER / "kubernetes").glob("*.yaml"))
    for number, document in enumerate(yaml.safe_load_all(path.open()))
    if document["kind"] != "Kustomization"
]


def test_the_compose_file() -> None:
    content = yaml.safe_load((FOLDER / "compose.yaml").read_text())  # this parser knows no merge keys
    found = compose_spec.PyCompose.from_yaml(yaml.safe_dump(content))
    found.validate()
    assert set(found.service_names()) == set(content["services"])
    content["services"]["worker"]["comand"] = ["x"]
    with pytest.raises(ValueError, match="comand"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(content))


@pytest.mark.parametrize("document", MANIFESTS)
def test_a_manifest(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def as_taken(job: dict[str, Any]) -> dict[str, Any]:
    """A job without the two fields that Prefect's worker demands where a cluster has none, and so drops them."""
    pod = job["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    return job


@pytest.mark.parametrize("name", ["job.json", "evaluate.json"])
def test_the_job_of_a_run(name: str) -> None:
    template = json.loads((FOLDER / "kubernetes" / name).read_text())
    manifest = as_taken(template["job_configuration"]["job_manifest"])
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    manifest["spec"]["template"]["spec"]["containers"][0]["resorces"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)

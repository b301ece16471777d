"""Traffic moves between two LLMInferenceServices by the weights of their group, step by step."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lewis.errors import InputError, LewisError, TransientError
from lewis.serving import kserve, kubernetes, service
from lewis.serving.canary import WorseError
from lewis.serving.model import Model
from lewis.serving.records import Served, canary_of
from tests.conftest import Family
from tests.support.kserve_place import Place, full, kserve_place
from tests.support.kubernetes_api import INFERENCE_PLACE, PLACE, Cluster
from tests.support.lineage import crowned
from tests.support.routed import model

pytestmark = pytest.mark.slow


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place[Cluster]]:
    with kserve_place(Cluster("blue", "green"), ("blue", "green"), monkeypatch) as found:
        yield found


def serve(place: Place[Cluster], new: Model, before: Served) -> Served:
    kserve.offer(place.target, new, before)
    return before.took(new.uri, new.digest, kserve.put(place.target, new, before), "")


def test_a_new_version_starts_without_traffic_and_gets_it_when_every_step_holds(place: Place[Cluster]) -> None:
    first, second, third = map(full, (1, 2, 3))
    record = serve(place, first, Served("tiny", "kserve", "kserve"))
    cluster = place.cluster
    assert cluster.shares() == {"blue": 0, "green": 100} and cluster.uri("green") == f"pvc://store/served/{first.alias}"
    assert kserve.holds(place.target, record)
    record = serve(place, second, record)
    assert cluster.shares() == {"blue": 100, "green": 0} and cluster.uri("blue") == f"pvc://store/served/{second.alias}"
    assert [each[2] for each in cluster.ran[-2:]] == [0, 0], "a service with traffic was started again"
    weights = [each.json["spec"]["router"]["route"]["weight"] for each in cluster.received if "weight" in each.body]
    assert weights[-7:] == [0, 90, 10, 50, 50, 100, 0], "the one that is to have more always gets it first"
    assert [(each.share, each.passed) for each in second.steps] == [(10, True), (50, True)]
    assert {rule.name for rule in second.steps[0].rules} == {rule.name for rule in place.target.rules}
    assert all('namespace="models",llm_isvc_name="' in query for query in place.asked)
    metadata = cluster.services["blue"]["metadata"]
    assert metadata["annotations"] == {"team": "ours"}, "what others have set stays, and it is not stopped"
    started = len(cluster.ran)
    kserve.offer(place.target, second, Served("tiny", "kserve", "kserve", first.uri, first.digest, first.alias))
    assert len(cluster.ran) == started, "killed after it had started: it is not started again"
    kserve.offer(place.target, third, record)
    status = cluster.services["green"]["status"]
    status["conditions"], kept = [{"type": "Ready", "status": "False"}], status["conditions"]
    with pytest.raises(TransientError, match="green was given 10 % and has lost the new version"):
        kserve.put(place.target, third, record)
    assert cluster.shares() == {"blue": 100, "green": 0}
    cluster.services["green"]["status"]["conditions"] = kept
    record = serve(place, third, record)
    cluster.services["green"]["spec"]["model"]["uri"] = "hf://somebody/else"
    assert not kserve.holds(place.target, record)


def test_a_version_that_is_worse_loses_its_traffic_and_the_numbers_are_kept(
    place: Place[Cluster], family: Family
) -> None:
    cluster, target = place.cluster, place.target.model_copy(update={"check": None})
    first = crowned(family.base, "a")
    assert service.serve(target, first)[1]
    second = crowned(family.base, "b")
    place.errors.update(blue=0.2)
    with pytest.raises(WorseError, match=r"tiny/1 stays in service: canary at 10 %, 99 requests.*errors 0.2 vs 0.001"):
        service.serve(target, second)
    assert cluster.shares() == {"blue": 0, "green": 100}
    kept = canary_of(second.version, "kserve")
    assert kept and "canary at 10 %" in kept.why
    assert [rule.limit for rule in kept.steps[0].rules] == pytest.approx([0.011, 0.5, 0.3])
    assert service.serve(target, first)[1] is False, "it is in service all the time"
    cluster.starts = None
    with pytest.raises(LewisError, match=r"blue did not become ready within 0.01 minutes; .* is False Starting"):
        service.serve(target.model_copy(update={"start_minutes": 0.01}), crowned(family.base, "c"))
    assert cluster.shares() == {"blue": 0, "green": 100}


def test_the_account_of_the_manifest_may_do_what_is_done_and_nothing_else(place: Place[Cluster]) -> None:
    text = (Path(__file__).resolve().parents[3] / "deployments" / "kubernetes" / "kserve.yaml").read_text()
    role, binding = yaml.safe_load_all(text)
    serve(place, full(1), Served("tiny", "kserve", "kserve"))
    [rule] = role["rules"]
    assert {verb.upper() for verb in rule["verbs"]} == {each.method for each in place.cluster.received}
    paths = [f"/apis/{rule['apiGroups'][0]}/{{}}/namespaces/models/{each}/" for each in rule["resources"]]
    assert [paths[0].format("v1alpha2"), paths[1].format("v1beta1")] == [PLACE, INFERENCE_PLACE]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_an_adapter_takes_the_place_of_the_one_that_the_service_has(place: Place[Cluster]) -> None:
    serve(place, model(1), Served("tiny", "kserve", "kserve"))
    content = place.cluster.services["green"]["spec"]["model"]
    own = {"name": "tiny", "uri": f"pvc://store/served/{model(1).alias}"}
    assert content == {"uri": "hf://org/base", "name": "tiny", "lora": {"adapters": [own]}}
    gateway = place.target.model_copy(update={"gateway": "http://gateway/", "alias": "ours"})
    assert kserve.api(gateway, model(2), Served("tiny", "kserve", "kserve")) == (
        "http://gateway/models/blue/v1",
        "ours",
    )
    assert kserve.api(place.target, model(2), Served("tiny", "kserve", "kserve")) is None


def test_what_the_cluster_does_not_take_is_named(place: Place[Cluster]) -> None:
    with pytest.raises(LewisError, match=r'answered 400: .*unknown field \\"spec.router.route.wait\\"'):
        kubernetes.patch(place.target, kserve.SERVICE, "blue", {"spec": {"router": {"route": {"wait": 1}}}})
    with pytest.raises(LewisError, match=r"answered 400: .*weight: expected int, got '5'"):
        kubernetes.patch(place.target, kserve.SERVICE, "blue", {"spec": {"router": {"route": {"weight": "5"}}}})
    lost = place.target.model_copy(update={"services": ("blue", "red")})
    with pytest.raises(LewisError, match=r'answered 404: .*\\"red\\" not found'):
        kserve.idle(lost, Served("tiny", "kserve", "kserve"))
    place.cluster.services["green"]["spec"]["router"]["route"]["group"] = "other"
    with pytest.raises(InputError, match=r"blue and green: expected LLMInferenceServices of one group .* other, tiny"):
        kserve.idle(place.target, Served("tiny", "kserve", "kserve"))
    place.cluster.answer = lambda _: {"kind": "LLMInferenceService"}  # as an API that is none may answer
    with pytest.raises(InputError, match=r"blue and green: expected LLMInferenceServices of one group .*, got None"):
        kserve.idle(place.target, Served("tiny", "kserve", "kserve", "models:/tiny/1", "1" * 64, "tiny-1"))
    place.cluster.answer = lambda _: [1]
    with pytest.raises(LewisError, match="its answer is no JSON object; is this the API of Kubernetes"):
        kserve.idle(place.target, Served("tiny", "kserve", "kserve"))


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl")
def test_the_account_s_token_goes_only_where_the_cluster_s_certificate_is(
    place: Place[Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, account = place.cluster, tmp_path / "account"
    monkeypatch.setattr(kubernetes, "ACCOUNT", account)
    monkeypatch.setenv("LEWIS_SERVE_KEY", "by-hand")
    account.mkdir()
    (account / "token").write_text("of-the-pod\n")
    certificate(tmp_path, account / "ca.crt")
    kubernetes.read(place.target, kserve.SERVICE, "blue")
    assert cluster.received[-1].headers["authorization"] == "Bearer by-hand", "http proves nothing about the server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    cluster._server.socket = context.wrap_socket(cluster._server.socket, server_side=True)
    target = place.target.model_copy(update={"api": cluster.url.replace("http:", "https:")})
    kubernetes.read(target, kserve.SERVICE, "blue")
    assert cluster.received[-1].headers["authorization"] == "Bearer of-the-pod"
    certificate(tmp_path / "other", account / "ca.crt")
    seen = len(cluster.received)
    with pytest.raises(LewisError, match="SSLError"):
        kubernetes.read(target, kserve.SERVICE, "blue")
    assert len(cluster.received) == seen


def certificate(folder: Path, ca: Path) -> None:
    """A certificate for 127.0.0.1 that vouches for itself: with its key in `server.pem`, alone in `ca`."""
    folder.mkdir(exist_ok=True)
    kind = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=here"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "server.pem"), "-out", str(ca)]
    subprocess.run(["openssl", *kind.split(), *files], check=True, capture_output=True)
    with (folder / "server.pem").open("a") as pem:
        pem.write(ca.read_text())

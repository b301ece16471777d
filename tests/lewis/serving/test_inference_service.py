"""Traffic moves between the revisions of an InferenceService by its canary percent."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lewis.errors import InputError, LewisError, TransientError
from lewis.serving import inference_service, service
from lewis.serving.canary import WorseError
from lewis.serving.model import Model
from lewis.serving.records import Served
from tests.conftest import Family
from tests.support.kserve_place import Place, full, kserve_place
from tests.support.kubernetes_api import Knative
from tests.support.lineage import crowned
from tests.support.routed import model

pytestmark = pytest.mark.slow
FIRST = Served("tiny", "kserve", "kserve")


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place[Knative]]:
    with kserve_place(Knative(), "tiny", monkeypatch) as found:
        yield found


def serve(place: Place[Knative], new: Model, before: Served) -> Served:
    inference_service.offer(place.target, new, before)
    return before.took(new.uri, new.digest, inference_service.put(place.target, new, before), "")


def uri(new: Model) -> str:
    return f"pvc://store/served/{new.alias}"


def test_a_new_revision_starts_without_traffic_and_gets_it_when_every_step_holds(place: Place[Knative]) -> None:
    cluster, (first, second) = place.cluster, map(full, (1, 2))
    record = serve(place, first, FIRST)
    names = list(cluster.revisions)
    assert list(cluster.revisions.values()) == ["hf://org/base", uri(first)]
    assert cluster.shares == [{names[0]: 100}, {names[1]: 0, names[0]: 100}, {names[1]: 100}]
    assert inference_service.holds(place.target, record)
    record = serve(place, second, record)
    old, new = list(cluster.revisions)[1:]
    assert cluster.revisions[new] == uri(second)
    assert cluster.shares[3:] == [{new: 0, old: 100}, {new: 10, old: 90}, {new: 50, old: 50}, {new: 100}]
    assert [(each.share, each.passed) for each in second.steps] == [(10, True), (50, True)]
    assert all('namespace="models",serving_knative_dev_revision="' in query for query in place.asked)
    assert {query.split('revision="')[1].split('"')[0] for query in place.asked} == {old, new}
    assert cluster.services["tiny"]["metadata"]["annotations"]["team"] == "ours", "what others have set stays"
    assert cluster.services["tiny"]["spec"]["predictor"]["model"]["modelFormat"] == {"name": "huggingface"}
    assert inference_service.holds(place.target, record)
    cluster.services["tiny"]["spec"]["predictor"]["model"]["storageUri"] = "hf://somebody/else"
    assert not inference_service.holds(place.target, record)


def test_a_process_that_died_is_taken_up_where_it_was(place: Place[Knative]) -> None:
    cluster, (first, second) = place.cluster, map(full, (1, 2))
    record = serve(place, first, FIRST)
    inference_service.offer(place.target, second, record)
    made, asked = len(cluster.revisions), len(place.asked)
    inference_service.offer(place.target, second, record)
    assert len(cluster.revisions) == made, "killed after it was ready: it is not made again"
    assert inference_service.holds(place.target, record), "the one before has the traffic until the canary"
    serve(place, second, record)
    asked = len(place.asked)
    again = serve(place, second, record)
    assert len(cluster.revisions) == made and len(place.asked) == asked, "killed before it was recorded: nothing moves"
    assert again.alias == second.alias and inference_service.holds(place.target, again)


def test_a_revision_that_was_still_starting_when_its_process_died_is_waited_for(place: Place[Knative]) -> None:
    """The next attempt waited for another revision, which never came."""
    cluster = place.cluster
    record = serve(place, full(1), FIRST)
    cluster.starts = 0.7
    impatient = place.target.model_copy(update={"start_minutes": 0.001})
    with pytest.raises(LewisError, match="did not become ready with a new revision"):
        inference_service.offer(impatient, full(2), record)
    while len(cluster.revisions) < 3:
        time.sleep(0.01)
    inference_service.offer(place.target, full(2), record)
    assert list(cluster.revisions.values()) == ["hf://org/base", uri(full(1)), uri(full(2))]


@pytest.mark.long
def test_a_version_that_is_worse_loses_its_traffic(place: Place[Knative], family: Family) -> None:
    cluster, target = place.cluster, place.target.model_copy(update={"check": None})
    first = crowned(family.base, "a")
    assert service.serve(target, first)[1]
    good = next(reversed(cluster.revisions))
    second = crowned(family.base, "b")
    place.errors["tiny-predictor-00003"] = 0.2
    with pytest.raises(WorseError, match=r"tiny/1 stays in service: canary at 10 %, 99 requests.*errors 0.2 vs 0.001"):
        service.serve(target, second)
    assert cluster.shares[-1] == {"tiny-predictor-00003": 0, good: 100}
    assert service.serve(target, first)[1] is False, "it is in service all the time"
    cluster.starts = None
    with pytest.raises(LewisError, match=r"did not become ready with a new revision within 0.01 min.* False Revision"):
        service.serve(target.model_copy(update={"start_minutes": 0.01}), crowned(family.base, "c"))
    assert cluster.shares[-1][good] == 100, "neither the one that was refused nor the one that does not start has any"
    cluster.starts = 0.02
    assert service.serve(target, crowned(family.base, "d"))[1]
    new = next(reversed(cluster.revisions))
    assert cluster.shares[-4:] == [*({new: share, good: 100 - share} for share in (0, 10, 50)), {new: 100}]


def test_a_revision_that_is_lost_in_its_canary_has_no_traffic(place: Place[Knative]) -> None:
    record = serve(place, full(1), FIRST)
    inference_service.offer(place.target, full(2), record)
    place.cluster.services["tiny"]["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    with pytest.raises(TransientError, match="tiny-predictor-00003 was given 10 % and has lost the new version"):
        inference_service.put(place.target, full(2), record)
    assert place.cluster.shares[-1] == {"tiny-predictor-00003": 0, "tiny-predictor-00002": 100}


def test_the_newest_revision_is_checked_at_a_url_of_its_own(place: Place[Knative]) -> None:
    assert inference_service.api(place.target, full(1), FIRST) is None, "without the annotation there is none"
    inference_service.offer(place.target, full(1), FIRST)
    assert inference_service.api(place.target, full(1), FIRST) == ("http://latest-tiny.models/openai/v1", "tiny")
    other = place.target.model_copy(update={"path": "/v1", "alias": "ours"})
    assert inference_service.api(other, full(1), FIRST) == ("http://latest-tiny.models/v1", "ours")


def test_what_has_no_revisions_is_refused(place: Place[Knative]) -> None:
    with pytest.raises(
        InputError, match=r"models:/tiny/1 is an adapter; set `output: full`, or serve it by two LLMInf"
    ):
        inference_service.offer(place.target, model(1), FIRST)
    status = place.cluster.services["tiny"]["status"]
    status["deploymentMode"] = "Standard"
    with pytest.raises(InputError, match=r"deployment mode Knative.*got the mode Standard and the revision tiny-pred"):
        inference_service.offer(place.target, full(1), FIRST)
    status["deploymentMode"] = "Knative"
    del status["components"], place.cluster.services["tiny"]["spec"]
    with pytest.raises(InputError, match="no revision that was rolled out"):
        inference_service.offer(place.target, full(1), FIRST)
    assert not [each for each in place.cluster.received if each.method == "PATCH"]

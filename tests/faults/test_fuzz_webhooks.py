"""Any body that the receiver gets is answered: taken, ignored or refused, never an error of the receiver."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewis_flows.service import receiver
from lewis_flows.service.receiver import Receiver
from tests.faults.fuzz import ANY, ODD, changed, fuzzed, outcome

NEW = "f" * 40
BODY: dict[str, Any] = {
    "event": {"action": "update", "scope": "repo.content"},
    "repo": {"type": "model", "name": "org/math", "id": "6", "private": False, "headSha": NEW, "owner": {"id": "1"}},
    "updatedRefs": [{"ref": "refs/heads/main", "oldSha": "0" * 40, "newSha": NEW}],
    "webhook": {"id": "3", "version": 3},
}
WORDS = st.sampled_from(
    [
        "org/math",
        "org/other",
        "Org/Math",
        "../x/y",
        "org/math\n",
        "refs/heads/main",
        "a" * 40,
        "F" * 40,
        "{{ 7*7 }}",
        "create",
    ]
)
RAW = st.sampled_from(
    [b"", b"[" * 200_000, b'{"event":' * 50_000, b"1" * 5000, b'"\\ud800"', b"\xff\xfe", b"null", b"[]"]
)


@pytest.fixture(scope="module")
def taking(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A receiver with a good recipe and a bad one; Prefect is not asked, and nothing is announced."""
    folder: Path = tmp_path_factory.mktemp("recipes")
    (folder / "good.yaml").write_text("{merge_method: ties, base_model: org/base, models: [{model: org/math}]}")
    (folder / "bad.yaml").write_text("models: [")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEWIS_RECIPES", str(folder))
        patch.setattr(receiver, "_ask", lambda *given: (set(), set(), set()))
        patch.setattr(receiver, "announce", lambda *given: "id")
        yield Receiver()


@fuzzed
@given(
    body=changed(BODY, ANY | ODD | WORDS).map(lambda data: json.dumps(data).encode(errors="surrogatepass"))
    | RAW
    | st.binary(max_size=200)
)
def test_webhook_bodies(taking: Receiver, body: bytes) -> None:
    status, answer = outcome(lambda: taking.take(body))
    assert status in (200, 202, 422) and "{{" not in json.dumps({**answer, "repo": ""})

"""What a browser shows of our servers, and that it asks nobody else; skipped where there is no Chromium."""

import base64
import functools
import io
import re
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

from lewis import store
from lewis.evaluation.documents import Document, SideBySide
from lewis.evaluation.gate import Verdict
from lewis.evaluation.statistics.scores import Texts
from lewis.registry import creation, history, promotion
from lewis.registry.registration import Registration
from lewis.reports.side_by_side import answer_rows
from lewis.store.secrets import MLFLOW_PASSWORD
from lewis_flows.service import credentials
from lewis_flows.service.processes import free_port
from lewis_flows.service.servers import mlflow_process
from tests.benchmarks.browser import CHROMIUM, Browser
from tests.conftest import Family
from tests.support.prefect_key import KEY

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium"),
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "browser") as browser:
        yield browser


def test_the_dashboard_offers_no_second_page_and_asks_nobody_else(prefect_url: str, browser: Browser) -> None:
    """`Try V2 UI` led to pages that call a tracking host."""
    ui = prefect_url.removesuffix("/api")
    password = base64.b64encode(KEY.encode()).decode()
    browser.remember(ui, {"prefect-password": password})
    for page in ("dashboard", "runs", "deployments", "automations"):
        browser.open(f"{ui}/{page}", page.title()[:4], width=1200, height=700)
        assert "V2" not in browser.run("document.body.innerText")
    assert browser.outside == []


def test_mlflow_shows_the_pictures_the_source_and_how_long_it_took(
    home: Path, family: Family, browser: Browser, tmp_path: Path
) -> None:
    """The picture on the version's page was broken; a run of two minutes had taken 2.9 s, and its source was empty."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(picture, "PNG")
    folder = store.home() / "merged" / ("a" * 64)
    with store.publish(folder, {"digest": "a" * 64}) as scratch:
        for path in family.base.iterdir():
            (scratch / path.name).write_bytes(path.read_bytes())
    card = "# Tiny\n\n## Density per layer\n\n![Density](density.png)\n"
    drawn = {"density.png": picture.getvalue()}
    words = [Texts(f"what is {n}?", "a", answer) for n in range(3) for answer in ("an answer", "another answer")]
    pairs = [(words[2 * n], words[2 * n + 1]) for n in range(3)]
    documents = (Document(("sums", f"{n}", 0), "sums/acc,none", True, 1, 0, (), pair) for n, pair in enumerate(pairs))
    beside = SideBySide("merged", "champion", (), tuple(documents))
    about: dict[str, Any] = {"source": "tiny.yaml", "began": time.time() - 120, "beside": beside}
    score, tables = {"merged/sums/acc,none": 0.75}, {"answers": answer_rows(beside)}
    made = creation.register(Registration("tiny", folder, "a" * 64, {}, score, {}, "", drawn, tables, card, **about))
    promotion.promote(made, Verdict(True, (), "nothing", metric="sums/acc,none"))
    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    client.set_registered_model_alias("tiny", "kept", "1")
    experiment = client.get_run(made.run_id).info.experiment_id
    [chart] = client.search_runs([experiment], f"tags.`{history.CHART}` = 'tiny'")
    server, url = mlflow_process(free_port(), f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    server.start()
    try:
        seen = {"_mlflow_user_setting_dismiss_next_model_registry_ui": "true", "mlflow.assistant.panelOpen_v1": "false"}
        browser.sign_in(url, credentials.MLFLOW_USER, MLFLOW_PASSWORD.read())
        browser.remember(f"{url}/#/models", {**seen, "mlflow.workflowType_v1": "machine_learning"})
        browser.open(f"{url}/#/models/tiny/versions/1", "Density per layer", width=1200, height=900)
        images = "[...document.images].filter(each => each.src.includes('density')).map(each => each.naturalWidth)"
        assert browser.run(images) == [8]
        browser.open(f"{url}/#/runs/{made.run_id}", "Duration", width=1200, height=900)
        shown = browser.run("document.body.innerText")
        assert "tiny.yaml" in shown and re.search(r"\b2\.\d ?min", shown), shown
        browser.open(f"{url}/#/experiments/{experiment}/traces", "what is 1?", width=1500, height=900)
        assert "another answer" in browser.run("document.body.innerText")
        model = client.get_model_version("tiny", "1").source.removeprefix("models:/")
        browser.open(f"{url}/#/experiments/{experiment}/models/{model}/traces", "what is 2?", width=1500, height=900)
        assert "another answer" not in browser.run("document.body.innerText")  # which is the champion's
        browser.open(
            f"{url}/#/experiments/{experiment}/runs/{made.run_id}/artifacts/answers.json",
            "another answer",
            width=1500,
            height=900,
        )
        browser.open(
            f"{url}/#/experiments/{experiment}/runs/{chart.info.run_id}/model-metrics",
            "champion/sums/acc",
            width=1500,
            height=900,
        )
        misused(browser, url, tmp_path / "other")
        assert set(client.get_registered_model("tiny").aliases) == {"champion", "kept"}
    finally:
        server.stop()
    assert browser.outside == []


def misused(browser: Browser, url: str, folder: Path) -> None:
    """A page of another port of this machine, in a browser that has signed in, changes nothing and frames nothing."""
    folder.mkdir()
    (folder / "index.html").write_text(f"<p>the other page</p><iframe src={url}></iframe>")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        browser.open(f"http://127.0.0.1:{other.server_port}/", "the other page", width=800, height=600)
        remove = f"{url}/api/2.0/mlflow/registered-models/alias?name=tiny&alias=kept"
        for more in ("", ", mode: 'no-cors', method: 'POST'"):
            asked = f"fetch('{remove}', {{method: 'DELETE', credentials: 'include'{more}}})"
            browser.run(f"{asked}.then(e => e.status).catch(e => 'refused')")
        read = f"fetch('{url}/ajax-api/2.0/mlflow/experiments/search', {{credentials: 'include'}})"
        assert browser.run(f"{read}.then(e => e.status).catch(e => 'refused')") == "refused"
        tree = browser._call("Page.getFrameTree")["frameTree"]
        assert [each["frame"]["url"] for each in tree["childFrames"]] == ["chrome-error://chromewebdata/"]
        other.shutdown()

"""The page of a run: what it shows, that text of models stays text, and that it needs nothing else."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from lewis.evaluation.documents import Document, SideBySide
from lewis.evaluation.gate import Verdict
from lewis.evaluation.statistics.scores import Score, Texts
from lewis.reports.page import PageFacts, StepTime, to_html
from lewis.reports.run_report import Change, RunFacts
from tests.benchmarks.browser import CHROMIUM, Browser

BAD = "</pre><script>document.title='owned'</script><img src=http://elsewhere.example/x.png onerror=alert(1)>\ud800"
KEPT = {"expert": "org/math", "task": "sums/acc,none ↑", "base": "0.25", "expert's score": "0.75", "merged": "0.7"}


def score(task: str, value: float) -> Score:
    return Score(task, "acc,none", value, 0.02, True, 200)


def document(number: int, ours: float) -> Document:
    texts = Texts("what is 1 + 1?", "2", BAD), Texts("what is 1 + 1?", "2", "2")
    return Document(("sums", f"{number}" * 8, 0), "sums/acc,none", True, ours, 1.0, (), texts)


def test_a_rejected_run_says_why() -> None:
    lost = tuple(document(number, float(number > 1)) for number in range(9))
    facts = RunFacts(
        *("r", "Rejected.", "by hand", 3, "a" * 64),
        verdict=Verdict(False, ("gain 0.25: fail",), "models:/m/2"),
        documents=SideBySide("merged", "champion", ("org/math",), lost),
        layers=[{"expert": "org/math", "layer": "7", "moved": "12 %", "kept": "31 %"}],
    )
    page = to_html(facts, PageFacts())
    why = page.partition("<h2>Why it is worse</h2>")[2].partition("<h2>")[0]
    assert "2 of 9 documents are lost against champion; gained: 0. There the experts are better: org/math on 0" in why
    assert why.count("what is 1 + 1?") == 2 and "&lt;script&gt;" in why and "<td>12 %</td>" in why
    assert "Why it is worse" not in to_html(replace(facts, verdict=Verdict(True, (), "models:/m/2")), PageFacts())


@pytest.fixture
def page() -> str:
    scores = {
        "base": [score("sums", 0.25), score("words", 0.5)],
        "org/math": [score("sums", 0.75)],
        "merged": [score("sums", 0.7), score("words", 0.55)],
    }
    facts = RunFacts(
        recipe=f"nightly{BAD}",
        outcome="models:/m/3 is the new champion.",
        why="by hand",
        seconds=185.2,
        digest="5c1f0a2b" + "0" * 56,
        champion="models:/m/2",
        changes=[Change("org/base", "1" * 40, "1" * 40), Change("org/math", "1" * 40, "2" * 40)],
        work={"measure": (1, 2)},
        scores=scores,
        comparison=[{"metric": "sums", "model": "base", "score": "0.25"}],
        kept=[{**KEPT, "kept": "90 %"}],
        verdict=Verdict(True, ("gain 0.25: pass", "note: few documents"), "models:/m/2", metric="sums/acc,none"),
        documents=SideBySide("merged", "champion", (), tuple(document(i, float(i > 1)) for i in range(9))),
        links={"MLflow run": "http://127.0.0.1:5000/#/runs/1", "odd": "javascript:alert(1)"},
    )
    moved = {
        "org/math": {
            f"model.layers.{layer}.{name}.weight": 0.001 * 4**layer
            for layer in range(4)
            for name in ("self_attn.q_proj", "mlp.up_proj")
        }
    }
    steps = [StepTime("download base", "Cached", 0.1, 0.0), StepTime("merge experts", "Completed", 2.0, 75.0)]
    roles = {"org/base": "base", "org/math": "expert"}
    return to_html(facts, PageFacts(roles, moved, {}, steps, {("merged", "sums", "acc,none"): (0.6, 0.8)}, "a: <b>"))


class Tags(HTMLParser):
    """The tags of a page, and whether each that is opened is closed in its place."""

    VOID = ("meta", "img", "br", "rect", "path")

    def __init__(self) -> None:
        super().__init__()
        self.found, self.open = list[tuple[str, dict[str, str | None]]](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open += [tag] if tag not in self.VOID else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def test_it_is_one_file_without_script_in_which_texts_are_only_texts(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and "script" not in {tag for tag, _ in tags.found}
    loads = [attributes.get("src") for tag, attributes in tags.found if "src" in attributes or tag == "link"]
    assert all(str(each).startswith("data:image/png;base64,") for each in loads)
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    assert [attributes["href"] for tag, attributes in tags.found if tag == "a"] == ["http://127.0.0.1:5000/#/runs/1"]
    assert "url(" not in page and "@import" not in page and "default-src &#x27;none" not in page
    assert page.count("&lt;script&gt;") >= 8 and "a: &lt;b&gt;" in page


def test_it_shows_each_part_once(page: str) -> None:
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        *("Scores", "What is kept of each expert&#x27;s gain", "The gate", "Where the experts moved"),
        *("Answers side by side", "Lineage", "What each step took", "Recipe"),
    ]
    assert "0.7<span class=soft> ± 0.1</span>" in page and "90 %" in page
    assert page.count('<i style="--v:') == 8 and "layer 3, up_proj: 0.064" in page
    assert "11111111 → 22222222" in page and "1 min 15 s" in page and ">found</span>" in page


def test_a_run_without_scores_has_no_empty_part() -> None:
    page = to_html(RunFacts("plain", "Merged; the recipe registers nothing.", "by hand", 3, "a" * 64), PageFacts())
    assert re.findall("<h2>(.*?)</h2>", page) == []


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium")
def test_a_browser_shows_it_and_asks_nobody(page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page)
    with served(tmp_path) as url, Browser(tmp_path / "browser") as browser:
        browser.open(f"{url}/report.html", "What each step took", width=1100, height=900)
        assert browser.run("document.title").startswith("nightly</pre><script>") and browser.outside == []
        assert browser.run("document.documentElement.scrollWidth") == 1100
        widths = "[...document.querySelectorAll('.map i')].map(each => each.getBoundingClientRect().width)"
        assert min(browser.run(widths)) >= 10
        colours = "[...document.querySelectorAll('.map i')].map(each => getComputedStyle(each).backgroundColor)"
        assert len(set(browser.run(colours))) == 4  # a colour for each layer


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

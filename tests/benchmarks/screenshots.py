"""The README's pictures, taken with a real browser from a real run: python -m tests.benchmarks.screenshots

The demo family is on a local Hub, `lewis up` runs next to it, and an expert is released: first a weak one, then a
better one. The second release is what the pictures show. Everything is started here, in a temporary folder, and ends
here.
"""

import base64
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from tests.benchmarks.browser import Browser
from tests.support.local_hub import LocalHub
from tests.support.service import REPO, Service

FOLDER = REPO / ".readme"
MAX_BYTES = 120_000
RECIPE, MODEL = "demo", "lewis-demo-guided"
ASKS = "careful"  # a recipe whose champion a person approves


def main() -> int:
    """Take all pictures; 1 if a page asked for anything beyond loopback."""
    with (
        tempfile.TemporaryDirectory(prefix="lewis-screenshots-") as folder,
        stage(Path(folder)) as (service, run),
        Browser(Path(folder) / "browser") as browser,
    ):
        take(browser, service, run)
    for url in browser.outside:
        print(f"a page asked for {url}", file=sys.stderr)
    return 1 if browser.outside else 0


@contextmanager
def stage(root: Path) -> Iterator[tuple[Service, dict[str, Any]]]:
    """The service after a release and a better one; gives it and the run of the second."""
    from lewis.demo.family import SKILLS, make_family

    family = make_family(root / "family", lambda what, part: None)
    with LocalHub(root / "hub") as hub:
        hub.commit("demo/base", family / "base")
        for skill in SKILLS:
            hub.commit(f"demo/{skill}", family / "experts" / skill)
        service = Service(root, hub)
        write_recipe(family, service.recipes)
        with service:
            hub.commit("demo/sorting", write_weak(family, "sorting", root / "weak"))
            service.finished(RECIPE, 1, 600)
            service.until(lambda: service.start_run(f"merge/{RECIPE}"), 60)  # a busy server: 503
            service.finished(RECIPE, 2, 600)
            hub.commit("demo/sorting", family / "experts" / "sorting")
            run = service.finished(RECIPE, 3, 600)[-1]
            service.until(lambda: waiting(service), 300)
            yield service, run


def waiting(service: Service) -> list[dict[str, Any]]:
    """The runs that wait for a person."""
    return [run for run in service.runs(ASKS) if run["state_name"] == "Suspended"]


def write_weak(family: Path, skill: str, folder: Path) -> Path:
    """An expert that has gone less than half of its way from the base."""
    from safetensors.torch import load_file

    from tests.support.models import rewrite

    base = load_file(family / "base" / "model.safetensors")
    return rewrite(family / "experts" / skill, folder, lambda name, tensor: base[name] + 0.4 * (tensor - base[name]))


def write_recipe(family: Path, folder: Path) -> None:
    """The demo's recipe, with its models on the Hub, next to its data and tasks."""
    for name in ("data", "tasks"):
        (folder / name).symlink_to(family / name)
    content = yaml.safe_load((family / "lewis.yaml").read_text())
    content["base_model"] = "demo/base"
    for entry in content["models"]:
        entry["model"] = entry["model"].replace("./experts", "demo")
    content["register"]["gate"]["tolerance"] = 0.1  # 120 documents tell no less
    text = "# Addition, sorting and a cipher in one model.\n"
    (folder / f"{RECIPE}.yaml").write_text(text + yaml.safe_dump(content, sort_keys=False))
    content["register"] |= {"name": ASKS, "gate": {**content["register"]["gate"], "approve": True}}
    text = "# The same, for those who want to have a look first.\n"
    (folder / f"{ASKS}.yaml").write_text(text + yaml.safe_dump(content, sort_keys=False))


def take(browser: Browser, service: Service, run: dict[str, Any]) -> None:
    """One picture after the other."""
    ui = service.api.removesuffix("/api")
    this_run = f"{ui}/runs/flow-run/{run['id']}"
    password = base64.b64encode(service.key().encode()).decode()
    browser.remember(ui, {"prefect-v2-promo-dismissed": "true", "prefect-password": password})
    browser.open(f"{ui}/runs", "Promoted", width=1300, height=1000)
    save("dashboard", browser.picture())

    browser.open(f"{ui}/deployments", ASKS, width=1300, height=640)
    save("deployments", browser.picture())

    (asks,) = waiting(service)
    browser.open(f"{ui}/runs/flow-run/{asks['id']}", "Suspended", width=1300, height=800)
    browser.click("button", "Resume")
    save("approval", browser.picture())

    browser.open(this_run, "Artifacts", width=1500, height=850)
    browser.click(".run-graph__actions button[title^='Toggle fullscreen']")
    browser.click(".run-graph__actions button[aria-label='Run Graph Options']")
    browser.click("label", "Dependency grid")
    browser.click(".run-graph__actions button[title^='Recenter']")
    save("dag", browser.picture())

    browser.open(this_run, "Artifacts", width=1200, height=1780)
    browser.click("[class*=tab] *", "Artifacts")
    save("artifacts", browser.picture())

    report = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}, "key": {"any_": [f"{RECIPE}-run-report"]}}}
    found = service.ask("/artifacts/filter", report)[0]
    browser.open(f"{ui}/artifacts/artifact/{found['id']}", "What changed", width=1560, height=1800)
    save("report", browser.picture())

    seen = {"_mlflow_user_setting_dismiss_next_model_registry_ui": "true", "mlflow.assistant.panelOpen_v1": "false"}
    browser.sign_in(service.mlflow, "lewis", service.password())
    browser.remember(f"{service.mlflow}/#/models", seen)
    version = service.versions(MODEL)[0].version
    browser.open(f"{service.mlflow}/#/models/{MODEL}/versions/{version}", "Scores", width=1200, height=760)
    save("mlflow", browser.picture())


def save(name: str, png: bytes) -> None:
    """Write a picture of few colours to the README's folder.

    Raises:
        AssertionError: if it is too large for a README.
    """
    packed = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(packed, "PNG", optimize=True)
    assert len(packed.getvalue()) <= MAX_BYTES, f"{name}: {len(packed.getvalue())} bytes"
    (FOLDER / f"{name}.png").write_bytes(packed.getvalue())
    print(f"{name}.png: {picture.width} x {picture.height}, {len(packed.getvalue()) / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What an operator gets in addition to the program: runbook, alert rules, dashboard, units of systemd."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis_flows.service import status_data

DEPLOYMENTS = Path(__file__).resolve().parents[3] / "deployments"
RUNBOOK = (DEPLOYMENTS / "RUNBOOK.md").read_text()
METRICS = set(re.findall(r"`(lewis_\w+)`", "".join(page.read_text() for page in DEPLOYMENTS.glob("*.md"))))
ALERTS = yaml.safe_load((DEPLOYMENTS / "prometheus-alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
BOARD: dict[str, Any] = json.loads((DEPLOYMENTS / "grafana-dashboard.json").read_text())


def test_the_runbook_has_every_problem() -> None:
    codes = [value for name, value in vars(status_data).items() if name.isupper() and isinstance(value, int)]
    assert list(map(int, re.findall(r"^## (\d+): ", RUNBOOK, re.MULTILINE))) == sorted(codes)


def test_every_alert_leads_to_a_place_in_the_runbook() -> None:
    titles = re.findall(r"^## (.*)$", RUNBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert {rule["annotations"]["runbook"].partition("#")[2] for rule in RULES} <= anchors


def test_a_comment_that_names_a_section_names_one_that_there_is() -> None:
    """Two named sections of a page that has none of them any more."""
    files = [path for ending in ("service", "yaml") for path in DEPLOYMENTS.rglob(f"*.{ending}")]
    named = {each for path in files for each in re.findall(r'(\w+\.md), "([^"]+)"', path.read_text())}
    assert named and all(f"## {title}\n" in (DEPLOYMENTS / page).read_text() for page, title in named)


def test_prometheus_takes_the_alerts_and_they_fire() -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("there is no promtool; apt install promtool, or prometheus on older systems")
    tests = Path(__file__).with_name("prometheus-alerts-test.yaml")
    for command in (["check", "rules", DEPLOYMENTS / "prometheus-alerts.yaml"], ["test", "rules", tests]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    cases = [case for test in yaml.safe_load(tests.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == {rule["alert"] for rule in RULES}


def test_the_scrape_configuration_of_the_page_sends_the_key() -> None:
    [block] = re.findall(r"^    scrape_configs:\n(?:      .*\n)+", (DEPLOYMENTS / "SCALE.md").read_text(), re.MULTILINE)
    [job] = yaml.safe_load(block)["scrape_configs"]
    assert job["job_name"] == "lewis" and job["authorization"]["credentials_file"].endswith("metrics-key")


def test_alerts_and_dashboard_ask_for_numbers_that_there_are() -> None:
    asked = [rule["expr"] for rule in RULES]
    asked += [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    asked += [each["query"]["query"] for each in BOARD["templating"]["list"] if each["type"] == "query"]
    assert {name for text in asked for name in re.findall(r"lewis_\w+", text)} <= METRICS


def test_grafana_can_show_the_dashboard() -> None:
    """What its schema asks of a dashboard, a panel, a target and a variable; and panels that cover no other."""
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time", "annotations"} <= BOARD.keys()
    assert len(BOARD["uid"]) <= 40 and BOARD["schemaVersion"] >= 36 and "id" not in BOARD
    ids, taken = [panel["id"] for panel in BOARD["panels"]], set[tuple[int, int]]()
    assert len(ids) == len(set(ids))
    variables = {each["name"] for each in BOARD["templating"]["list"]}
    for panel in BOARD["panels"]:
        assert {"title", "type", "gridPos", "datasource", "fieldConfig", "options", "targets"} <= panel.keys()
        assert panel["type"] in {"stat", "bargauge", "table", "timeseries"}
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert cells and not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(refs) == len(set(refs))
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables


@pytest.mark.parametrize("unit", sorted((DEPLOYMENTS / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("there is no systemd-analyze")
    text = unit.read_text()
    programs = re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)
    assert programs in (["/opt/lewis/bin/lewis"], ["/opt/lewis/bin/python"])  # as README.md installs it
    (tmp_path / unit.name).write_text(text.replace(programs[0], "/bin/true"))  # it must be there
    done = subprocess.run([analyze, "verify", tmp_path / unit.name], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")

"""The dashboard: provisioned, about metrics that there are, about all of them, and of what Grafana brings."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.configuration import DEPLOY, compose, program
from tests.deploy.metrics import SUFFIXES, families, known_metrics
from tests.deploy.promql import ADDED, labels_of, metrics_of

FOLDER = DEPLOY / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboards/marketflow.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
BUILT_IN = {"stat", "timeseries", "state-timeline"}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def expressions() -> list[str]:
    """All of them, Grafana's variables given a value."""
    found = [target["expr"] for panel in PANELS for target in panel["targets"]]
    found += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    return [each.replace("$__rate_interval", "1m").replace("$exchange", ".*") for each in found]


def test_rows_and_panels_use_built_in_types() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Feeds", "Pipeline", "Stores", "HTTP", "Process"]
    assert {panel["type"] for panel in PANELS} <= BUILT_IN
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*identifiers}) == len(identifiers)
    for panel in PANELS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_promtool_parses_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("expression", expressions())
def test_expressions_use_existing_metrics_and_labels(expression: str) -> None:
    known = known_metrics() | {"up": set(), "ALERTS": {"alertname", "alertstate"}}
    asked = metrics_of(expression)
    assert asked
    for name, labels in asked.items():
        assert name in known, name
        assert labels <= known[name] | ADDED, name
        assert "job" in labels or name == "ALERTS", "another application's series would be among ours"
    assert labels_of(expression) <= set().union(*(known[name] for name in asked)) | ADDED


def test_dashboard_shows_every_metric() -> None:
    asked = {name for expression in expressions() for name in metrics_of(expression)}
    shown = asked | {name.removesuffix(suffix) for name in asked for suffix in SUFFIXES if name.endswith(suffix)}
    assert {*families()} <= shown


def test_dashboard_is_provisioned_where_compose_mounts_it() -> None:
    grafana = compose()["services"]["grafana"]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/marketflow.yaml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{mounts['./grafana/dashboards']}/marketflow.json"
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "$PROMETHEUS_URL"
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"

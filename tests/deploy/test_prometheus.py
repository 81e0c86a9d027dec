"""Scrape configuration and alerts: sound, each firing when it should and only then, about metrics that there are."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.configuration import DEPLOY, compose, documents, program
from tests.deploy.metrics import known_metrics
from tests.deploy.promql import ADDED, labels_of, metrics_of

FOLDER = DEPLOY / "prometheus"
RULES = [rule for group in documents(FOLDER / "alerts.yml")[0]["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in RULES]

SCRAPES = 240
"""Of an hour, every 15 s."""

Series = dict[str, str]
"""Values by series, as promtool writes both."""


def growing(each: float, start: float = 0) -> str:
    """Adds up so much a scrape."""
    return f"{start}+{each}x{SCRAPES}"


def steady(value: float) -> str:
    return f"{value}x{SCRAPES}"


def after(minutes: int, then: str) -> str:
    """Nothing for some minutes, then something else."""
    return f"0x{minutes * 4 - 1} {then}"


_MINUTES = " ".join(["15 0 0 0"] * (SCRAPES // 4))

HEALTHY: Series = {
    "up": steady(1),
    "process_start_time_seconds": steady(7),
    "marketflow_feeds_up": steady(1),
    'marketflow_shard_owned{shard="exchange1"}': steady(1),
    'marketflow_shard_owned{shard="exchange2/1of2"}': steady(1),
    'marketflow_shard_standby{shard="exchange1"}': steady(1),
    'marketflow_shard_standby{shard="exchange2/1of2"}': steady(1),
    "marketflow_shard_takeovers_total": steady(9),
    'marketflow_mode{mode="live"}': steady(1),
    'marketflow_mode{mode="test"}': steady(0),
    'marketflow_store_up{store="redis"}': steady(1),
    'marketflow_store_up{store="postgres"}': steady(1),
    "marketflow_ticks_too_late_total": steady(3),
    "marketflow_cache_errors_total": steady(4),
    "marketflow_archive_errors_total": steady(5),
    "marketflow_aggregates_refused_total": steady(6),
    "marketflow_aggregates_dropped_total": steady(7),
    "marketflow_given_up_total": steady(0),
    'marketflow_branch_stalls_total{branch="archive"}': steady(0),
    "marketflow_aggregates_pending": _MINUTES,
    "marketflow_alert_deliveries_pending": _MINUTES,
    'marketflow_alert_deliveries_total{result="given_up"}': steady(2),
    "marketflow_alert_events_dropped_total": steady(3),
    'marketflow_tick_to_cache_seconds_bucket{le="0.1"}': growing(1470),
    'marketflow_tick_to_cache_seconds_bucket{le="0.25"}': growing(1490),
    'marketflow_tick_to_cache_seconds_bucket{le="+Inf"}': growing(1500),
    'marketflow_http_request_seconds_count{route="/prices",method="GET",status="200"}': growing(1500),
    'marketflow_http_request_seconds_count{route="/prices",method="GET",status="503"}': growing(10),
    'marketflow_http_request_seconds_count{route="/readyz",method="GET",status="503"}': growing(90),
    'marketflow_http_request_seconds_bucket{route="/prices",le="0.1"}': growing(1490),
    'marketflow_http_request_seconds_bucket{route="/prices",le="0.5"}': growing(1500),
    'marketflow_http_request_seconds_bucket{route="/prices",le="+Inf"}': growing(1510),
} | {
    series: values
    for exchange in ("exchange1", "exchange2")
    for series, values in {
        f'marketflow_feed_connected{{exchange="{exchange}"}}': steady(1),
        f'marketflow_feed_reconnects_total{{exchange="{exchange}"}}': steady(8),
        f'marketflow_holes{{exchange="{exchange}",state="open"}}': "0x9 3x3 0x9 2x5 0x400",
        f'marketflow_holes{{exchange="{exchange}",state="filled"}}': steady(5),
        f'marketflow_feed_trade_delay_seconds_bucket{{exchange="{exchange}",le="1.0"}}': growing(140),
        f'marketflow_feed_trade_delay_seconds_bucket{{exchange="{exchange}",le="5.0"}}': growing(149),
        f'marketflow_feed_trade_delay_seconds_bucket{{exchange="{exchange}",le="+Inf"}}': growing(150),
        f'marketflow_feed_last_tick_timestamp_seconds{{exchange="{exchange}"}}': growing(15),
        f'marketflow_ticks_total{{exchange="{exchange}"}}': growing(1500),
        f'marketflow_ticks_rejected_total{{exchange="{exchange}",reason="malformed"}}': growing(10),
        f'marketflow_timestamps_replaced_total{{exchange="{exchange}"}}': growing(100),
    }.items()
}
"""What MarketFlow shows when all is well: a few old faults, rows that wait for some seconds in each minute."""

BEGIN = 20
"""The minute at which what is wrong begins."""

SILENT = {
    f'marketflow_feed_last_tick_timestamp_seconds{{exchange="{exchange}"}}': f"0+15x{BEGIN * 4} {BEGIN * 60}x200"
    for exchange in ("exchange1", "exchange2")
}
STOPPED = {
    f'marketflow_ticks_total{{exchange="{exchange}"}}': f"0+1500x{BEGIN * 4} {BEGIN * 6000}x200"
    for exchange in ("exchange1", "exchange2")
}


def broken(series: str, then: str, before: str = "1") -> Series:
    return {series: f"{before}x{BEGIN * 4 - 1} {then}"}


CASES: dict[str, tuple[Series, float, float, set[str]]] = {
    # By alert: what is wrong from minute BEGIN on, how long it is quiet, when it has fired, and what else fires then.
    "MarketFlowScrapeDown": (broken("up", "0x200"), 0.75, 1.5, set()),
    "MarketFlowNobodyTakesTicks": (
        broken("marketflow_feeds_up", "0x200")
        | broken('marketflow_feed_connected{exchange="exchange1"}', "0x200")
        | broken('marketflow_feed_connected{exchange="exchange2"}', "0x200"),
        0.25,
        1,
        set(),
    ),
    "MarketFlowShardUnowned": (
        broken('marketflow_shard_owned{shard="exchange2/1of2"}', "0x200")
        | broken('marketflow_shard_standby{shard="exchange2/1of2"}', "0x200"),
        0.25,
        1,
        set(),
    ),
    "MarketFlowShardWithoutStandby": (
        broken('marketflow_shard_standby{shard="exchange1"}', "0x200"),
        4.75,
        5.5,
        set(),
    ),
    "MarketFlowShardTakeovers": (
        broken("marketflow_shard_takeovers_total", "11x2 12x2 14x200", "9"),
        1,
        2,
        set(),
    ),
    "MarketFlowRestarts": (broken("process_start_time_seconds", "20+20x2 60x200", "7"), 0.25, 1, set()),
    "MarketFlowNoTicks": (SILENT | STOPPED, 1, 5, {"MarketFlowFeedSilent"}),
    "MarketFlowFeedDown": (broken('marketflow_feed_connected{exchange="exchange2"}', "0x200"), 1.75, 2.5, set()),
    "MarketFlowFeedSilent": (
        {series: values for series, values in SILENT.items() if "exchange2" in series},
        1,
        3,
        set(),
    ),
    "MarketFlowFeedUnsteady": (
        broken('marketflow_feed_reconnects_total{exchange="exchange1"}', "9+1x200", "8"),
        4,
        9,
        set(),
    ),
    "MarketFlowTradesDelayed": (
        {
            'marketflow_feed_trade_delay_seconds_bucket{exchange="exchange2",le="1.0"}': growing(10),
            'marketflow_feed_trade_delay_seconds_bucket{exchange="exchange2",le="5.0"}': growing(140),
        },
        4 - BEGIN,
        6 - BEGIN,
        set(),
    ),
    "MarketFlowHolesOpen": (
        broken('marketflow_holes{exchange="exchange2",state="open"}', "1x200", "0"),
        14,
        16,
        set(),
    ),
    "MarketFlowRejects": (
        {'marketflow_ticks_rejected_total{exchange="exchange1",reason="bad_price"}': after(BEGIN, growing(30))},
        4,
        9,
        set(),
    ),
    "MarketFlowTimestampsReplaced": (
        broken('marketflow_timestamps_replaced_total{exchange="exchange1"}', growing(1500), "0"),
        9,
        16,
        set(),
    ),
    "MarketFlowTicksTooLate": (broken("marketflow_ticks_too_late_total", growing(1, 4), "3"), -0.25, 1, set()),
    "MarketFlowTestMode": (
        broken('marketflow_mode{mode="test"}', "1x200", "0") | broken('marketflow_mode{mode="live"}', "0x200"),
        14,
        16,
        set(),
    ),
    "MarketFlowStoreDown": (broken('marketflow_store_up{store="postgres"}', "0x200"), 0.75, 1.5, set()),
    "MarketFlowRowsWait": (broken("marketflow_aggregates_pending", "15x200", "0"), 2.75, 3.5, set()),
    "MarketFlowRowsPileUp": (
        broken("marketflow_aggregates_pending", "15+4x200", "0"),
        15,
        21,
        {"MarketFlowRowsWait"},
    ),
    "MarketFlowRowsLost": (broken("marketflow_aggregates_refused_total", growing(1, 7), "6"), -0.25, 1, set()),
    "MarketFlowArchiveErrors": (broken("marketflow_archive_errors_total", growing(1, 6), "5"), 1.5, 3, set()),
    "MarketFlowCacheErrors": (broken("marketflow_cache_errors_total", growing(1, 5), "4"), 1.5, 3, set()),
    "MarketFlowLate": (
        {
            'marketflow_tick_to_cache_seconds_bucket{le="0.25"}': growing(1470),
            'marketflow_tick_to_cache_seconds_bucket{le="1.0"}': growing(1500),
        },
        4 - BEGIN,
        6 - BEGIN,
        set(),
    ),
    "MarketFlowBug": (broken("marketflow_given_up_total", "1x200", "0"), -1, 1, set()),
    "MarketFlowBranchStalled": (
        broken('marketflow_branch_stalls_total{branch="archive"}', "1x200", "0"),
        -1,
        1,
        set(),
    ),
    "MarketFlowWebhooksFail": (broken("marketflow_alert_deliveries_pending", "4x200", "0"), 14, 16, set()),
    "MarketFlowAlertsLost": (broken("marketflow_alert_events_dropped_total", growing(1, 4), "3"), -0.25, 1, set()),
    "MarketFlowHttpErrors": (
        {'marketflow_http_request_seconds_count{route="/prices",method="GET",status="500"}': after(BEGIN, growing(30))},
        4,
        9,
        set(),
    ),
    "MarketFlowHttpSlow": (
        {
            'marketflow_http_request_seconds_bucket{route="/prices",le="0.5"}': growing(1490),
            'marketflow_http_request_seconds_bucket{route="/prices",le="1.0"}': growing(1510),
        },
        4 - BEGIN,
        6 - BEGIN,
        set(),
    ),
}


def unit_test(series: Series, instances: int, firing: Mapping[float, set[str]]) -> dict[str, Any]:
    """One of promtool's: which alerts fire at which minutes, with so many API processes that show the same."""
    places = [f'job="marketflow",instance="api{number}:8080"' for number in range(instances)]
    return {
        "interval": "15s",
        "input_series": [
            {"series": _at(name, place), "values": values} for place in places for name, values in series.items()
        ],
        "promql_expr_test": [
            {
                "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{round(minute * 60)}s",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)],
            }
            for minute, names in firing.items()
        ],
    }


def _at(series: str, place: str) -> str:
    name, _, labels = series.partition("{")
    return f"{name}{{{place},{labels}" if labels else f"{name}{{{place}}}"


def check(folder: Path, *tests: dict[str, Any]) -> None:
    path = folder / "alerts_test.yml"
    content = {"rule_files": [str(FOLDER / "alerts.yml")], "evaluation_interval": "15s", "tests": list(tests)}
    path.write_text(json.dumps(content))
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["config", "rules"])
def test_promtool_accepts_rules_and_configuration(kind: str) -> None:
    path = FOLDER / ("prometheus.yml" if kind == "config" else "alerts.yml")
    command = [program("promtool"), "check", kind, "--lint-fatal", *(["--lint=all"] if kind == "rules" else []), path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("instances", [1, 2])
def test_no_alert_fires_in_a_healthy_system(instances: int, tmp_path: Path) -> None:
    check(tmp_path, unit_test(HEALTHY, instances, {minute: set() for minute in (1, 5, 20, 40, 59)}))


@pytest.mark.parametrize("alert", NAMES)
def test_each_alert_fires_on_its_cause_alone(alert: str, tmp_path: Path) -> None:
    changed, quiet, fires, others = CASES[alert]
    firing: dict[float, set[str]] = {BEGIN + quiet: set(), BEGIN + fires: {alert, *others}}
    if alert == "MarketFlowRowsPileUp":
        firing[BEGIN + quiet] = others
    check(tmp_path, *(unit_test({**HEALTHY, **changed}, instances, firing) for instances in (1, 2)))


def test_missing_target_fires_an_alert(tmp_path: Path) -> None:
    check(tmp_path, unit_test({}, 1, {0.5: set(), 1.5: {"MarketFlowScrapeDown"}}))


def test_redis_outage_fires_its_own_alert_alone(tmp_path: Path) -> None:
    """An API of its own hears of the feeds by Redis, and shows none of their counters meanwhile."""
    gone = broken("marketflow_feeds_up", "0x200") | broken('marketflow_store_up{store="redis"}', "0x200")
    check(tmp_path, unit_test({**HEALTHY, **gone}, 2, {BEGIN + 5: {"MarketFlowStoreDown"}}))


def test_every_alert_has_a_case_and_a_runbook_section() -> None:
    assert sorted(NAMES) == sorted(CASES)
    text = (DEPLOY / "README.md").read_text()
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["description"]) > 40
        assert rule["annotations"]["runbook"] == f"deploy/README.md#{rule['alert'].lower()}"
        assert f"\n#### {rule['alert']}\n" in text


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_alerts_use_existing_metrics_and_labels(rule: dict[str, Any]) -> None:
    known = known_metrics() | {"up": set()}
    asked = metrics_of(rule["expr"])
    assert asked
    for name, labels in asked.items():
        assert name in known, name
        assert labels <= known[name] | ADDED, name
    assert labels_of(rule["expr"]) <= set().union(*(known[name] for name in asked)) | ADDED


def test_scrape_target_is_the_service_of_compose() -> None:
    jobs = {job["job_name"]: job for job in documents(FOLDER / "prometheus.yml")[0]["scrape_configs"]}
    (target,) = jobs["marketflow"]["static_configs"][0]["targets"]
    name, port = target.split(":")
    app = compose()["services"][name]
    assert app["ports"][0].endswith(f":{port}")
    assert name in app["environment"]["MARKETFLOW_HTTP__ALLOWED_HOSTS"].split(",")
    assert "metrics_path" not in jobs["marketflow"]  # /metrics by default
    assert yaml.safe_load((FOLDER / "prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]

"""Schemathesis against a running application and its OpenAPI document; `-s` shows its report."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marketflow.api.app import operations
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import Content, Operation
from tests.support.application import ROOT, Application, ScriptedExchange, Traffic, exchanges_setting
from tests.support.servers import HOST, wait_until

CONFIGURATION = Path(__file__).parent / "schemathesis.toml"


SECONDS = 250
"""How long schemathesis may take: 50 s of CPU, on a machine that runs other tests as well."""


@pytest.mark.timeout(SECONDS + 50)
@pytest.mark.parametrize("token", ["sesame-sesame-sesame", ""])
def test_schemathesis_finds_no_undescribed_response(
    server_folder: Path,
    servers: dict[str, object],
    exchanges: list[ScriptedExchange],
    token: str,
    record_property: Callable[[str, object], None],
) -> None:
    # Schemathesis switches modes, so both need prices.
    proxies = {"HTTP__TRUSTED_PROXIES": HOST}  # schemathesis sends for one client after another
    given = servers | proxies | {"HTTP__TOKEN": token, "EXCHANGES": exchanges_setting(*exchanges), "MODE": "live"}
    with Application(server_folder, given) as application, Traffic(exchanges, rate=20, coming_and_going=True):
        wait_until(lambda: application.find("/prices/average/ETHUSDT"))
        switched = application.http.post("/mode/test", headers={"Authorization": f"Bearer {token or 'none'}"})
        assert switched.status_code == 200
        wait_until(lambda: application.find("/prices/average/ETHUSDT"))

        report = run_schemathesis(application, token, made_rules(application, token))
        print(report)
        record_property("schemathesis", report[report.index("SUMMARY") :])
        assert application.stop()[0] == 0
    assert "Traceback" not in application.log
    assert " ERROR " not in application.log


RULES = 300
"""Alert rules for schemathesis to read, replace and delete: more than it will delete."""


def made_rules(application: Application, token: str) -> list[str]:
    """Make alert rules, and return their ids."""
    headers = {"Authorization": f"Bearer {token or 'none'}"}
    made = [application.http.post("/alerts", headers=headers, json={"kind": "stale"}) for _ in range(RULES)]
    return [each.json()["id"] for each in made]


def operations_to_test(token: str) -> list[str]:
    """Return the ids of the operations to test: without a token only those that require one where it is set.

    The others answer the same with and without; testing them twice would take three quarters of the CPU.
    """
    return [each.id for each in operations(RequestMetrics()) if not is_stream(each) and (token or each.asks_for_token)]


def is_stream(operation: Operation) -> bool:
    """Whether an operation answers without an end; the configuration excludes these."""
    return isinstance(operation.answer, Content) and "text/event-stream" in operation.answer.media_types


def run_schemathesis(application: Application, token: str, rules: list[str]) -> str:
    """Return the report of schemathesis, which found no failure and tested all `operations_to_test`."""
    # From a file: schemathesis leaves out the path from which it reads the document.
    description = application.folder / "openapi.json"
    description.write_bytes(application.http.get("/openapi.json").content)
    tested = operations_to_test(token)
    arguments = ["run", str(description), "--url", str(application.http.base_url)]
    arguments += [f"--include-operation-id={each}" for each in tested]
    run = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIGURATION), *arguments],
        env=os.environ | {"TOKEN": token or "none", "PYTHONPATH": str(ROOT), "ALERT_RULES": " ".join(rules)},
        cwd=application.folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    report: str = run.stdout
    assert run.returncode == 0, report + run.stderr
    assert f"Tested: {len(tested)}\n" in report
    return report

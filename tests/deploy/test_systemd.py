"""The units: accepted by systemd's own checks, closed as tightly as each other, and about the application as it is."""

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from marketflow.cli import exit_codes
from marketflow.cli.main import parse
from marketflow.errors import SettingsError
from tests.deploy.configuration import DEPLOY, env_file, load_with, program

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
ENVIRONMENT = DEPLOY / "systemd/marketflow.env.example"
MOST_EXPOSED = 1.5
"""Of 10, by `systemd-analyze security`: what is left is that it talks to the network."""


def service(unit: Path) -> dict[str, list[str]]:
    """The settings of [Service], each with all its values."""
    found: dict[str, list[str]] = {}
    section = unit.read_text().split("[Service]\n")[1].split("\n[Install]")[0]
    for line in section.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_units_exist_for_both_roles_and_for_each() -> None:
    assert [unit.name for unit in UNITS] == [
        "marketflow-api.service",
        "marketflow-ingest@.service",
        "marketflow.service",
    ]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_analyze_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    here = tmp_path / unit.name.replace("@", "@1")  # an instance, with a program that is there
    here.write_text(unit.read_text().replace("/opt/marketflow/bin/marketflow", sys.executable))
    done = subprocess.run([analyze, "verify", str(here)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if here.name in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_security_exposure_is_low(unit: Path, tmp_path: Path) -> None:
    here = tmp_path / unit.name.replace("@", "@1")
    here.write_text(unit.read_text())
    command = [program("systemd-analyze"), "security", "--offline=true", "--no-pager", str(here)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert match, done.stderr
    assert float(match[1]) <= MOST_EXPOSED


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_files_are_parsable(unit: Path) -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.read_string(unit.read_text())
    assert parser.sections() == ["Unit", "Service", "Install"]


def test_all_units_have_the_same_hardening() -> None:
    of_each = [unit.read_text().split("# Hardening")[1] for unit in UNITS]
    assert of_each[0] == of_each[1] == of_each[2]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_starts_and_stops_like_the_application(unit: Path) -> None:
    found = service(unit)
    assert (found["Type"], found["NotifyAccess"], found["KillMode"]) == (["notify"], ["main"], ["mixed"])
    assert int(found["TimeoutStopSec"][0]) > 5
    assert found["RestartPreventExitStatus"] == [str(exit_codes.USAGE)]
    assert found["ExecReload"] == ["kill -HUP $MAINPID"]
    command, *arguments = shlex.split(found["ExecStart"][0])
    assert command == "/opt/marketflow/bin/marketflow"
    assert arguments[:2] == ["--config", "/etc/marketflow/settings.toml"]
    assert parse(arguments).info_name == "marketflow"  # flags of the application itself, all of them right


def test_example_variables_are_settings(monkeypatch: pytest.MonkeyPatch, nothing_set: None) -> None:
    variables = env_file(ENVIRONMENT)
    with pytest.raises(SettingsError, match=r"http\.token = \*\*\*: must be .*, and must not contain change-me"):
        load_with(monkeypatch, variables, DEPLOY.parent / "settings.toml")
    variables["MARKETFLOW_HTTP__TOKEN"] = "open-sesame-open-sesame"
    found = load_with(monkeypatch, variables, DEPLOY.parent / "settings.toml")
    assert found.http.token == "open-sesame-open-sesame"
    assert (found.redis.password, found.postgres.password) == ("change-me",) * 2
    folder = dict(pair.split("=", 1) for pair in service(DEPLOY / "systemd/marketflow.service")["Environment"])
    assert folder == {"MARKETFLOW_DATA_DIR": "%S/marketflow"}
    assert service(DEPLOY / "systemd/marketflow.service")["StateDirectory"] == ["marketflow"]

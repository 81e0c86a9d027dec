"""What the files of deploy/ say, read as those read them who they are for."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from marketflow import settings
from marketflow.settings import Settings
from tests.support.application import ROOT

DEPLOY = ROOT / "deploy"


def program(name: str) -> str:
    """Where a program is that these files are for; a test that needs it is skipped where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH")
    return path


def env_file(path: Path) -> dict[str, str]:
    """Variables of a file with NAME=value lines."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def compose() -> dict[str, Any]:
    """The compose file as it is with the example of .env."""
    variables = env_file(DEPLOY / "compose.env.example")

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1]) or ("" if match[2] == ":?" else match[3] or "")

    text = (DEPLOY / "compose.yaml").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\$|\$\{(\w+)(:[?-])?([^}]*)\}", value, text))
    return found


def documents(*paths: Path) -> list[dict[str, Any]]:
    """All documents of YAML files."""
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def load_with(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """The settings of an application that has such variables and such a file. To be used with `nothing_set`."""
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    return settings.load(config)


def shell_blocks(heading: str, language: str = "sh") -> list[str]:
    """The blocks of commands in a section of deploy/README.md."""
    text = (DEPLOY / "README.md").read_text()
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section is not None, heading
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], re.M | re.S)

"""What the image is made of: locked by hashes, in the versions that are tested, and listed by a command."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.configuration import DEPLOY, compose
from tests.support.application import ROOT

LOCKS = [DEPLOY / "requirements.txt", DEPLOY / "build-requirements.txt"]


def locked(path: Path) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of every package of a lock."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    found: dict[str, tuple[str, int]] = {}
    for entry in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split()
        name, _, version = requirement.partition("==")
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), entry
        found[canonicalize_name(name)] = (version, len(hashes))
    return found


def constraints() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_hashes_and_no_url(path: Path) -> None:
    assert "://" not in path.read_text()
    assert locked(path)
    assert all(hashes for _, hashes in locked(path).values())


def test_locked_versions_equal_the_tested_versions() -> None:
    pinned = constraints()
    for name, (version, _) in locked(DEPLOY / "requirements.txt").items():
        assert pinned.get(name) == version, name


@pytest.mark.parametrize(("path", "section"), list(zip(LOCKS, ["project", "build-system"], strict=True)))
def test_lock_has_every_declared_dependency(path: Path, section: str) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = declared["build-system"]["requires"] if section == "build-system" else declared["project"]["dependencies"]
    versions = locked(path)
    for requirement in map(Requirement, wanted):
        version, _ = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_images_are_of_maintained_series() -> None:
    """The oldest versions without the faults that were known when this was written."""
    oldest = {"postgres": (17, 10), "redis": (8, 6, 3), "grafana/grafana": (13, 1), "prom/prometheus": (3, 13)}
    images = {service["image"].partition("@")[0] for service in compose()["services"].values()}
    versions = dict(image.split(":") for image in images if not image.startswith("marketflow:"))
    assert versions.keys() == oldest.keys()
    for name, tag in versions.items():
        numbers = tuple(int(each) for each in re.findall(r"\d+", tag.partition("-")[0]))
        assert numbers >= oldest[name], name

"""The Dockerfile as text; tests/deploy/test_image.py builds it."""

import json
import subprocess

from marketflow import __version__
from tests.deploy.configuration import program
from tests.deploy.image import instructions
from tests.deploy.test_image import DOCKERFILE


def test_hadolint_accepts_the_dockerfile() -> None:
    done = subprocess.run([program("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfile_sets_user_port_signal_and_health_check() -> None:
    found = instructions(DOCKERFILE)
    words = [instruction.word for instruction in found]
    last = {instruction.word: instruction for instruction in found}
    assert words.count("FROM") == 2
    assert last["STOPSIGNAL"].text == "SIGTERM"
    assert last["EXPOSE"].text == "8080"
    assert last["USER"].text == "10001:10001"
    assert json.loads(last["ENTRYPOINT"].text) == ["/opt/marketflow/bin/marketflow"]
    versions = [each.text for each in found if each.word == "ARG" and each.text.startswith("VERSION=")]
    assert versions == [f"VERSION={__version__}"]
    assert f"--tag marketflow:{__version__} " in DOCKERFILE.read_text()

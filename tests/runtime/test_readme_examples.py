"""The README's requests and Python client, as a user would paste them, against a running application."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.application import ROOT, Application
from tests.support.servers import HOST, wait_until

README = (ROOT / "README.md").read_text()
REQUESTS = re.findall(r"^\$ curl (.*)\n(\{.*\})$", README, flags=re.M)


@pytest.fixture
def application(server_folder: Path, servers: dict[str, object]) -> Iterator[Application]:
    with Application(server_folder, servers) as application:
        wait_until(lambda: application.find("/candles/BTCUSDT?limit=1"), timeout=20)
        yield application


def shape(answer: object) -> object:
    """Return an answer with types in the place of values."""
    if isinstance(answer, dict):
        return {key: shape(value) for key, value in answer.items()}
    if isinstance(answer, list):
        return [shape(value) for value in answer]
    return float if isinstance(answer, int | float) and not isinstance(answer, bool) else type(answer)


def test_requests_of_the_readme_get_the_answers_shown(application: Application) -> None:
    assert len(REQUESTS) == 5
    for request, shown in REQUESTS:
        (url,) = shlex.split(request)
        path = url.removeprefix("localhost:8080")
        answer = wait_until(partial(application.find, path), timeout=10, message=path)
        assert shape(answer) == shape(json.loads(shown)), path
        assert answer.get("symbol") == json.loads(shown).get("symbol"), path


def test_python_client_of_the_readme_prints_prices(application: Application) -> None:
    (client,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    (base,) = re.findall(r"http://[\d.:]+", client)
    assert urlsplit(base).port == 8080
    code = client.replace(base, f"http://{HOST}:{application.port}")
    with subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().split() for _ in range(30)]
        finally:
            process.kill()
    candles = [line for line in lines if line[0].endswith("+00:00")]
    assert 1 <= len(candles) <= 5
    ticks = lines[len(candles) :]
    assert {exchange for exchange, _ in ticks} == {"exchange1", "exchange2", "exchange3"}
    assert all(float(price) > 0 for _, price in lines)

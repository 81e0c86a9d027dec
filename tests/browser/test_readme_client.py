"""The README's JavaScript client, run in a page of the application."""

import re

from tests.browser.conftest import Look, Start
from tests.browser.drawing import until
from tests.support.application import ROOT


def test_javascript_client_of_the_readme_prints_prices(start: Start, look: Look) -> None:
    application = start(MODE="test")
    visit = look(application.port)
    page = visit.open()
    (client,) = re.findall(r"^```js\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(client.strip().splitlines()) <= 10
    (base,) = re.findall(r"http://[\d.:]+", client)
    printed: list[str] = []
    page.on("console", lambda message: printed.append(message.text))
    page.evaluate(f"async () => {{ {client.replace(base, visit.origin)} }}")
    exchanges = ("exchange1", "exchange2", "exchange3")
    until(page, lambda: all(any(line.startswith(name) for line in printed) for name in exchanges))
    assert any(re.match(r"\d{4}-\d\d-\d\dT\S+Z [\d.]+$", line) for line in printed)

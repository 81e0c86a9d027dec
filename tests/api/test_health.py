"""/health, and the probes /livez and /readyz."""

import pytest

from tests.api.world import World


def test_health_reports_mode_stores_and_feeds() -> None:
    assert World().ask("/health").json() == {
        "status": "ok",
        "mode": "test",
        "uptime_seconds": 12.5,
        "postgres": "ok",
        "redis": "ok",
        "exchanges": {"exchange1": "generated"},
    }


@pytest.mark.parametrize("path", ["/health", "/livez"])
def test_health_and_livez_are_200_during_outage(path: str) -> None:
    world = World(ready=False)
    world.cache.away = world.archive.away = True
    assert world.ask(path).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_of_healthy_process_are_ok(path: str) -> None:
    response = World().ask(path)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_readyz_is_503_while_not_ready() -> None:
    response = World(ready=False).ask("/readyz")
    assert (response.status_code, response.json()["code"], response.headers["retry-after"]) == (503, "unavailable", "1")

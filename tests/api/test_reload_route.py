"""/reload: the token it asks for, and what it answers."""

from marketflow.errors import SettingsError, Unavailable
from tests.api.world import EXCHANGES, NOTHING, SYMBOLS, World

TOKEN = "a-token-of-this-test"


def test_reload_answers_what_has_changed() -> None:
    nothing: dict[str, list[str]] = {"exchanges": [], "symbols": [], "alerts": []}
    response = World().ask("/reload", "POST")
    assert (response.status_code, response.json()) == (
        200,
        {
            "added": nothing,
            "removed": nothing,
            "changed": nothing,
            "unchanged": {"exchanges": [*EXCHANGES], "symbols": [*SYMBOLS], "alerts": []},
            "needs_restart": [],
        },
    )
    assert NOTHING.exchanges == ()


def test_reload_asks_for_the_configured_token() -> None:
    world = World(token=TOKEN)
    assert world.ask("/reload", "POST").json()["code"] == "unauthorized"
    assert world.ask("/reload", "POST", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert world.ask("/reload").status_code == 405


def test_invalid_settings_and_no_ingest_are_problems() -> None:
    world = World(reloaded=SettingsError("http.port = 99999: must be a whole number\nsymbols = 7: must be a list"))
    problem = world.ask("/reload", "POST").json()
    assert (problem["status"], problem["code"]) == (400, "invalid_settings")
    assert problem["detail"] == "http.port = 99999: must be a whole number; symbols = 7: must be a list"
    world.reloaded = Unavailable("no ingest process is running")
    response = world.ask("/reload", "POST")
    assert (response.status_code, response.json()["code"], response.headers["retry-after"]) == (503, "unavailable", "1")

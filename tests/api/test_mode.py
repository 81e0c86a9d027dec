"""/mode, and switching it with and without a token."""

import pytest

from marketflow.errors import Unavailable
from marketflow.health import ModeUnconfirmed
from marketflow.model import Mode
from tests.api.world import MemoryMode, World

TOKEN = "s\u00e9same \u20ac\u00e0"  # its UTF-8 ends with a byte that is a space in latin-1


def test_mode_is_current_mode() -> None:
    world = World()
    assert world.ask("/mode").json() == {"mode": "test"}
    world.mode.current = Mode.LIVE
    assert world.ask("/mode").json() == {"mode": "live"}


def test_mode_switch_returns_previous_mode() -> None:
    world = World()
    assert world.ask("/mode/live", "POST").json() == {"mode": "live", "previous": "test"}
    assert world.ask("/mode").json() == {"mode": "live"}
    assert world.ask("/mode/test", "POST").json() == {"mode": "test", "previous": "live"}


def test_switch_to_current_mode_changes_nothing() -> None:
    world = World()
    response = world.ask("/mode/test", "POST")
    assert (response.status_code, response.json()) == (200, {"mode": "test", "previous": "test"})


@pytest.mark.parametrize("path", ["/mode/else", "/mode/TEST", "/mode/", "/mode/test/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_modes_are_404(path: str, method: str) -> None:
    response = World().ask(path, method)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_mode_switch_without_ingest_process_is_503() -> None:
    class Unreachable(MemoryMode):
        async def switch(self, mode: Mode) -> Mode:
            raise Unavailable("the feeds cannot be reached")

    response = World(mode=Unreachable()).ask("/mode/live", "POST")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["code"] == "unavailable"


def test_unconfirmed_switch_is_503_and_names_the_shards() -> None:
    class Partial(MemoryMode):
        async def switch(self, mode: Mode) -> Mode:
            raise ModeUnconfirmed(["exchange1", "exchange2/1of4"])

    response = World(mode=Partial()).ask("/mode/live", "POST")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    problem = response.json()
    assert problem["code"] == "unavailable"
    assert problem["detail"] == (
        "The mode is set to live, but not yet adopted by the owners of exchange1, exchange2/1of4."
    )


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("token", ["plain", TOKEN])
def test_configured_token_allows_mode_switch(token: str, scheme: str) -> None:
    world = World(token=token)
    response = world.ask("/mode/live", "POST", {"Authorization": f"{scheme} {token}".encode()})
    assert response.status_code == 200


@pytest.mark.parametrize("token", ["plain", TOKEN])
@pytest.mark.parametrize(
    "given",
    [None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"plain", b"Basic plain", b"Bearerplain", b"Bearer \xff\xe9"],
)
def test_missing_or_wrong_token_is_401(token: str, given: bytes | None) -> None:
    world = World(token=token)
    response = world.ask("/mode/live", "POST", {} if given is None else {"Authorization": given})
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert world.mode.current is Mode.TEST
    assert token not in response.text


def test_reading_mode_needs_no_token() -> None:
    assert World(token="plain").ask("/mode").status_code == 200


def test_repr_of_context_hides_token() -> None:
    assert "plain" not in repr(World(token="plain").context())

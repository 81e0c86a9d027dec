"""Candles of a symbol for the screen, asked for now and then: the stream has prices only."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

import httpx
import msgspec

from marketflow.cli.watch.view import CandleChoice

PAUSE_SECONDS = 2.0
ANSWER_SECONDS = 5.0

MOST_CANDLES = 200
"""Candles in one answer: more than lines on any terminal."""


class ShownCandle(msgspec.Struct):
    """A candle as the API answers it."""

    time: str
    open: float
    high: float
    low: float
    close: float
    volume: float | None = None


class _Candles(msgspec.Struct):
    candles: list[ShownCandle]


class _Problem(msgspec.Struct):
    detail: str = ""


@dataclass
class CandlePanel:
    """The candles of the last choice, newest first, or why there are none; empty until the first answer."""

    choice: CandleChoice | None = None
    candles: list[ShownCandle] = field(default_factory=list)
    problem: str = ""


async def keep_candles(
    panel: CandlePanel, url: str, chosen: Callable[[], CandleChoice | None], changed: asyncio.Event
) -> None:
    """Keep the candles up to date until cancelled, asking at once when the choice has changed.

    Args:
        panel: where candles are put.
        url: URL of the application.
        chosen: returns the choice; None for no candles.
        changed: is set when the choice may have changed.
    """
    # As the stream: proxies of the environment are ignored.
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False) as client:
        while True:
            changed.clear()
            if (choice := chosen()) is not None:
                await _put(panel, client, url, choice)
            try:
                await asyncio.wait_for(changed.wait(), PAUSE_SECONDS)
            except TimeoutError:
                continue


async def _put(panel: CandlePanel, client: httpx.AsyncClient, url: str, choice: CandleChoice) -> None:
    if panel.choice != choice:
        panel.choice, panel.candles, panel.problem = choice, [], ""
    path = "/".join(quote(part, safe="") for part in (choice.exchange, choice.symbol))
    query: dict[str, str | int] = {"interval": choice.interval, "limit": MOST_CANDLES}
    try:
        response = await client.get(f"{url}/candles/{path}", params=query)
        if response.status_code == 200:
            panel.candles = msgspec.json.decode(response.content, type=_Candles).candles[::-1]
            panel.problem = "" if panel.candles else "no candles yet"
        else:
            panel.problem = msgspec.json.decode(response.content, type=_Problem).detail
    except (httpx.HTTPError, msgspec.DecodeError):
        panel.problem = "no answer"  # the candles of before stay; the title says that the connection is lost

"""What was traded of each symbol in the last 24 hours, asked for now and then: the stream has prices only.

The same sum as on the page: whole hours, and the minutes of the hour in which the 24 began.
"""

import asyncio
from collections.abc import Sequence
from urllib.parse import quote

import httpx
import msgspec

from marketflow.cli.watch.client_state import ClientState
from marketflow.model import MINUTE_MS

PAUSE_SECONDS = 30.0
ANSWER_SECONDS = 5.0

_HOUR_MS = 60 * MINUTE_MS
_DAY_MS = 24 * _HOUR_MS


class _Candle(msgspec.Struct):
    volume: float | None = None


class _Candles(msgspec.Struct):
    candles: list[_Candle]


async def keep_volumes(state: ClientState, url: str, exchanges: Sequence[str]) -> None:
    """Keep the volumes of the state's symbols up to date until cancelled.

    Args:
        state: whose symbols, and where the volumes are put.
        url: URL of the application.
        exchanges: whose volumes are added; all if empty.
    """
    while True:
        await put_volumes(state, url, exchanges)
        await asyncio.sleep(PAUSE_SECONDS)


async def put_volumes(state: ClientState, url: str, exchanges: Sequence[str]) -> None:
    """Put the volume of each symbol into the state, one after the other; without a response none changes."""
    # As the stream: proxies of the environment are ignored.
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False) as client:
        for symbol in state.symbols:
            paths = [f"{quote(exchange, safe='')}/" for exchange in exchanges] or [""]
            since = int(state.server_now().timestamp() * 1000) - _DAY_MS
            try:
                volumes = [
                    await _volume(client, f"{url}/candles/{path}{quote(symbol, safe='')}", since) for path in paths
                ]
            except (httpx.HTTPError, msgspec.DecodeError):
                return  # the connection is shown as lost, or the application is too old to know volumes
            state.volumes[symbol] = _sum(volumes)


async def _volume(client: httpx.AsyncClient, path: str, since: int) -> float | None:
    """What was traded since a time (Unix ms); None where it is unknown."""
    begin = -(-since // MINUTE_MS) * MINUTE_MS
    hour = -(-begin // _HOUR_MS) * _HOUR_MS
    queries: list[dict[str, str | int]] = [{"interval": "1h", "from": hour}]
    if begin < hour:
        queries.append({"interval": "1m", "from": begin, "to": hour})
    candles: list[_Candle] = []
    for query in queries:
        response = await client.get(path, params=query)
        response.raise_for_status()
        candles += msgspec.json.decode(response.content, type=_Candles).candles
    return _sum([candle.volume for candle in candles])


def _sum(volumes: Sequence[float | None]) -> float | None:
    """The sum; None where any is unknown, or there is none."""
    known = [volume for volume in volumes if volume is not None]
    return sum(known) if known and len(known) == len(volumes) else None

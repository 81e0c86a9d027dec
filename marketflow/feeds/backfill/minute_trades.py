"""All trades of one minute, from the pages that the venue gives: each once, by ascending id, or an error that says why.

Pages go forward from a time or back from an id; several minutes are therefore best made from the newest to the oldest,
each with the first id of the one after it. Where they stop making progress, or do not reach as far as the stream
has come, there is no answer but an error: a minute that misses trades must not stand for the whole one.
"""

from functools import partial

from marketflow.feeds.backfill.rest_client import RestClient, RestFailed
from marketflow.feeds.decoder import MAX_PRICE
from marketflow.feeds.venues.venue import Trade, TradesPage
from marketflow.model import MINUTE_MS

MARGIN_MS = 1_000
"""How far beyond the minute pages are read: ids and times may differ in order by less."""

MAX_PAGES = 500
"""Of one minute: at OKX, whose pages are the smallest, 800 trades a second."""

EARLIEST_MS = 1_230_768_000_000
"""2009: a trade from before it is dated in another unit."""

LATEST_AHEAD_MS = 86_400_000


class NotFillable(Exception):
    """The venue gives no trades of that time; another attempt will not do."""


class BehindStream(RestFailed):
    """The venue's REST does not know the newest trades of its stream yet."""


def trades_of_minute(client: RestClient, rest_symbol: str, start_ms: int, newest_id: int | None) -> list[Trade]:
    """All trades of the minute that starts at `start_ms`, by ascending id.

    Args:
        client: of the venue.
        rest_symbol: by its name in REST calls.
        start_ms: Unix ms.
        newest_id: of a trade that the stream has brought, best the first one after the minute: the pages must reach it.
            None where none is known; then the newest one by REST is taken for it.

    Raises:
        NotFillable: the venue gives no trades that old, or none at all.
        BehindStream: REST does not reach `newest_id` yet.
        VenueRefusal: the venue refuses to answer.
        RestFailed: it cannot be asked, its answer is none, or its pages make no progress.
    """
    rest = client.venue.rest
    kept_ms = rest.trades_kept_ms
    if kept_ms is not None and start_ms < client.now_ms - kept_ms:
        raise NotFillable(f"{client.venue.name} gives no trades from over {kept_ms / 86_400_000:g} days ago")
    pages = _Pages(client, rest_symbol, start_ms, newest_id)
    return pages.back() if rest.newest_first else pages.forward()


class _Pages:
    """What the pages have brought so far."""

    def __init__(self, client: RestClient, symbol: str, start_ms: int, newest_id: int | None) -> None:
        self._client, self._symbol = client, symbol
        self._start, self._end = start_ms, start_ms + MINUTE_MS
        self._newest_id = newest_id
        self._seen: dict[int, int] = {}  # time by id
        self._trades: dict[int, Trade] = {}
        self._count = 0

    def forward(self) -> list[Trade]:
        """From a time on, until a trade is beyond the minute or there are no more."""
        since = self._start - MARGIN_MS
        page, fresh = self._page(since, None, None)
        span = self._client.venue.rest.trades_span_ms
        while not fresh and span is not None and (since := since + span) < self._client.now_ms:
            page, fresh = self._page(since, None, None)
        while fresh and page.cursor is not None and self._latest < self._end + MARGIN_MS:
            page, fresh = self._page(since, None, page.cursor)
        if self._seen and min(self._seen.values()) < self._start - 2 * MARGIN_MS:
            raise RestFailed(f"{self._client.venue.name} gives trades from before the time that is asked for")
        return self._whole()

    def back(self) -> list[Trade]:
        """From an id back, until a trade is from before the minute or there are no older ones."""
        page, _ = self._page(0, self._newest_id, None)
        if self._newest_id is not None and self._latest < self._end:
            self._seen.clear()  # the minute may have newer ones: begin anew, at the newest of all
            page, _ = self._page(0, None, None)
        while self._seen and page.cursor is not None and min(self._seen.values()) >= self._start - MARGIN_MS:
            page, fresh = self._page(0, None, page.cursor)
            if not fresh:
                name, oldest = self._client.venue.name, min(self._seen)
                raise RestFailed(f"{name} gives no trades of {self._symbol} before {oldest}, though there are")
        most = self._client.venue.rest.newest_trades
        if most is not None and len(page.trades) >= most and min(self._seen.values()) >= self._start - MARGIN_MS:
            raise NotFillable(f"{self._client.venue.name} gives the {most} newest trades only")
        return self._whole()

    @property
    def _latest(self) -> int:
        return max(self._seen.values(), default=0)

    def _page(self, since: int, newest_id: int | None, cursor: str | None) -> tuple[TradesPage, int]:
        """The next page, and how many of its trades were not in the ones before."""
        if self._count == MAX_PAGES:
            raise RestFailed(f"over {MAX_PAGES} pages of {self._client.venue.name} for one minute of {self._symbol}")
        self._count += 1
        rest = self._client.venue.rest
        call = rest.trades_call(self._symbol, since, newest_id, cursor)
        page = self._client.ask(call, partial(rest.trades, self._symbol))
        before = len(self._seen)
        for trade in page.trades:
            self._take(trade)
        return page, len(self._seen) - before

    def _take(self, trade: Trade) -> None:
        name = self._client.venue.name
        if trade.id is None:
            raise RestFailed(f"a trade of {name} has no id: {trade}")
        if not EARLIEST_MS <= trade.at <= self._client.now_ms + LATEST_AHEAD_MS:
            raise RestFailed(f"a trade of {name} is not dated in the unit expected: {trade}")
        if not (0 < trade.price <= MAX_PRICE and 0 < trade.quantity <= MAX_PRICE):
            raise RestFailed(f"a trade of {name} has no valid price or quantity: {trade}")
        self._seen[trade.id] = trade.at
        if self._start <= trade.at < self._end:
            self._trades[trade.id] = trade

    def _whole(self) -> list[Trade]:
        if self._newest_id is not None and self._latest < self._end and max(self._seen, default=-1) < self._newest_id:
            name, newest = self._client.venue.name, max(self._seen, default="none")
            raise BehindStream(
                f"{name} gives trades of {self._symbol} up to {newest} only, the stream {self._newest_id}"
            )
        return [self._trades[id] for id in sorted(self._trades)]

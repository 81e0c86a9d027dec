"""What has become of the subscription to each symbol of one connection, and which are to be asked for again.

A subscription that is not answered is asked for again after ACK_SECONDS, then ever more rarely; so is a refused one,
alone, since it may be listed later. Venues that refuse a whole request for one symbol get the others again without it,
one by one where the answer does not say which it was. A trade counts as an answer: some venues send it first.
"""

from collections.abc import Callable, Iterable, Mapping
from math import inf

from marketflow.feeds.venues.venue import Acknowledged, Refused, Venue, chunks

ACK_SECONDS = 8.0
"""How long the answer to a subscription may take; with the turn of the next request it is asked again within 10 s."""

REFUSED_SECONDS = 60.0
"""When a refused symbol is asked for again."""

MOST_SECONDS = 600.0
"""The longest pause between requests for one symbol."""

TURN_SECONDS = 1.0
"""In which as many requests are sent as the venue takes in a second."""


class _Subscription:
    __slots__ = ("alone", "ask_at", "asked", "refusals")

    def __init__(self) -> None:
        self.ask_at = -inf  # inf: answered
        self.asked = 0
        self.refusals = 0
        self.alone = False


class Subscriptions:
    """The subscriptions of one connection, by the venue's names of the symbols.

    Args:
        venue: makes the requests.
        symbols: all that are to be subscribed.
        monotonic: the time in seconds.
        on_refused: called with a symbol and the venue's words.
        on_accepted: called with a symbol that was refused and is not any more.
    """

    def __init__(
        self,
        venue: Venue,
        symbols: Iterable[str],
        monotonic: Callable[[], float],
        on_refused: Callable[[str, str], None],
        on_accepted: Callable[[str], None],
    ) -> None:
        self._venue = venue
        self._monotonic = monotonic
        self._on_refused, self._on_accepted = on_refused, on_accepted
        self._subscriptions = {symbol: _Subscription() for symbol in symbols}
        self._requests: dict[int, tuple[str, ...]] = {}  # without an answer
        self._last_request = 0
        self._next_turn = -inf
        self.has_open = True
        """Whether any has not been answered, or was refused."""
        self.has_urgent = False
        """Whether a request has become due by what came."""

    @property
    def next_at(self) -> float:
        """When the next request is due; inf for none."""
        if not self.has_open:
            return inf
        return max(self._next_turn, min((each.ask_at for each in self._subscriptions.values()), default=inf))

    def due(self) -> list[str]:
        """The requests that are due."""
        now = self._monotonic()
        if not self.has_open or now < self.next_at:
            return []
        due = {symbol: each for symbol, each in self._subscriptions.items() if each.ask_at <= now}
        together = [symbol for symbol, each in due.items() if not each.alone]
        parts = [
            *chunks(together, self._venue.symbols_a_request),
            *([symbol] for symbol, each in due.items() if each.alone),
        ]
        self._next_turn, self.has_urgent = now + TURN_SECONDS, False
        return [frame for part in parts[: self._venue.requests_a_second] for frame in self._request(part, due, now)]

    def ask_again(self, symbol: str) -> None:
        """Subscribe again to a symbol whose trades do not come though there are some."""
        if (found := self._subscriptions.get(symbol)) is not None and found.ask_at == inf:
            found.ask_at, found.asked = self._monotonic(), 0
            self.has_open = self.has_urgent = True

    def on_answer(self, answer: Acknowledged | Refused) -> None:
        """Take notice of an answer of the venue."""
        if isinstance(answer, Refused) and "already" not in answer.text.lower():
            self._refuse(answer)
        elif isinstance(answer, Refused):
            self._accept((answer.symbol,) if answer.symbol else self._symbols_of(answer.request))
        else:
            self._accept(answer.symbols or self._symbols_of(answer.request))

    def on_trades(self, symbols: Iterable[str]) -> None:
        """Take notice of trades, which prove a subscription."""
        if self.has_open:
            self._accept(symbols)

    def _request(self, symbols: Iterable[str], of: Mapping[str, _Subscription], now: float) -> list[str]:
        part = tuple(symbols)
        self._last_request += 1
        self._requests[self._last_request] = part
        for each in (of[symbol] for symbol in part):
            pause = (REFUSED_SECONDS if each.refusals else ACK_SECONDS) * 2.0 ** min(each.asked, 10)
            each.ask_at = now + min(pause, MOST_SECONDS)
            each.asked += 1
        return self._venue.subscribe(part, self._last_request)

    def _symbols_of(self, request: int | None) -> tuple[str, ...]:
        """What a request was for; an answer that does not say which one it was is to the oldest without one."""
        if request is None:
            request = next(iter(self._requests), None)
        return () if request is None else self._requests.pop(request, ())

    def _accept(self, symbols: Iterable[str]) -> None:
        found = {symbol: self._subscriptions[symbol] for symbol in symbols if symbol in self._subscriptions}
        accepted = {symbol: each for symbol, each in found.items() if each.ask_at < inf}
        for symbol, each in accepted.items():
            if each.refusals:
                self._on_accepted(symbol)
            each.ask_at, each.asked, each.refusals, each.alone = inf, 0, 0, False
        if accepted:
            self.has_open = any(each.ask_at < inf for each in self._subscriptions.values())

    def _refuse(self, answer: Refused) -> None:
        now = self._monotonic()
        if answer.symbol in self._subscriptions:
            number = next((each for each, part in self._requests.items() if answer.symbol in part), None)
            others = self._requests[number] if number is not None else ()
            bad: str | None = answer.symbol
            if self._venue.refuses_whole_requests and number is not None:
                del self._requests[number]
        else:
            others = self._symbols_of(answer.request)
            bad = others[0] if len(others) == 1 else None
        if bad is not None:
            refused = self._subscriptions[bad]
            refused.refusals, refused.alone = refused.refusals + 1, True
            refused.ask_at = now + min(REFUSED_SECONDS * 2.0 ** min(refused.refusals - 1, 10), MOST_SECONDS)
            self._on_refused(bad, answer.text)
            self.has_open = True
        if bad is None or self._venue.refuses_whole_requests:
            for symbol in others:
                each = self._subscriptions[symbol]
                if symbol != bad and each.ask_at < inf:
                    each.ask_at, each.alone = now, bad is None
                    self.has_urgent = True

"""The protocol of a feed, the ticks of one exchange as a cold Observable; and the merge of a changing set of streams.

A new kind of feed implements it and passes the contract in tests/feeds/test_contract.py.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol, TypeAlias, TypeVar

import msgspec
from reactivex import Observable
from reactivex import operators as ops

from marketflow.feeds.decoder import Decoder
from marketflow.model import Candles, FeedState

_T = TypeVar("_T")
_R = TypeVar("_R")

Record: TypeAlias = Callable[[Sequence[bytes]], None]
"""Called with what a feed has just received: frames or chunks of lines. Never blocks, never raises."""


class FeedReport(msgspec.Struct, frozen=True):
    """What a feed reports beside its state; None is unknown.

    Args:
        clock_offset_ms: how far the exchange's clock is ahead of this machine's.
        rest_weight: weight of REST calls that this process has used in the venue's current interval, and its limit.
        rest_error: why the last call by REST failed; None if it succeeded.
        halted: symbols that its venue lists and does not trade now, with the status that the venue gives.
    """

    clock_offset_ms: int | None = None
    rest_weight: tuple[int, int] | None = None
    rest_error: str | None = None
    halted: Mapping[str, str] = {}


class Connection(Protocol):
    """A source of ticks that is lost, and connected again, as a whole."""

    @property
    def exchange(self) -> str:
        """Name of the exchange, as configured."""
        ...

    @property
    def place(self) -> str:
        """Where its ticks come from, for logs and reports; without credentials."""
        ...

    @property
    def pause_seconds(self) -> float:
        """How long its venue refuses a new connection; 0 if it does not."""
        ...

    def batches(self) -> Observable[Candles]:
        """Connect once: emit batches, none of them empty, then an error when the connection is lost.

        Subscribing opens the connection; disposing closes it and ends its thread. Subscribe again to reconnect.
        """
        ...


class Feed(Connection, Protocol):
    """One exchange in one mode."""

    @property
    def connections(self) -> "Sequence[Connection]":
        """Its connections, each reconnected on its own; most feeds are their only connection."""
        ...

    @property
    def decoder(self) -> Decoder:
        """Decodes and validates its ticks, and counts them."""
        ...

    @property
    def state(self) -> FeedState:
        """Its state now."""
        ...

    @property
    def absent(self) -> Collection[str]:
        """Symbols that its venue does not trade."""
        ...

    @property
    def refusals(self) -> Mapping[str, str]:
        """The venue's error texts, by symbol that it trades and whose subscription it refuses."""
        ...

    def take_symbols(self, symbols: Mapping[str, str]) -> None:
        """Replace the symbols, each with the venue's name of it, "" for the one in the venue's list; for any thread.

        Symbols that stay lose no tick. No connection is interrupted, but `connections` may differ afterwards.
        """
        ...

    def report(self) -> FeedReport:
        """Return the report. Does not block."""
        ...

    def measure_clock(self) -> None:
        """Measure its exchange's clock for the report, where it can be read. May block for some seconds."""
        ...

    def doubles_by_symbol(self) -> dict[str, int] | None:
        """Return how many trades were received more than once, and counted once; None without ids."""
        ...

    def stop(self) -> None:
        """Complete the current attempt, after it has emitted what was received, and all later ones. Does not block."""
        ...


def each_while_present(
    stream: Callable[[_T, Observable[Any]], Observable[_R]],
) -> Callable[[Observable[Sequence[_T]]], Observable[_R]]:
    """Merge the streams of the members of a changing set, each from when its member is added on.

    Members are compared by `==`. A set that is emitted without a member removes it; the streams of the others go on.

    Args:
        stream: returns the stream of a member, given an Observable that emits when it is removed.
    """

    def change(before: tuple[Sequence[_T], Sequence[_T]], present: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
        return present, [member for member in present if member not in before[0]]

    def merged(sets: Observable[Sequence[_T]]) -> Observable[_R]:
        def of_member(member: _T) -> Observable[_R]:
            def is_removed(present: Sequence[_T]) -> bool:
                return member not in present

            return stream(member, sets.pipe(ops.filter(is_removed), ops.take(1)))

        nothing: tuple[Sequence[_T], Sequence[_T]] = (), ()
        changes: Observable[tuple[Sequence[_T], Sequence[_T]]] = sets.pipe(ops.scan(change, nothing))
        added: Observable[_T] = changes.pipe(ops.flat_map(itemgetter(1)))
        return added.pipe(ops.flat_map(of_member))

    return ops.publish(merged)

"""Compares a candle made of ticks with the venue's own of the same minute.

Prices are equal to the last digit, and so is a count of trades. What one of the two does not say is not compared. Where
the venue opens a candle at the close of the one before (Bybit), the open is not that of its trades, and high and low
are those of the trades, or of the trades and that price.
"""

from marketflow.model import Candle, VenueValues, rounded

ROUNDING = 0.5e-8
"""By how much an amount may differ for each rounding: venues say amounts with eight digits or more."""

FLOAT_NOISE = 1e-12
"""By how much of itself an amount may differ: our sum of thousands of floats."""


def differences(ours: Candle, theirs: VenueValues, opens_at_last_close: bool = False) -> list[str]:
    """What differs, by the names of the venue's values; empty where the candle is verified.

    Args:
        ours: made of ticks.
        theirs: the venue's own.
        opens_at_last_close: as of `RestCalls`.
    """
    before = theirs.open if opens_at_last_close else None
    equal = {
        "open": before is not None or ours.open == theirs.open,
        "high": theirs.high == ours.high or (before is not None and theirs.high == max(ours.high, before)),
        "low": theirs.low == ours.low or (before is not None and theirs.low == min(ours.low, before)),
        "close": ours.close == theirs.close,
        "ticks": theirs.ticks is None or ours.ticks == theirs.ticks,
    }
    if ours.amounts is not None:
        # A venue may round the turnover of each trade.
        equal["volume"] = _is_same_amount(ours.amounts.volume, theirs.volume, 1)
        equal["turnover"] = _is_same_amount(ours.amounts.turnover, theirs.turnover, ours.ticks + 1)
    return [name for name, is_equal in equal.items() if not is_equal]


def difference_text(ours: Candle, theirs: VenueValues, names: list[str]) -> str:
    """What differs, in words."""
    amounts = ours.amounts
    values = VenueValues(
        ours.open,
        ours.high,
        ours.low,
        ours.close,
        None if amounts is None else rounded(amounts.volume),
        None if amounts is None or amounts.turnover is None else rounded(amounts.turnover),
        ours.ticks,
    )
    return ", ".join(f"{name} {getattr(values, name)} instead of {getattr(theirs, name)}" for name in names)


def _is_same_amount(ours: float | None, theirs: float | None, roundings: int) -> bool:
    if ours is None or theirs is None:
        return True
    return abs(ours - theirs) <= ROUNDING * roundings + FLOAT_NOISE * max(ours, theirs)

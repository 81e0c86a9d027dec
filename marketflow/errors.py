"""Exceptions of MarketFlow, one class per reaction of the caller."""


class MarketFlowError(Exception):
    """Base of all exceptions that MarketFlow raises; the text is for a person and has no secrets."""


class SettingsError(MarketFlowError):
    """A setting or an argument is wrong: print which, and exit with code 2."""


class StartError(MarketFlowError):
    """The application cannot start (port taken, data folder in use): print why, and exit with code 1."""


class QuotaExceeded(MarketFlowError):
    """A client exceeds a limit: it may retry after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too much; try again in {seconds:.0f} s")
        self.seconds = seconds


class Unavailable(MarketFlowError):
    """A store is unavailable: answer from another store, keep pending writes, or retry.

    `is_unreachable`: there is no connection; otherwise the store refuses the request.
    """

    def __init__(self, *args: object, is_unreachable: bool = False) -> None:
        super().__init__(*args)
        self.is_unreachable = is_unreachable


class Starting(Unavailable):
    """A store is unavailable because this application still starts it, which is no outage."""

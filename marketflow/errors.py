"""The errors of MarketFlow, one class for each thing a caller can do about it."""


class MarketFlowError(Exception):
    """Base of all errors that MarketFlow raises on purpose; its text is fit for a person and free of secrets."""


class SettingsError(MarketFlowError):
    """A setting or an argument is wrong: tell the person which, and exit with code 2."""


class StartError(MarketFlowError):
    """The application cannot start here and now (port taken, data folder in use): say why, and exit with code 1."""


class TooMuch(MarketFlowError):
    """A client has asked for more than its share: let it try again after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too much; try again in {seconds:.0f} s")
        self.seconds = seconds


class Unavailable(MarketFlowError):
    """A store cannot be asked at the moment: answer from elsewhere, keep what was to be written, or try again.

    `is_unreachable`: there is no connection to it, rather than that it refuses what was asked for.
    """

    def __init__(self, *args: object, is_unreachable: bool = False) -> None:
        super().__init__(*args)
        self.is_unreachable = is_unreachable

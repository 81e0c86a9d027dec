"""What SIGHUP asks for: the settings to be read again, or a stop, as the terminal was closed."""

import os


class Hangup:
    """Tells the two apart by whether the process has lost its terminal since it was made."""

    def __init__(self) -> None:
        self._had_terminal = _has_terminal()

    @property
    def is_of_terminal(self) -> bool:
        """Whether the terminal was closed in which the process was started."""
        return self._had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True

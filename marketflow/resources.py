"""Files that live beside the package in a checkout and inside it in a wheel: ddl/ and settings.toml."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource(name: str) -> Path:
    """Return the path of a file or folder that ships with MarketFlow.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for place in (_PACKAGE.parent, _PACKAGE):
        if (path := place / name).exists():
            return path
    raise FileNotFoundError(f"{name} is missing from the installation of MarketFlow")

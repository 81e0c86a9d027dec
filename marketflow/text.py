"""Text from outside, as it may be shown to a person."""

from urllib.parse import urlsplit, urlunsplit


def visible(text: str) -> str:
    """Text without what could drive a terminal; lines stay."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode("ascii") for each in text
    )


def without_credentials(url: str) -> str:
    """A URL without the user and the password in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

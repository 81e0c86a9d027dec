"""What an expression of PromQL asks for. Not a parser: promtool is one; this finds names and labels."""

import re

_WORDS = frozenset({"on", "by", "without", "and", "or", "unless", "ignoring", "group_left", "group_right", "bool"})
_LISTS = re.compile(r"\b(by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\b\s*(\{[^}]*\})?(?!\s*\()")
ADDED = frozenset({"job", "instance"})
"""Labels that Prometheus adds."""


def metrics_of(expression: str) -> dict[str, set[str]]:
    """The metrics of an expression, and the labels by which each is selected."""
    text = _LISTS.sub(" ", expression)
    text = re.sub(r"\[[^\]]*\]", " ", text)  # ranges
    found: dict[str, set[str]] = {}
    for name, matchers in _SELECTOR.findall(re.sub(r'(?<![=~!])"[^"]*"', " ", text)):
        if name not in _WORDS and not re.match(r"^\d", name):
            found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
    return found


def labels_of(expression: str) -> set[str]:
    """The labels by which it groups or joins."""
    lists = [match[1] for match in _LISTS.findall(expression)]
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}

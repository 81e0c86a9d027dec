"""What a page has drawn, and waiting for it."""

import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page

COLOURED = """
    ([place, name]) => {
        const [red, green, blue] = getComputedStyle(document.documentElement)
            .getPropertyValue(name).match(/[0-9]+/g).map(Number);
        const canvas = document.querySelector(place);
        // Of a copy: a browser complains of one that is read and drawn in turn.
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let at = 0; at < data.length; at += 4) {
            count += data[at] === red && data[at + 1] === green && data[at + 2] === blue && data[at + 3] === 255;
        }
        return count;
    }
"""
"""How many pixels of a canvas have one of the page's colours."""

CANDLES = "#chart tr:first-child td:nth-child(2) canvas"
AXIS = "#chart tr:first-child td:last-child canvas"


def drawn(page: Page, colour: str, place: str = CANDLES) -> int:
    count: int = page.evaluate(COLOURED, [place, f"--{colour}"])
    return count


def until(page: Page, condition: Callable[[], Any], seconds: float = 15.0) -> None:
    """Let the page run until a condition is met."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met"
        page.wait_for_timeout(50)  # to read a canvas takes half of that

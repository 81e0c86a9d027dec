"""Asking two stores of which either may be away."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from marketflow.errors import Unavailable

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


async def unless_unavailable(answer: Awaitable[T]) -> T | None:
    """The answer of a store, or None where it cannot be asked now."""
    try:
        return await answer
    except Unavailable:
        return None


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Ask two at once; neither is left behind when the other fails or the request is cancelled."""
    try:
        async with asyncio.TaskGroup() as asking:
            one, other = asking.create_task(_awaited(first)), asking.create_task(_awaited(second))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None  # as it would have been raised by asking the one alone
    return one.result(), other.result()


async def _awaited(answer: Awaitable[T]) -> T:
    return await answer

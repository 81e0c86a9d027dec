"""Queries of two stores of which either may be unavailable."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from marketflow.errors import Unavailable

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


async def unless_unavailable(answer: Awaitable[T]) -> T | None:
    """Return the answer of a store, or None while it is unavailable."""
    try:
        return await answer
    except Unavailable:
        return None


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Query two stores concurrently; both end when one fails or the request is cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            one, other = group.create_task(_awaited(first)), group.create_task(_awaited(second))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None  # as the query alone would raise it
    return one.result(), other.result()


async def _awaited(answer: Awaitable[T]) -> T:
    return await answer

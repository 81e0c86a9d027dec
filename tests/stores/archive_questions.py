"""Questions to the archive from code without an event loop."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.postgres.rows import connection_keywords

T = TypeVar("T")


class ArchiveQuestions:
    """A `PostgresReader` whose connections last from one question to the next, as in the application.

    New ones for each question would plan every query again, which takes far longer than the query.
    """

    def __init__(self, place: dict[str, Any]) -> None:
        self._runner = asyncio.Runner()
        self._reader = PostgresReader(connection_keywords(**place))
        self._runner.run(self._open())

    async def _open(self) -> None:
        await self._reader.open()
        assert self._reader._pool is not None
        await (
            self._reader._pool.wait()
        )  # a question has a limit of its time, which the start of a session is no part of

    def ask(self, question: Callable[[PostgresReader], Coroutine[Any, Any, T]]) -> T:
        """Return the answer to a question."""
        return self._runner.run(question(self._reader))

    def close(self) -> None:
        """Close all connections."""
        self._runner.run(self._reader.close())
        self._runner.close()

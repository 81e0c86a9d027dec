"""A subscription hands over the messages of Redis in order, however they are received, and ends with an error."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis

from marketflow.stores.redis.buckets.channel_messages import Subscription, subscribed
from marketflow.stores.redis.connection import async_client, connection_keywords
from tests.support.servers import HOST, RedisServer

SECONDS = 5.0
RECEIVED = (
    b">3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n"  # a push of protocol 3
    b">3\r\n$7\r\nmessage\r\n$1\r\na\r\n$2\r\n\r\n\r\n"
    b"+PONG\r\n"
    b"*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$3\r\ntwo\r\n"  # protocol 2
    b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
    b">3\r\n$8\r\nsmessage\r\n$1\r\nb\r\n$5\r\nthree\r\n"
)
MESSAGES = [
    (b"subscribe", b"a", 1),
    (b"message", b"a", b"\r\n"),
    (b"message", b"a", b"two"),
    (b"smessage", b"b", b"three"),
]


class NoTransport:
    """Has a protocol, and nothing to send to."""

    def __init__(self) -> None:
        self.protocol: Any = asyncio.Protocol()

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol


def on_server(server: RedisServer, test: Callable[["redis.asyncio.Redis"], Awaitable[None]], **keywords: Any) -> None:
    async def run() -> None:
        client = async_client(connection_keywords(HOST, server.port, server.password, 0) | keywords, 1)
        async with asyncio.timeout(SECONDS):
            await test(client)
        await client.aclose()

    asyncio.run(run())


def test_messages_are_whole_however_reads_divide_them() -> None:
    async def received(*reads: bytes) -> list[tuple[bytes, bytes, Any]]:
        taken: list[tuple[bytes, bytes, Any]] = []
        subscription = Subscription(NoTransport(), lambda *message: taken.append(message))
        subscription.unanswered = 3
        for read in reads:
            subscription.data_received(read)
        assert subscription.unanswered == 0
        assert not subscription.lost.done()
        return taken

    async def check() -> None:
        assert await received(RECEIVED) == MESSAGES
        assert await received(*(RECEIVED[at : at + 1] for at in range(len(RECEIVED)))) == MESSAGES
        for at in range(1, len(RECEIVED)):
            assert await received(RECEIVED[:at], RECEIVED[at:]) == MESSAGES

    asyncio.run(check())


def test_messages_published_before_and_after_a_ping_arrive_in_order(redis_db: RedisServer) -> None:
    async def test(client: "redis.asyncio.Redis") -> None:
        taken: asyncio.Queue[tuple[bytes, bytes, Any]] = asyncio.Queue()
        for _ in range(2):  # the connection of the first is closed, and one more is not allowed
            async with subscribed(client, ["a", "b"], lambda *message: taken.put_nowait(message)) as subscription:
                assert [await taken.get(), await taken.get()] == [(b"subscribe", b"a", 1), (b"subscribe", b"b", 2)]
                with redis_db.client() as publisher:
                    assert publisher.publish("b", b"x" * 1_000_000) == 1
                    subscription.ping()
                    assert publisher.publish("a", "2") == 1
                assert [await taken.get(), await taken.get()] == [
                    (b"message", b"b", b"x" * 1_000_000),
                    (b"message", b"a", b"2"),
                ]
                while subscription.unanswered:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.001)

    on_server(redis_db, test)


def test_killed_connection_ends_the_subscription(redis_db: RedisServer) -> None:
    async def test(client: "redis.asyncio.Redis") -> None:
        begun = asyncio.Event()
        async with subscribed(client, ["a"], lambda *_: begun.set()) as subscription:
            await begun.wait()
            with redis_db.client() as other:
                assert other.client_kill_filter(_type="pubsub") == 1
            with pytest.raises(redis.ConnectionError):
                await subscription.lost

    on_server(redis_db, test)


def test_refused_channel_ends_the_subscription(redis_db: RedisServer) -> None:
    async def test(client: "redis.asyncio.Redis") -> None:
        async with subscribed(client, ["a"], lambda *_: None) as subscription:
            with pytest.raises(redis.ResponseError, match="NOPERM"):
                await subscription.lost

    with redis_db.client() as admin:
        admin.acl_setuser("deaf", enabled=True, nopass=True, commands=["+@all"], keys=["*"], reset_channels=True)
        try:
            on_server(redis_db, test, username="deaf", password="any")
        finally:
            admin.acl_deluser("deaf")


def test_error_while_a_message_is_taken_ends_the_subscription(redis_db: RedisServer) -> None:
    async def test(client: "redis.asyncio.Redis") -> None:
        def fail(*_: object) -> None:
            raise ValueError("no such message")

        async with subscribed(client, ["a"], fail) as subscription:
            with pytest.raises(ValueError, match="no such message"):
                await subscription.lost

    on_server(redis_db, test)

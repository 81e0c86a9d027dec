"""As much of a Redis server as MarketFlow uses, in memory: the real clients of the cache run on it, codecs and all.

Nothing expires. The commands of a transaction are done at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from marketflow.model import NANOSECONDS_PER_MS
from marketflow.stores.redis.codec import decode_candle
from marketflow.stores.redis.slot_script import PUT_SLOTS
from marketflow.stores.redis.writer import PUT_NEWEST

Call = Callable[[Callable[[], Any]], Any]
"""Does a command, or fails as a network does."""


def _at_once(command: Callable[[], Any]) -> Any:
    return command()


class MemoryRedis:
    """The server; `call` stands between it and its clients."""

    def __init__(self, call: Call = _at_once) -> None:
        self.call = call
        self.strings: dict[str, bytes] = {}
        self.hashes: dict[str, dict[str, bytes]] = {}
        self.sorted_sets: dict[str, dict[bytes, float]] = {}

    def empty(self) -> None:
        self.strings, self.hashes, self.sorted_sets = {}, {}, {}

    # Commands

    def get(self, key: str) -> bytes | None:
        return self.strings.get(key)

    def set(self, key: str, value: object, *, get: bool = False, **_expiry: int) -> bytes | None:
        previous = self.strings.get(key)
        self.strings[key] = str(value).encode()
        return previous if get else None

    def hset(self, key: str, mapping: Mapping[str, bytes]) -> None:
        self.hashes.setdefault(key, {}).update(mapping)

    def hmget(self, key: str, fields: Sequence[str]) -> list[bytes | None]:
        return [self.hashes.get(key, {}).get(field) for field in fields]

    def publish(self, channel: str, message: bytes) -> None:
        pass

    def type(self, key: str) -> bytes:
        kinds: dict[bytes, Mapping[str, object]] = {
            b"string": self.strings,
            b"hash": self.hashes,
            b"zset": self.sorted_sets,
        }
        return next((name for name, kind in kinds.items() if key in kind), b"none")

    def expire(self, key: str, seconds: int) -> bool:
        return any(key in kind for kind in (self.strings, self.hashes, self.sorted_sets))

    def pexpire(self, key: str, milliseconds: int) -> bool:
        return self.expire(key, milliseconds)

    def eval(self, script: str, count: int, *rest: Any) -> None:
        """Do what PUT_SLOTS or PUT_NEWEST does; their docstrings list the arguments."""
        names, (_expiry, _channel, _message, number, *arguments) = rest[:count], rest[count:]
        act = {PUT_SLOTS: self._put_slots, PUT_NEWEST: self._put_newest}[script]
        act([name.decode() for name in names], int(number), iter(arguments))

    def _put_slots(self, names: Sequence[str], trimmed: int, following: Iterator[Any]) -> None:
        slots = iter(names[: len(names) - trimmed])
        left = len(names) - trimmed
        while left:
            count, start, completeness = next(following), next(following), next(following)
            for key, member in zip(islice(slots, count), islice(following, count), strict=True):
                held = self.zrangebyscore(key, float(start), float(start))
                if max((decode_candle(other).completeness for other in held), default=-1) <= completeness:
                    self.zremrangebyscore(key, float(start), float(start))
                    self.zadd(key, {member: float(start)})
            left -= count
        for key, oldest in zip(names[len(names) - trimmed :], following, strict=True):
            self.zremrangebyscore(key, "-inf", f"({oldest}")

    def _put_newest(self, names: Sequence[str], ticks: int, following: Iterator[Any]) -> None:
        latest = next(following)
        for key in names[:ticks]:
            price, at, sequence = islice(following, 3)
            received = b"%d" % (int(sequence) // NANOSECONDS_PER_MS)
            held_at, held_sequence = (int(field or -1) for field in self.hmget(key, ["timestamp", "sequence"]))
            if latest == "" or (held_at, held_sequence) <= (int(at), int(sequence)) or held_at > latest:
                self.hset(key, {"price": price, "timestamp": at, "received": received, "sequence": sequence})

    def zcard(self, key: str) -> int:
        return len(self.sorted_sets.get(key, {}))

    def zcount(self, key: str, low: object, high: object) -> int:
        return len(_within(self.sorted_sets.get(key, {}), low, high))

    def zadd(self, key: str, mapping: Mapping[bytes | str, float]) -> None:
        members = self.sorted_sets.setdefault(key, {})
        for member, score in mapping.items():
            members[member.encode() if isinstance(member, str) else member] = score

    def zremrangebyscore(self, key: str, low: object, high: object) -> None:
        members = self.sorted_sets.get(key, {})
        for member in _within(members, low, high):
            del members[member]

    def zrangebyscore(self, key: str, low: object, high: object, *, withscores: bool = False) -> list[Any]:
        members = self.sorted_sets.get(key, {})
        found = sorted(_within(members, low, high), key=lambda member: (members[member], member))
        return [(member, members[member]) for member in found] if withscores else found

    def zrange(self, key: str, first: int, last: int, *, withscores: bool = False) -> list[Any]:
        everything = self.zrangebyscore(key, "-inf", "+inf", withscores=withscores)
        return everything[first : None if last == -1 else last + 1]


class MemoryRedisClient:
    """What a thread holds of it: `redis.Redis`."""

    def __init__(self, server: MemoryRedis) -> None:
        self._server = server

    def __getattr__(self, command: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._server.call(lambda: getattr(self._server, command)(*args, **kwargs))

    def pipeline(self, transaction: bool) -> "_Pipeline":
        return _Pipeline(self._server)

    @property
    def connection_pool(self) -> "_ConnectionPool":
        return _ConnectionPool(self._server)


class AsyncMemoryRedisClient:
    """What an event loop holds of it: `redis.asyncio.Redis`."""

    def __init__(self, server: MemoryRedis) -> None:
        self._server = server

    def pipeline(self, transaction: bool) -> "_AsyncPipeline":
        return _AsyncPipeline(self._server)


class _Commands:
    def __init__(self, server: MemoryRedis) -> None:
        self._server = server
        self._commands: list[Callable[[], Any]] = []

    def __getattr__(self, command: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self._commands.append(lambda: getattr(self._server, command)(*args, **kwargs))

    def _execute(self) -> list[Any]:
        answers: list[Any] = self._server.call(lambda: [command() for command in self._commands])
        return answers


class _Pipeline(_Commands):
    def __enter__(self) -> "_Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def execute(self) -> list[Any]:
        return self._execute()


class _AsyncPipeline(_Commands):
    async def execute(self) -> list[Any]:
        return self._execute()


class _ConnectionPool:
    def __init__(self, server: MemoryRedis) -> None:
        self._server = server

    def get_connection(self) -> "_Connection":
        self._server.call(lambda: None)
        return _Connection(self._server)

    def release(self, connection: "_Connection") -> None:
        pass


class _Connection:
    """Does commands as they are sent; what goes wrong with them is in the replies, which are read later."""

    def __init__(self, server: MemoryRedis) -> None:
        self._server = server
        self._replies: list[Any] = []

    def pack_commands(self, commands: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        return commands

    def send_packed_command(self, commands: Sequence[tuple[Any, ...]], check_health: bool) -> None:
        try:
            self._replies += self._server.call(lambda: [self._do(*command) for command in commands])
        except Exception as error:  # noqa: BLE001 - raised when it is read
            self._replies += [error] * len(commands)

    def can_read(self) -> bool:
        return bool(self._replies)

    def read_response(self) -> Any:
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def disconnect(self) -> None:
        self._replies.clear()

    def _do(self, name: str, *arguments: Any) -> Any:
        match name:
            case "MULTI" | "EXEC":
                return None
            case "HSET":
                key, *rest = arguments
                return self._server.hset(key.decode(), dict(zip(rest[::2], rest[1::2], strict=True)))
            case "PEXPIRE":
                key, expiry = arguments
                return self._server.pexpire(key.decode(), expiry)
            case _:
                return getattr(self._server, name.lower())(*arguments)


def _within(members: Mapping[bytes, float], low: object, high: object) -> list[bytes]:
    least, most = float(str(low)), float(str(high).removeprefix("("))
    if str(high).startswith("("):
        return [member for member, score in members.items() if least <= score < most]
    return [member for member, score in members.items() if least <= score <= most]

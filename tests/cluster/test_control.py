"""The lease and the commands, each side by itself, with a real Redis and a clock that the test sets."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec
import pytest
import redis

from marketflow.alerts.alert_model import PriceRule, Webhook
from marketflow.cluster.leader import Leader
from marketflow.cluster.lease import GRACE_SECONDS, Lease, connect
from marketflow.cluster.messages import (
    FeedsQuery,
    FeedsReport,
    IngestState,
    Published,
    RuleChange,
    RuleChanged,
    SeriesReport,
    decode,
    encode,
)
from marketflow.cluster.remote_control import RemoteIngest
from marketflow.counters import DelayCounter, ExchangeCounters, IngestCounters
from marketflow.errors import Unavailable
from marketflow.model import FeedState, Mode
from marketflow.settings.reloading import Changes, Names
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import connection_keywords
from tests.support.servers import HOST, RedisServer, free_port, wait_until

RUNNING = IngestState(Mode.LIVE, {"exchange1": FeedState.CONNECTED}, cache_complete=True, archive_available=True)

COUNTED = IngestCounters(
    {"exchange1": ExchangeCounters(7, {"malformed": 1}, 2, 3, 1_763_690_000_000)},
    DelayCounter().so_far(),
    *range(8),
)


REPORTED = FeedsReport(
    Mode.LIVE, (), (SeriesReport("exchange1", "BTCUSDT", "connected", 5.5, 7, 1.0, 2.0, 3.0, 4, {}),), 9
)


def changed(change: RuleChange) -> RuleChanged:
    return RuleChanged(change.id or "made", "" if change.rule else "unknown_rule")


def reported(query: FeedsQuery) -> FeedsReport:
    """Report one series, and as many in all as the query asks for."""
    return msgspec.structs.replace(REPORTED, total=query.limit + query.offset)


NOTHING = Names((), (), ())
CHANGES = Changes(
    Names(("exchange2",), (), ()), NOTHING, NOTHING, Names(("exchange1",), ("BTCUSDT",), ()), ("http.port",)
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(redis_db: RedisServer) -> Iterator["redis.Redis"]:
    with connect(connection_keywords(HOST, redis_db.port, "", 0)) as client:
        yield client


@pytest.fixture
def feeds(redis_db: RedisServer) -> RemoteIngest:
    return RemoteIngest(connection_keywords(HOST, redis_db.port, "", 0), ["exchange1", "exchange2"], Mode.TEST)


def published(lease: Lease, number: int = 1, mode: Mode = Mode.LIVE) -> Published:
    return Published(lease.run, number, 0, IngestState(mode, RUNNING.exchanges, True, True))


# The lease


def test_first_process_acquires_and_keeps_the_lease(client: "redis.Redis", clock: Clock) -> None:
    first, second = Lease(client, clock), Lease(client, clock)
    assert first.hold()
    assert not second.hold()
    assert second.holder == first.run
    assert first.hold()
    assert client.pttl(keys.LEASE_KEY) > 0


def test_released_lease_is_acquired_at_once(client: "redis.Redis", clock: Clock) -> None:
    first, second = Lease(client, clock), Lease(client, clock)
    first.hold()
    second.hold()
    first.release()
    assert second.hold()
    assert not first.hold()


def test_missing_lease_is_left_to_its_last_holder_first(client: "redis.Redis", clock: Clock) -> None:
    first, second = Lease(client, clock), Lease(client, clock)
    first.hold()
    second.hold()
    client.flushall()
    assert not second.hold()
    clock.now += GRACE_SECONDS / 2
    assert not second.hold()
    assert first.hold()
    assert not second.hold()
    client.flushall()
    clock.now += GRACE_SECONDS  # the time before does not count
    assert not second.hold()
    clock.now += GRACE_SECONDS
    assert second.hold()
    assert not first.hold()
    assert first.holder == second.run


def test_only_the_leader_publishes_releases_and_claims(client: "redis.Redis", clock: Clock) -> None:
    holder, other = Lease(client, clock), Lease(client, clock)
    assert holder.hold(published(holder))
    before = client.get(keys.STATE_KEY)
    assert not other.hold(published(other, mode=Mode.TEST))
    assert client.get(keys.STATE_KEY) == before
    assert client.get(keys.MODE_KEY) == b"live"
    other.release()
    assert holder.hold()
    client.set(keys.command_key("1"), "test")
    assert other.claim("1") is None
    assert holder.claim("1") == b"test"
    assert holder.claim("1") is None


def test_all_keys_of_the_cluster_expire(client: "redis.Redis", clock: Clock) -> None:
    lease = Lease(client, clock)
    lease.hold(published(lease))
    assert len(client.keys("*")) == 3
    assert [key for key in client.keys("*") if client.ttl(key) == -1] == []
    lease.release()
    assert client.ttl(keys.LEASE_KEY) != -1


def test_databases_of_one_redis_share_no_messages(client: "redis.Redis", redis_db: RedisServer, clock: Clock) -> None:
    with connect(connection_keywords(HOST, redis_db.port, "", 1)) as other, client.pubsub() as heard:  # type: ignore[no-untyped-call]
        mine, theirs = Lease(client, clock), Lease(other, clock)
        heard.psubscribe("marketflow:*")
        assert wait_until(lambda: heard.get_message(timeout=1))["type"] == "psubscribe"
        for lease in (mine, theirs):
            assert lease.hold(published(lease))
            lease.release()
        messages = [wait_until(lambda: heard.get_message(timeout=1)) for _ in range(4)]
        assert [message["channel"].decode() for message in messages] == [keys.STATE_KEY] * 2 + [
            f"{keys.STATE_KEY}:1"
        ] * 2


def test_unreachable_redis_makes_the_lease_unavailable(clock: Clock) -> None:
    with connect(connection_keywords(HOST, free_port(), "", 0)) as client:
        lease = Lease(client, clock)
        for ask in (lease.hold, lease.release, lambda: lease.claim("1")):
            with pytest.raises(Unavailable):
                ask()


# Between two processes


@pytest.fixture
def hold(client: "redis.Redis") -> Iterator[Callable[[Callable[[Mode], Mode]], Lease]]:
    """Runs a holder whose switch is given."""
    holders: list[Leader] = []

    def begin(switch: Callable[[Mode], Mode]) -> Lease:
        lease = Lease(client)
        holders.append(
            Leader(lease, client, lambda: RUNNING, lambda: COUNTED, switch, reported, changed, lambda: CHANGES)
        )
        holders[-1].start()
        wait_until(lambda: lease.held)
        return lease

    yield begin
    for holder in holders:
        holder.close()


def test_lease_is_renewed_after_a_state_that_raises(client: "redis.Redis") -> None:
    asked: list[int] = []

    def state() -> IngestState:
        asked.append(len(asked))
        if 1 < len(asked) < 5:
            raise RuntimeError("a bug")
        return RUNNING

    lease = Lease(client)
    holder = Leader(lease, client, state, lambda: COUNTED, lambda mode: mode, reported, changed, lambda: CHANGES)
    holder.start()
    wait_until(lambda: len(asked) > 10)
    assert lease.held
    holder.close()


def test_mode_switch_runs_once_and_is_replied(
    feeds: RemoteIngest, hold: Callable[[Callable[[Mode], Mode]], Lease]
) -> None:
    switches: list[Mode] = []

    def switch(mode: Mode) -> Mode:
        switches.append(mode)
        return Mode.TEST

    async def ask() -> Mode:
        await feeds.ask()
        assert feeds.feed_states() == (
            Mode.LIVE,
            {"exchange1": FeedState.CONNECTED, "exchange2": FeedState.CONNECTING},
        )
        try:
            return await feeds.switch(Mode.LIVE)
        finally:
            await feeds.close()

    hold(switch)
    assert asyncio.run(ask()) is Mode.TEST
    assert switches == [Mode.LIVE]


def test_rule_is_changed_by_the_leader(feeds: RemoteIngest, hold: Callable[[Callable[[Mode], Mode]], Lease]) -> None:
    rule = PriceRule(symbol="BTCUSDT", level=1.0, webhook=Webhook("https://a.example/", "sixteen-characters"))

    async def ask() -> list[RuleChanged]:
        await feeds.ask()
        try:
            return [
                await feeds.change_rule(RuleChange("create", "", rule)),
                await feeds.change_rule(RuleChange("replace", "mine", rule)),
                await feeds.change_rule(RuleChange("delete", "mine")),
            ]
        finally:
            await feeds.close()

    hold(lambda mode: mode)
    made, replaced, deleted = asyncio.run(ask())
    assert (made, replaced) == (RuleChanged("made"), RuleChanged("mine"))
    assert deleted == RuleChanged("mine", "unknown_rule")


def polls(client: "redis.Redis") -> int:
    """How often commands have been polled."""
    stats = client.info("commandstats")
    return int(stats.get("cmdstat_blpop", {"calls": 0})["calls"])


def renewals(client: "redis.Redis") -> int:
    """How often a lease has been renewed."""
    return int(client.info("commandstats")["cmdstat_eval"]["calls"])


def test_commands_are_polled_only_while_another_process_follows(
    client: "redis.Redis", feeds: RemoteIngest, hold: Callable[[Callable[[Mode], Mode]], Lease]
) -> None:
    client.config_resetstat()
    lease = hold(lambda mode: mode)

    async def wait_for_renewals() -> None:
        enough = renewals(client) + 2
        await until(lambda: renewals(client) >= enough)

    async def run() -> None:
        await wait_for_renewals()
        assert polls(client) == 0
        following = asyncio.create_task(feeds.follow())
        await until(lambda: lease.is_followed)
        await until(lambda: polls(client) >= 2)
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await feeds.close()
        await until(lambda: not lease.is_followed)
        await wait_for_renewals()  # the poll under way has ended
        before = polls(client)
        await wait_for_renewals()
        assert polls(client) == before

    asyncio.run(run())


def test_sole_leader_renews_before_state_and_lease_expire(client: "redis.Redis") -> None:
    lease = Lease(client)
    leader = Leader(
        lease,
        client,
        lambda: RUNNING,
        lambda: COUNTED,
        lambda mode: mode,
        reported,
        changed,
        lambda: CHANGES,
        is_sole=True,
    )
    client.config_resetstat()
    leader.start()
    wait_until(lambda: renewals(client) >= 4)
    assert client.exists(keys.LEASE_KEY, keys.STATE_KEY) == 2
    assert lease.held
    leader.close()


def test_feeds_are_reported_on_demand(feeds: RemoteIngest, hold: Callable[[Callable[[Mode], Mode]], Lease]) -> None:
    async def ask() -> FeedsReport:
        await feeds.ask()
        try:
            return await feeds.feeds(FeedsQuery(limit=7, offset=2, exchange="exchange1"))
        finally:
            await feeds.close()

    hold(lambda mode: mode)
    assert asyncio.run(ask()) == msgspec.structs.replace(REPORTED, total=9)


def test_unknown_command_is_ignored(
    client: "redis.Redis", feeds: RemoteIngest, hold: Callable[[Callable[[Mode], Mode]], Lease]
) -> None:
    """One of a later version: it gets no reply, and the next one is executed."""
    hold(lambda mode: mode)
    for content in (b'{"what":"later"}', b"\xff", b"[]"):
        client.set(keys.command_key("odd"), content)
        client.rpush(keys.COMMANDS_KEY, "odd")

    async def ask() -> FeedsReport:
        await feeds.ask()
        try:
            return await feeds.feeds(FeedsQuery(limit=1))
        finally:
            await feeds.close()

    assert asyncio.run(ask()).total == 1
    assert client.exists(keys.reply_key("odd")) == 0


def test_counters_arrive_while_there_is_a_leader(
    feeds: RemoteIngest, hold: Callable[[Callable[[Mode], Mode]], Lease]
) -> None:
    async def ask() -> None:
        await feeds.ask()
        heard = [feeds.counters]
        hold(lambda mode: mode)
        await feeds.ask()
        heard.append(feeds.counters)
        await feeds.close()
        assert heard == [None, COUNTED]

    asyncio.run(ask())


def test_state_without_counters_of_an_older_version_is_used() -> None:
    told = encode(Published("a run", 1, 0, RUNNING, COUNTED))
    assert decode(told, Published) == Published("a run", 1, 0, RUNNING, COUNTED)
    without = msgspec.json.decode(told)
    del without["figures"]
    assert decode(msgspec.json.encode(without), Published) == Published("a run", 1, 0, RUNNING)


def test_commands_without_reply_do_not_block_polls(feeds: RemoteIngest, client: "redis.Redis", clock: Clock) -> None:
    lease = Lease(client, clock)
    assert lease.hold(published(lease))

    async def ask() -> None:
        await feeds.ask()
        switching = [asyncio.create_task(feeds.switch(Mode.LIVE)) for _ in range(150)]
        await asyncio.sleep(0.1)
        await feeds.ask()
        assert feeds.state is not None
        answers = await asyncio.gather(*switching, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}
        await feeds.close()

    asyncio.run(ask())


def test_failed_mode_switch_is_unavailable(
    feeds: RemoteIngest, hold: Callable[[Callable[[Mode], Mode]], Lease]
) -> None:
    def switch(mode: Mode) -> Mode:
        raise Unavailable("stopping")

    async def ask() -> None:
        await feeds.ask()
        try:
            await feeds.switch(Mode.LIVE)
        finally:
            await feeds.close()

    hold(switch)
    with pytest.raises(Unavailable):
        asyncio.run(ask())


def test_expired_command_is_ignored(client: "redis.Redis", hold: Callable[[Callable[[Mode], Mode]], Lease]) -> None:
    def switch(mode: Mode) -> Mode:
        raise AssertionError("too late")

    client.rpush(keys.COMMANDS_KEY, "gone")
    hold(switch)
    wait_until(lambda: not client.exists(keys.COMMANDS_KEY))
    assert not client.exists(keys.reply_key("gone"))


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


def test_late_older_state_is_ignored(feeds: RemoteIngest, client: "redis.Redis", clock: Clock) -> None:
    lease = Lease(client, clock)

    async def follow() -> None:
        following = asyncio.create_task(feeds.follow())
        lease.hold(published(lease, 2, Mode.LIVE))
        await feeds.ask()
        lease.hold(published(lease, 1, Mode.TEST))
        await feeds.ask()
        assert feeds.feed_states()[0] is Mode.LIVE
        lease.hold(published(lease, 3, Mode.TEST))
        await until(lambda: feeds.current is Mode.TEST)
        lease.release()
        await until(lambda: feeds.state is None)
        assert feeds.current is Mode.TEST
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await feeds.close()

    asyncio.run(follow())

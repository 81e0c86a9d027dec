"""Members of the cluster and the API's side of them, with a real Redis."""

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import pytest
import redis

from marketflow.alerts.alert_model import PriceRule, Webhook
from marketflow.cluster import remote_control, shard_table
from marketflow.cluster.member import Member
from marketflow.cluster.merging import merged_report, merged_state
from marketflow.cluster.messages import (
    ExchangeReport,
    FeedsQuery,
    FeedsReport,
    IngestState,
    Published,
    RuleChange,
    RuleChanged,
    SeriesReport,
    ShardState,
    decode,
    encode,
)
from marketflow.cluster.owner_states import OwnerStates
from marketflow.cluster.remote_control import RemoteIngest
from marketflow.cluster.shard_table import ALONE_LEASE_SECONDS, LEASE_SECONDS, ShardTable, connect
from marketflow.counters import Delays, ExchangeCounters, IngestCounters
from marketflow.errors import SettingsError, Unavailable
from marketflow.health import ModeUnconfirmed, ShardHealth
from marketflow.model import FeedState, HoleState, Mode
from marketflow.settings.reloading import Changes, Names
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import connection_keywords
from marketflow.tasks import background
from tests.support.proxy import Proxy
from tests.support.servers import HOST, RedisServer, wait_until

_T = TypeVar("_T")

SHARDS = ("exchange1", "exchange2")

NOTHING = Names((), (), ())
CHANGES = Changes(
    Names(("exchange2",), (), ()), NOTHING, NOTHING, Names(("exchange1",), ("BTCUSDT",), ()), ("http.port",)
)


def counted(ticks: int, exchange: str = "exchange1") -> IngestCounters:
    of_exchange = ExchangeCounters(ticks, {"malformed": 1}, 2, 3, 1_763_690_000_000 + ticks)
    return IngestCounters({exchange: of_exchange}, Delays((1.0,), (ticks, 0), 0.5), *range(8))


def series(exchange: str, symbol: str) -> SeriesReport:
    return SeriesReport(exchange, symbol, "connected", 5.5, 7, 1.0, 2.0, 3.0, 4, {})


def exchange_report(exchange: str, state: FeedState = FeedState.CONNECTED) -> ExchangeReport:
    holes = {HoleState.OPEN: 1}
    return ExchangeReport(exchange, state, "", 2.0, 1, holes, 1, None, None, None, None, None, None, ("XUSDT",))


@dataclass
class Engine:
    """An engine that keeps what the cluster asks of it."""

    mode: Mode = Mode.LIVE
    owned: frozenset[str] = frozenset()
    standby: frozenset[str] = frozenset()
    leads: bool = False
    is_assigned: bool = False
    warm: bool = True
    changes: Changes | None = None
    switches: list[Mode] = field(default_factory=list)
    rules: list[RuleChange] = field(default_factory=list)
    stuck: threading.Event | None = None
    """What a switch waits for."""

    def state(self) -> IngestState:
        states = {shard.partition("/")[0]: FeedState.CONNECTED for shard in sorted(self.owned | self.standby)}
        return IngestState(self.mode, states, cache_complete=True, archive_available=True)

    def counters(self) -> IngestCounters:
        return counted(len(self.owned))

    def shards(self) -> Mapping[str, ShardState]:
        of_standby = ShardState("warm" if self.warm else "connecting", 70)
        return dict.fromkeys(self.owned, ShardState("owner", 100)) | dict.fromkeys(self.standby, of_standby)

    def is_cut_off(self) -> bool:
        return False

    def ready(self) -> Collection[str]:
        return self.standby if self.warm else ()

    def assign(self, owned: Collection[str], standby: Collection[str], leads: bool) -> None:
        self.owned, self.standby, self.leads = frozenset(owned), frozenset(standby), leads
        self.is_assigned = True

    def switch(self, mode: Mode) -> Mode:
        if self.stuck is not None:
            self.stuck.wait()
        self.switches.append(mode)
        before, self.mode = self.mode, mode
        return before

    def change_rule(self, change: RuleChange) -> RuleChanged:
        self.rules.append(change)
        return RuleChanged(change.id or "made", "" if change.rule else "unknown_rule")

    def report(self, query: FeedsQuery) -> FeedsReport:
        """Report two series of each exchange that is owned."""
        rows = [series(exchange, symbol) for exchange in sorted(self.owned) for symbol in ("AUSDT", "BUSDT")]
        page = tuple(rows[query.offset : query.offset + query.limit])
        return FeedsReport(self.mode, tuple(map(exchange_report, sorted(self.owned))), page, len(rows))

    def reload(self) -> Changes:
        if self.changes is None:
            raise SettingsError("symbols: wrong")
        return self.changes


@pytest.fixture
def client(redis_db: RedisServer) -> Iterator["redis.Redis"]:
    with connect(connection_keywords(HOST, redis_db.port, "", 0)) as client:
        yield client


Join = Callable[..., Member]


@pytest.fixture
def join(redis_db: RedisServer) -> Iterator[Join]:
    """Starts a member of the cluster, with the rights of the delivered user; it leaves with the test."""
    members: list[Member] = []
    client = connect(redis_db.delivered_user())

    def begin(engine: Engine, takes_all: bool = False) -> Member:
        table = ShardTable(client, SHARDS, takes_all)
        assign = None if takes_all else engine.assign
        members.append(Member(table, client, engine, engine.report, engine.reload, assign))
        members[-1].start()
        return members[-1]

    yield begin
    for member in members:
        member.leave()
    client.close()


def pair(join: Join, **of_second: Any) -> tuple[Engine, Engine]:
    """Start two members, each of which owns a shard and stands by for the other one."""
    first, second = Engine(), Engine(**of_second)
    join(first)
    wait_until(lambda: first.owned == {*SHARDS})
    join(second)
    wait_until(lambda: len(first.owned) == len(second.owned) == len(first.standby) == len(second.standby) == 1)
    return first, second


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


def with_api(redis_db: RedisServer, ask: Callable[[RemoteIngest], Coroutine[Any, Any, _T]]) -> _T:
    """Run something with the API's side, which follows the members with the rights of the delivered user."""

    async def run() -> _T:
        feeds = RemoteIngest(redis_db.delivered_user(), SHARDS, Mode.TEST)
        await feeds.poll()
        try:
            async with background(feeds.follow()):
                return await ask(feeds)
        finally:
            await feeds.close()

    return asyncio.run(run())


# Members


def test_members_share_the_shards_and_one_leads(join: Join) -> None:
    first, second = pair(join)
    assert first.owned | second.owned == {*SHARDS}
    assert first.standby == second.owned
    assert (first.leads, second.leads) == (True, False)


def test_ready_standby_takes_over_from_a_member_that_leaves(client: "redis.Redis", join: Join) -> None:
    leaving, staying = Engine(), Engine()
    member = join(leaving)
    wait_until(lambda: leaving.owned)
    join(staying)
    wait_until(lambda: len(staying.owned) == len(leaving.owned) == 1)
    member.leave()
    wait_until(lambda: staying.owned == {*SHARDS} and staying.leads, timeout=1)
    assert len(leaving.owned) == 1  # it writes what it has ingested
    wait_until(lambda: client.hlen(keys.STATES_KEY) == 1)


def test_table_is_called_after_a_state_that_raises(client: "redis.Redis", join: Join) -> None:
    class Failing(Engine):
        asked = 0

        def state(self) -> IngestState:
            self.asked += 1
            if 1 < self.asked < 5:
                raise RuntimeError("a bug")
            return super().state()

    engine = Failing()
    join(engine)
    wait_until(lambda: engine.owned == {*SHARDS})


def test_member_for_which_no_shard_is_left_is_assigned_none(join: Join) -> None:
    """Else its service manager would wait for it to be ready."""
    pair(join)
    third = Engine()
    join(third)
    wait_until(lambda: third.is_assigned)
    assert (third.owned, third.standby, third.leads) == (frozenset(), frozenset(), False)


def test_member_that_starts_without_redis_ingests_all_shards(redis_db: RedisServer) -> None:
    """Also those that a reload of the settings adds, until the table says what it is to ingest."""
    first, second = Engine(), Engine()
    with (
        Proxy(redis_db.port) as proxy,
        connect(connection_keywords(HOST, redis_db.port, "", 0)) as client,
        connect(connection_keywords(HOST, proxy.port, "", 0)) as proxied,
    ):
        owner = Member(ShardTable(client, SHARDS), client, first, first.report, first.reload, first.assign)
        owner.start()
        wait_until(lambda: first.owned == {*SHARDS})
        proxy.refuse()
        table = ShardTable(proxied, SHARDS)
        alone = Member(table, proxied, second, second.report, second.reload, second.assign)
        alone.start()
        wait_until(lambda: second.owned == {*SHARDS} and second.leads)
        table.shards = (*SHARDS, "exchange3")
        wait_until(lambda: second.owned == {*SHARDS, "exchange3"})
        table.shards = SHARDS
        proxy.heal()
        wait_until(lambda: second.standby and not second.leads)
        assert first.owned | second.owned == {*SHARDS}
        for member in (owner, alone):
            member.leave()


def test_member_that_ingests_alone_goes_on_until_others_own(redis_db: RedisServer) -> None:
    """Redis is back with a table of processes that died with it: in its grace time nobody else would ingest."""

    class Recording(Engine):
        def assign(self, owned: Collection[str], standby: Collection[str], leads: bool) -> None:
            super().assign(owned, standby, leads)
            assigned.append(self.owned)

    assigned: list[frozenset[str]] = []
    engine = Recording()
    with (
        Proxy(redis_db.port) as proxy,
        connect(connection_keywords(HOST, redis_db.port, "", 0)) as client,
        connect(connection_keywords(HOST, proxy.port, "", 0)) as proxied,
    ):
        dead = ShardTable(client, SHARDS)
        wait_until(lambda: dead.hold().owned)
        proxy.refuse()
        member = Member(ShardTable(proxied, SHARDS), proxied, engine, engine.report, engine.reload, engine.assign)
        member.start()
        wait_until(lambda: engine.owned == {*SHARDS})
        at = table_of(client)["at"]
        wait_until(lambda: 1000 * client.time()[0] > at + 1000 * shard_table.LEASE_SECONDS)
        proxy.heal()
        wait_until(lambda: member._table.held.owned == {*SHARDS})
        member.leave()
    assert {*assigned} == {frozenset(SHARDS)}


def test_call_under_way_at_the_end_does_not_join_again(client: "redis.Redis", join: Join) -> None:
    class Slow(Engine):
        def counters(self) -> IngestCounters:
            calling.set()
            going.wait(10)
            return super().counters()

    calling, going = threading.Event(), threading.Event()
    going.set()
    engine = Slow()
    member = join(engine)
    wait_until(lambda: engine.owned)
    going.clear()
    calling.clear()
    calling.wait(10)
    member.leave()
    going.set()
    for thread in member._threads:
        thread.join(10)
        assert not thread.is_alive()
    assert member._table.run not in table_of(client)["members"]


def table_of(client: "redis.Redis") -> Any:
    return msgspec.json.decode(client.get(keys.SHARDS_KEY) or b'{"members":{}}')


def test_outage_of_redis_takes_nothing_from_an_owner(redis_db: RedisServer) -> None:
    engine = Engine()
    with Proxy(redis_db.port) as proxy, connect(connection_keywords(HOST, proxy.port, "", 0)) as client:
        member = Member(ShardTable(client, SHARDS), client, engine, engine.report, engine.reload, engine.assign)
        member.start()
        wait_until(lambda: engine.owned == {*SHARDS})
        proxy.refuse()
        wait_until(lambda: not member.reachable)
        assert engine.owned == {*SHARDS}
        proxy.heal()
        wait_until(lambda: member.reachable)
        assert engine.owned == {*SHARDS}
        member.leave()


def polls(client: "redis.Redis") -> int:
    """How often commands have been polled."""
    stats = client.info("commandstats")
    return int(stats.get("cmdstat_blpop", {"calls": 0})["calls"])


def calls(client: "redis.Redis") -> int:
    """How often the table has been called."""
    return int(client.info("commandstats").get("cmdstat_eval", {"calls": 0})["calls"])


def test_commands_are_polled_only_while_another_process_follows(
    client: "redis.Redis", redis_db: RedisServer, join: Join
) -> None:
    client.config_resetstat()
    engine = Engine()
    join(engine)
    wait_until(lambda: engine.owned)
    assert polls(client) == 0

    async def follow(feeds: RemoteIngest) -> None:
        await until(lambda: polls(client) >= 2)

    with_api(redis_db, follow)

    def is_quiet() -> bool:
        before, enough = polls(client), calls(client) + 3
        wait_until(lambda: calls(client) >= enough)
        return polls(client) == before

    wait_until(is_quiet)


def test_lone_member_that_takes_all_calls_once_a_second(client: "redis.Redis", join: Join) -> None:
    """The first two calls find out that it is alone, and take the longer lease."""
    client.config_resetstat()
    member = join(Engine(), takes_all=True)
    seconds, _ = client.time()
    wait_until(lambda: calls(client) >= 5)
    assert client.time()[0] - seconds >= 2
    assert member._table.held.owned == {*SHARDS}
    assert client.exists(keys.SHARDS_KEY, keys.STATES_KEY) == 2


def test_lease_is_short_while_another_process_ingests(client: "redis.Redis", join: Join) -> None:
    def lease_ms() -> int:
        return int(table_of(client)["members"].get(member._table.run, {"lease": 0})["lease"])

    member = join(Engine(), takes_all=True)
    wait_until(lambda: lease_ms() == 1000 * ALONE_LEASE_SECONDS)
    other = join(Engine())
    wait_until(lambda: lease_ms() == 1000 * LEASE_SECONDS)
    other.leave()
    wait_until(lambda: lease_ms() == 1000 * ALONE_LEASE_SECONDS)


def test_member_that_takes_all_is_assigned_nothing(join: Join) -> None:
    engine, other = Engine(), Engine()
    join(other)
    wait_until(lambda: other.owned)
    member = join(engine, takes_all=True)
    wait_until(lambda: other.standby == {*SHARDS})
    assert member._table.held.owned == {*SHARDS}
    assert engine.owned == frozenset()


def test_mode_switched_without_redis_is_adopted_by_others(client: "redis.Redis", join: Join) -> None:
    engine, other = Engine(), Engine()
    member = join(engine, takes_all=True)
    wait_until(lambda: client.get(keys.MODE_KEY) == b"live")
    join(other)
    assert member.switch(Mode.TEST) is Mode.LIVE
    wait_until(lambda: other.mode is Mode.TEST)
    assert engine.switches == [Mode.TEST]


def test_own_mode_switch_is_not_undone_by_the_table(client: "redis.Redis", join: Join) -> None:
    """While it takes, each call of the table still answers with the mode before."""

    class SlowEngine(Engine):
        def switch(self, mode: Mode) -> Mode:
            before = super().switch(mode)
            enough = calls(client) + 3

            def has_called() -> bool:
                member._call_due.set()
                return calls(client) >= enough

            wait_until(has_called)
            return before

    engine = SlowEngine()
    member = join(engine, takes_all=True)
    wait_until(lambda: client.get(keys.MODE_KEY) == b"live")
    assert member.switch(Mode.TEST) is Mode.LIVE
    wait_until(lambda: client.get(keys.MODE_KEY) == b"test")
    assert engine.switches == [Mode.TEST]


def test_second_process_that_takes_all_keeps_its_mode(client: "redis.Redis", join: Join, log: list[str]) -> None:
    first, second = Engine(), Engine(Mode.TEST)
    join(first, takes_all=True)
    wait_until(lambda: client.get(keys.MODE_KEY) == b"live")
    join(second, takes_all=True)
    wait_until(lambda: any("takes ticks into the same Redis" in line for line in log), timeout=10)
    assert client.get(keys.MODE_KEY) == b"live"
    assert first.switches == second.switches == []


# The mode


def test_mode_switch_is_confirmed_by_all_owners(redis_db: RedisServer, join: Join) -> None:
    first, second = pair(join)

    async def switch(feeds: RemoteIngest) -> tuple[Mode, Mode, float]:
        began = asyncio.get_running_loop().time()
        answers = await feeds.switch(Mode.TEST), await feeds.switch(Mode.TEST)
        return *answers, asyncio.get_running_loop().time() - began

    previous, again, seconds = with_api(redis_db, switch)
    assert (previous, again) == (Mode.LIVE, Mode.TEST)
    assert seconds < 1
    assert (first.switches, second.switches) == ([Mode.TEST], [Mode.TEST])


def test_mode_switch_waits_until_other_api_processes_adopt_it(
    redis_db: RedisServer, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_control, "FOLLOWER_SECONDS", 60.0)
    monkeypatch.setattr(remote_control, "REPLY_SECONDS", 60.0)
    pair(join)

    async def switch(feeds: RemoteIngest) -> None:
        other = RemoteIngest(redis_db.delivered_user(), SHARDS, Mode.TEST)
        await other.poll()
        await other.poll()
        switching = asyncio.create_task(feeds.switch(Mode.TEST))
        await until(lambda: feeds.current is Mode.TEST)  # all owners have confirmed it
        enough = feeds._polled_at + 2 * remote_control.POLL_SECONDS
        await until(lambda: feeds._polled_at > enough)
        assert not switching.done()
        async with background(other.follow()):
            assert await switching is Mode.LIVE
            assert other.current is Mode.TEST
        await other.close()

    with_api(redis_db, switch)


def test_mode_switch_does_not_wait_for_ended_api_processes(
    redis_db: RedisServer, client: "redis.Redis", join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_control, "FOLLOWER_SECONDS", 0.5)
    monkeypatch.setattr(remote_control, "REPLY_SECONDS", 60.0)
    pair(join)
    with_api(redis_db, until_it_answers)

    async def switch(feeds: RemoteIngest) -> None:
        assert client.hlen(keys.FOLLOWERS_KEY) == 2
        await feeds.switch(Mode.TEST)
        assert client.hlen(keys.FOLLOWERS_KEY) == 1

    with_api(redis_db, switch)


async def until_it_answers(feeds: RemoteIngest) -> None:
    await until(lambda: feeds.state)


def test_unconfirmed_mode_switch_names_shards_and_is_adopted_later(redis_db: RedisServer, join: Join) -> None:
    stuck = threading.Event()
    first, second = pair(join, stuck=stuck)

    async def switch(feeds: RemoteIngest) -> list[str]:
        with pytest.raises(ModeUnconfirmed) as caught:
            await feeds.switch(Mode.TEST)
        assert feeds.current is Mode.TEST
        assert first.mode is Mode.TEST
        stuck.set()
        await until(lambda: second.mode is Mode.TEST)
        assert await feeds.switch(Mode.TEST) is Mode.TEST
        return [*caught.value.shards]

    assert with_api(redis_db, switch) == [*second.owned]


def test_missing_ingest_process_leaves_the_mode(redis_db: RedisServer, client: "redis.Redis") -> None:
    async def switch(feeds: RemoteIngest) -> None:
        for ask in (feeds.switch(Mode.LIVE), feeds.reload(), feeds.feeds(FeedsQuery(limit=1))):
            with pytest.raises(Unavailable):
                await ask

    with_api(redis_db, switch)
    assert client.get(keys.MODE_KEY) is None


# Commands


def test_rule_is_changed_by_the_leader_alone(redis_db: RedisServer, join: Join) -> None:
    first, second = pair(join)
    rule = PriceRule(symbol="BTCUSDT", level=1.0, webhook=Webhook("https://a.example/", "sixteen-characters"))

    async def change(feeds: RemoteIngest) -> list[RuleChanged]:
        return [
            await feeds.change_rule(RuleChange("create", "", rule)),
            await feeds.change_rule(RuleChange("replace", "mine", rule)),
            await feeds.change_rule(RuleChange("delete", "mine")),
        ]

    made, replaced, deleted = with_api(redis_db, change)
    assert (made, replaced, deleted) == (
        RuleChanged("made"),
        RuleChanged("mine"),
        RuleChanged("mine", "unknown_rule"),
    )
    assert (len(first.rules), len(second.rules)) == (3, 0)


def test_all_members_reload_and_one_answer_is_returned(redis_db: RedisServer, join: Join) -> None:
    other = msgspec.structs.replace(CHANGES, needs_restart=("redis.port",))
    first, second = pair(join, changes=other)
    first.changes = CHANGES

    async def reload(feeds: RemoteIngest) -> Changes:
        changes = await feeds.reload()
        second.changes = None
        with pytest.raises(SettingsError, match=r"^\S+/\d+, unlike others: symbols: wrong$"):
            await feeds.reload()
        first.changes = None
        with pytest.raises(SettingsError, match=r"^symbols: wrong$"):
            await feeds.reload()
        return changes

    assert with_api(redis_db, reload) == msgspec.structs.replace(CHANGES, needs_restart=("http.port", "redis.port"))


@pytest.mark.parametrize(("offset", "limit"), [(0, 10), (1, 2), (3, 5), (4, 1)])
def test_feeds_of_all_owners_are_one_report(redis_db: RedisServer, join: Join, offset: int, limit: int) -> None:
    pair(join)

    async def ask(feeds: RemoteIngest) -> FeedsReport:
        return await feeds.feeds(FeedsQuery(limit, offset))

    report = with_api(redis_db, ask)
    rows = [(exchange, symbol) for exchange in SHARDS for symbol in ("AUSDT", "BUSDT")]
    assert [(each.exchange, each.symbol) for each in report.series] == rows[offset : offset + limit]
    assert [each.exchange for each in report.exchanges] == [*SHARDS]
    assert report.total == 4


def test_feeds_that_two_processes_ingest_are_counted_once(redis_db: RedisServer, join: Join) -> None:
    members = [join(Engine(owned=frozenset(SHARDS)), takes_all=True) for _ in range(2)]

    async def ask(feeds: RemoteIngest) -> FeedsReport:
        await until(lambda: all(len(feeds._known()) == len(each._table.table.members) == 2 for each in members))
        return await feeds.feeds(FeedsQuery(limit=10))

    report = with_api(redis_db, ask)
    assert (report.total, report.exchanges) == (4, tuple(map(exchange_report, SHARDS)))


def test_expired_or_unknown_commands_are_ignored(redis_db: RedisServer, client: "redis.Redis", join: Join) -> None:
    """Those of a later version get no reply, and the next one is executed."""
    engine = Engine()
    run = join(engine)._table.run
    wait_until(lambda: engine.owned)
    for content in (b'{"what":"later"}', b"\xff", b"[]", None):
        if content is not None:
            client.set(keys.command_key("odd"), content)
        client.rpush(keys.commands_key(run), "odd")

    async def ask(feeds: RemoteIngest) -> int:
        return (await feeds.feeds(FeedsQuery(limit=1))).total

    assert with_api(redis_db, ask) == 4
    assert client.exists(keys.reply_key("odd")) == 0


def test_commands_without_reply_do_not_block_polls(
    redis_db: RedisServer, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_table, "LEASE_SECONDS", 10)
    table = ShardTable(client, SHARDS)
    shards = dict.fromkeys(SHARDS, ShardState("owner"))
    table.hold((), Published(table.run, 1, 0, Engine().state(), None, shards))

    async def ask(feeds: RemoteIngest) -> None:
        asking = [asyncio.create_task(feeds.feeds(FeedsQuery(limit))) for limit in range(150)]
        await asyncio.sleep(0.1)
        await feeds.poll()
        assert feeds.state is not None
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}

    with_api(redis_db, ask)


# States


def test_counters_and_states_of_all_owners_are_merged(redis_db: RedisServer, join: Join) -> None:
    async def ask(feeds: RemoteIngest) -> None:
        assert (feeds.counters, feeds.state, feeds.shards()) == (None, None, ())
        first, second = await asyncio.to_thread(pair, join)
        assert first.owned | second.owned == {*SHARDS}
        await until(lambda: {shard.standby_state for shard in feeds.shards()} == {"warm"})
        await until(lambda: feeds.counters is not None and feeds.counters.exchanges["exchange1"].ticks == 1)
        await until(lambda: feeds.counters is not None and feeds.counters.tick_to_cache.counts == (2, 0))
        counters, state = feeds.counters, feeds.state
        assert counters is not None
        assert state is not None
        assert counters.rows_written == 2 * counted(0).rows_written
        assert counters.exchanges["exchange1"] == counted(1).exchanges["exchange1"]  # its owner's alone
        assert counters.shards_owned == counters.shards_standby == dict.fromkeys(SHARDS, True)
        assert feeds.feed_states() == (Mode.LIVE, dict.fromkeys(SHARDS, FeedState.CONNECTED))
        assert [(each.shard, each.lag_ms) for each in feeds.shards()] == [(shard, 30) for shard in SHARDS]
        assert len({each.owner for each in feeds.shards()} | {each.standby for each in feeds.shards()}) == 1  # one test

    with_api(redis_db, ask)


def test_stores_are_as_owners_find_them(redis_db: RedisServer, client: "redis.Redis", join: Join) -> None:
    class Standby(Engine):
        def state(self) -> IngestState:
            return msgspec.structs.replace(super().state(), archive_available=bool(self.owned))

    owner = Engine()
    join(owner)
    wait_until(lambda: owner.owned == {*SHARDS})
    standby = Standby(warm=False)
    member = join(standby)
    wait_until(lambda: standby.standby == {*SHARDS})

    async def ask(feeds: RemoteIngest) -> None:
        await until(lambda: {shard.standby_state for shard in feeds.shards()} == {"connecting"})
        await until(lambda: client.hexists(keys.STATES_KEY, member._table.run))
        await feeds.poll()
        assert feeds.last_state.archive_available

    with_api(redis_db, ask)


def test_dead_owner_is_a_takeover_and_its_standby_the_word(
    redis_db: RedisServer, client: "redis.Redis", join: Join
) -> None:
    dead = ShardTable(client, SHARDS)
    dead.hold()
    wait_until(lambda: dead.hold().owned)
    dead.hold((), Published(dead.run, 1, 0, IngestState(Mode.LIVE, {}, True, False)))
    engine = Engine(warm=False)
    join(engine)
    wait_until(lambda: dead.hold().owned and engine.standby == {*SHARDS})

    async def ask(feeds: RemoteIngest) -> None:
        state = feeds.state
        assert state is not None
        assert not state.archive_available
        assert feeds.shards()[0] == ShardHealth(
            "exchange1", dead.run.rpartition("/")[0], dead.run.rpartition("/")[0], "connecting", None
        )
        await until(lambda: engine.owned == {*SHARDS})
        await until(lambda: feeds.shards() and feeds.shards()[0].standby_state == "none")
        await until(lambda: feeds.state is not None and feeds.state.archive_available)
        assert feeds.counters is not None
        assert feeds.counters.shard_takeovers == 2

    with_api(redis_db, ask)


@pytest.mark.parametrize("state", FeedState)
def test_exchange_in_parts_is_as_its_worst_part(state: FeedState) -> None:
    parts = [IngestState(Mode.LIVE, {"exchange1": each}, True, True) for each in (FeedState.CONNECTED, state)]
    merged = merged_state(Mode.LIVE, parts, {"exchange1": parts, "exchange2": []})
    is_better = state is FeedState.GENERATED
    assert merged.exchanges == {"exchange1": FeedState.CONNECTED if is_better else state}


def test_reports_of_an_exchange_in_parts_are_one() -> None:
    parts = [exchange_report("exchange1"), exchange_report("exchange1", FeedState.HALTED)]
    rows = [series("exchange1", "BUSDT"), series("exchange1", "AUSDT")]
    reports = [FeedsReport(Mode.LIVE, (part,), (row,), 1) for part, row in zip(parts, rows, strict=True)]
    merged = merged_report(FeedsQuery(limit=5), reports, SHARDS)
    assert [each.symbol for each in merged.series] == ["AUSDT", "BUSDT"]
    (exchange,) = merged.exchanges
    assert (exchange.state, exchange.ticks_per_second, exchange.reconnects) == (FeedState.HALTED, 4.0, 2)
    assert (exchange.doubles, exchange.holes, exchange.absent) == (2, {HoleState.OPEN: 2}, ("XUSDT",))


def test_state_without_counters_of_an_older_version_is_used() -> None:
    told = encode(Published("a run", 1, 0, Engine().state(), counted(1), {"exchange1": ShardState("owner")}))
    assert decode(told, Published) == Published(
        "a run", 1, 0, Engine().state(), counted(1), {"exchange1": ShardState("owner")}
    )
    without = msgspec.json.decode(told)
    del without["counters"], without["shards"]
    assert decode(msgspec.json.encode(without), Published) == Published("a run", 1, 0, Engine().state())


def test_late_older_state_is_ignored(redis_db: RedisServer, client: "redis.Redis") -> None:
    table = ShardTable(client, SHARDS)

    def publish(number: int, mode: Mode) -> None:
        table.hold((), Published(table.run, number, 0, IngestState(mode, {}, True, True)))

    async def follow(feeds: RemoteIngest) -> None:
        publish(2, Mode.LIVE)
        await feeds.poll()
        publish(1, Mode.TEST)
        await feeds.poll()
        assert feeds.feed_states()[0] is Mode.LIVE
        publish(3, Mode.TEST)
        await until(lambda: feeds.current is Mode.TEST)
        table.hold(leaving=True)
        await until(lambda: feeds.state is None)
        assert feeds.current is Mode.TEST

    with_api(redis_db, follow)


def test_owners_have_written_once_each_says_so_twice(redis_db: RedisServer, join: Join) -> None:
    owners = OwnerStates(connection_keywords(HOST, redis_db.port, "", 0), lambda: (Mode.TEST, {}))
    with closing(owners):
        assert not owners.have_written(), "an empty Redis has no table"
        join(Engine())
        wait_until(owners.have_written)
        owners.reset_reports()
        assert not owners.have_written()
        wait_until(owners.have_written)

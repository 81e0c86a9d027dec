"""The shard table, with a real Redis and a server time that the test sets."""

import heapq
import itertools
import json
import random
from collections.abc import Iterator

import pytest
import redis

from marketflow.cluster import shard_table
from marketflow.cluster.messages import IngestState, Published
from marketflow.cluster.shard_table import (
    GRACE_SECONDS,
    LAPSED_LEASE_SECONDS,
    LAPSED_SECONDS,
    LEASE_SECONDS,
    MOST_SILENCES,
    Assignment,
    ShardTable,
    connect,
)
from marketflow.errors import Unavailable
from marketflow.model import Mode
from marketflow.settings.shards import LEAD
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import connection_keywords
from tests.support.servers import HOST, RedisServer, free_port

SHARDS = ("exchange1", "exchange2", "exchange3")

LEASE_MS, GRACE_MS, CALL_MS = round(LEASE_SECONDS * 1000), round(GRACE_SECONDS * 1000), 250
LAPSED_MS, LAPSED_LEASE_MS = round(LAPSED_SECONDS * 1000), round(LAPSED_LEASE_SECONDS * 1000)

BALANCED_MS = 2000
"""How long after a join or a stop loads may differ by more than one, where a standby is ready within READY_MS."""

READY_MS = 600


class Clock:
    """The time of the server, in Unix ms."""

    def __init__(self) -> None:
        self.now = 1_763_690_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(redis_db: RedisServer) -> Iterator["redis.Redis"]:
    with connect(connection_keywords(HOST, redis_db.port, "", 0)) as client:
        yield client


def table(client: "redis.Redis", clock: Clock, shards: tuple[str, ...] = SHARDS, takes_all: bool = False) -> ShardTable:
    return ShardTable(client, shards, takes_all, now=clock)


def state(mode: Mode) -> Published:
    return Published("", 1, 0, IngestState(mode, {}, True, True))


def hold_for(clock: Clock, milliseconds: int, *tables: ShardTable, ready: bool = True) -> list[Assignment]:
    """Call each table at its intervals for that long; return the last answers."""
    answers: list[Assignment] = []
    for _ in range(0, milliseconds, CALL_MS):
        clock.now += CALL_MS
        answers = [each.hold(SHARDS if ready else ()) for each in tables]
    return answers


def started(client: "redis.Redis", clock: Clock, count: int) -> list[ShardTable]:
    """Start that many processes, one after the other, and let them balance."""
    tables = []
    for _ in range(count):
        tables.append(table(client, clock))
        hold_for(clock, BALANCED_MS, *tables)
    return tables


def test_first_process_owns_and_leads_after_grace(client: "redis.Redis", clock: Clock) -> None:
    first = table(client, clock)
    assert first.hold().owned == frozenset()
    clock.now += GRACE_MS - 1
    assert first.hold().owned == frozenset()
    clock.now += 1
    held = first.hold()
    assert (held.owned, held.standby, held.leads) == (frozenset(SHARDS), frozenset(), True)


def test_two_processes_stand_by_for_each_other(client: "redis.Redis", clock: Clock) -> None:
    one, other = hold_for(clock, CALL_MS, *started(client, clock, 2))
    assert sorted((len(one.owned), len(other.owned))) == [1, 2]
    assert (one.standby, other.standby) == (other.owned, one.owned)
    assert one.owned | other.owned == frozenset(SHARDS)
    assert one.leads != other.leads


def test_ownership_moves_only_to_a_ready_standby(client: "redis.Redis", clock: Clock) -> None:
    (first,) = started(client, clock, 1)
    second = table(client, clock)
    held, waiting = hold_for(clock, 5000, first, second, ready=False)
    assert (held.owned, waiting.standby) == (frozenset(SHARDS), frozenset(SHARDS))
    (moved,) = second.hold(SHARDS).owned
    assert moved in second.hold(()).owned
    given = first.hold()
    assert moved in given.standby
    assert given.epochs[moved] > held.epochs[moved]


def test_standby_takes_over_when_the_lease_expires(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    hold_for(clock, LEASE_MS - CALL_MS, second)
    clock.now += CALL_MS - 1
    before = second.hold()
    assert len(before.owned) < len(SHARDS)
    assert second.call_again_seconds == pytest.approx(0.002)
    clock.now += 1
    after = second.hold()
    assert (after.owned, after.leads) == (frozenset(SHARDS), True)
    assert all(after.epochs[shard] > before.epochs[shard] for shard in before.standby)
    # Frozen until now, it gets nothing back but the part of a standby.
    thawed = first.hold()
    assert (thawed.owned, thawed.standby, thawed.leads) == (frozenset(), frozenset(SHARDS), False)
    kept, _ = hold_for(clock, LAPSED_MS - CALL_MS, first, second)
    assert (kept.owned, kept.standby, first.has_lapsed) == (frozenset(), frozenset(SHARDS), True)
    back, _ = hold_for(clock, BALANCED_MS, first, second)
    assert (len(back.owned), first.has_lapsed) == (1, False)


def test_process_that_lapses_becomes_no_owner_where_another_can(client: "redis.Redis", clock: Clock) -> None:
    """It remains a standby."""
    first, second, third = started(client, clock, 3)
    hold_for(clock, LEASE_MS, first, second)
    third.hold(SHARDS)
    *owners, lapsed = hold_for(clock, LAPSED_MS // 2, first, second, third)
    assert (lapsed.owned, len(lapsed.standby), lapsed.leads) == (frozenset(), 1, False)
    assert sorted(len(each.owned) for each in owners) == [1, 2]
    other, spare = hold_for(clock, LEASE_MS + CALL_MS, second, third)  # the first one is killed
    assert other.owned | spare.owned == frozenset(SHARDS)
    assert other.standby | spare.standby == frozenset(SHARDS)
    kept, back = hold_for(clock, LAPSED_MS // 2 + BALANCED_MS, second, third)
    assert sorted((len(kept.owned), len(back.owned))) == [1, 2]


def test_process_that_lapses_has_a_longer_lease_for_a_while(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    hold_for(clock, LEASE_MS, second)
    first.hold(SHARDS)
    for _ in range(5):
        hold_for(clock, LAPSED_LEASE_MS - CALL_MS, second)
        assert first.run in second.table.members
        clock.now += CALL_MS - 1
        first.hold(SHARDS)
        assert first.has_lapsed
    hold_for(clock, LAPSED_MS + CALL_MS, first, second)
    hold_for(clock, LEASE_MS, second)
    assert first.run not in second.table.members


@pytest.mark.parametrize("milliseconds", [LEASE_MS - CALL_MS + 100, LEASE_MS + CALL_MS, LAPSED_LEASE_MS - CALL_MS])
@pytest.mark.parametrize("has_lapsed", [False, True])
def test_silence_of_the_table_replaces_no_process(
    client: "redis.Redis", clock: Clock, has_lapsed: bool, milliseconds: int
) -> None:
    """As in an outage of Redis: no process calls, whether its lease is LEASE_SECONDS or LAPSED_LEASE_SECONDS."""
    first, *others = started(client, clock, 3)
    if has_lapsed:
        hold_for(clock, LEASE_MS, *others)
    hold_for(clock, BALANCED_MS, first, *others)
    before = hold_for(clock, 5000, *others, first)
    clock.now += milliseconds
    first.hold(SHARDS)
    after = hold_for(clock, 2 * GRACE_MS, *others, first)
    assert [each[:3] for each in after] == [each[:3] for each in before]
    assert [each.has_lapsed for each in (*others, first)] == [False, False, has_lapsed]


@pytest.mark.parametrize("milliseconds", [LEASE_MS + 100, LEASE_MS + GRACE_MS + 100, 5 * LEASE_MS])
def test_process_that_calls_rarely_replaces_one_that_is_killed(
    client: "redis.Redis", clock: Clock, milliseconds: int
) -> None:
    """It is the only one left: between its calls the table is as silent as in an outage of Redis."""
    _, second = started(client, clock, 2)
    for _ in range(MOST_SILENCES + 1):
        clock.now += milliseconds
        second.hold(SHARDS)
    assert second.held.owned == frozenset(SHARDS)


@pytest.mark.parametrize("milliseconds", [LEASE_MS + 100, LEASE_MS + GRACE_MS + 100, 5 * LEASE_MS])
def test_first_process_that_calls_rarely_becomes_the_owner(
    client: "redis.Redis", clock: Clock, milliseconds: int
) -> None:
    first = table(client, clock)
    for _ in range(MOST_SILENCES + 1):
        first.hold(SHARDS)
        clock.now += milliseconds
    assert (first.held.owned, first.held.leads) == (frozenset(SHARDS), True)


def test_silences_that_follow_each_other_replace_no_process(client: "redis.Redis", clock: Clock) -> None:
    """All processes are suspended most of the time; those that wake up last are not replaced."""
    first, *others = started(client, clock, 3)
    before = hold_for(clock, 5000, *others, first)
    for _ in range(MOST_SILENCES - 1):
        clock.now += 2 * LEASE_MS
        assert first.hold(SHARDS)[:3] == before[-1][:3]
    after = hold_for(clock, 2 * GRACE_MS, *others, first)
    assert [each[:3] for each in after] == [each[:3] for each in before]


@pytest.mark.parametrize("milliseconds", [LEASE_MS - 100, LEASE_MS + CALL_MS, 3 * LEASE_MS])
def test_silences_for_minutes_replace_none_that_calls_now_and_then(
    client: "redis.Redis", clock: Clock, milliseconds: int
) -> None:
    tables = started(client, clock, 3)
    before = hold_for(clock, 5000, *tables)
    for number in range(5 * MOST_SILENCES):
        clock.now += milliseconds
        assert tables[number % 3].hold(SHARDS)[:3] == before[number % 3][:3]
    assert not any(each.has_lapsed for each in tables)


@pytest.mark.parametrize("seed", range(5))
def test_processes_short_of_cpu_do_not_pass_shards_to_and_fro(client: "redis.Redis", clock: Clock, seed: int) -> None:
    """A takeover costs CPU: without damping, processes that lapse now and then do so again because of it."""
    cluster = Cluster(client, clock, seed, shards=10)
    for _ in range(3):
        cluster.join()
    cluster.run_for(2 * BALANCED_MS)
    changes = cluster.owner_changes
    for process in cluster.processes:
        process.late_ms = 2 * LEASE_MS
    cluster.run_for(180_000)
    assert cluster.owner_changes - changes <= 3 * len(cluster.shards)
    for process in cluster.processes:
        process.late_ms = 0
    cluster.run_for(2 * LEASE_MS + CALL_MS)  # the last late calls
    cluster.run_for(LAPSED_MS + BALANCED_MS)
    cluster.assert_balanced()


def test_owner_that_is_cut_off_is_replaced_by_a_ready_standby(client: "redis.Redis", clock: Clock) -> None:
    """It is the standby then. One that cannot reach all of Redis either is no replacement."""
    first, second = started(client, clock, 2)
    if not first.hold().leads:
        first, second = second, first
    second.hold(ready=(), cut_off=True)
    held = first.hold(cut_off=True)
    assert held.owned
    assert held.leads
    taken = second.hold(ready=SHARDS)
    assert (taken.owned, taken.leads) == (frozenset(SHARDS), True)
    given = first.hold(cut_off=True)
    assert (given.owned, given.standby, given.leads) == (frozenset(), frozenset(SHARDS), False)
    assert all(taken.epochs[shard] > held.epochs[shard] for shard in held.owned)
    for _ in range(0, BALANCED_MS, CALL_MS):
        clock.now += CALL_MS
        first.hold(ready=(), cut_off=True)
        second.hold(SHARDS)
    assert second.hold(SHARDS).owned == frozenset(SHARDS)
    back, kept = hold_for(clock, BALANCED_MS, first, second)
    assert sorted((len(back.owned), len(kept.owned))) == [1, 2]


def test_stopping_process_is_replaced_at_once(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    first.hold(leaving=True)
    held = second.hold()
    assert (held.owned, held.leads, {*second.table.members}) == (frozenset(SHARDS), True, {second.run})
    assert second.table.takeovers == 0  # it counts owners that have died, not those that stop
    second.hold(leaving=True)
    third = table(client, clock)
    clock.now += 60_000
    assert third.hold().owned == frozenset(SHARDS)  # released by all: there is nobody to wait for


def test_emptied_redis_changes_no_owner(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    before = [first.hold(), second.hold()]
    for order in ((first, second), (second, first)):
        client.flushall()
        newcomer = table(client, clock)
        for _ in range(2 * (LEASE_MS + GRACE_MS) // CALL_MS):
            clock.now += CALL_MS
            newcomer.hold()
            held = {each: each.hold() for each in order}
            assert [held[first].owned, held[second].owned] == [each.owned for each in before]
        newcomer.hold(leaving=True)
        assert [first.hold(), second.hold()] == before


def test_standby_of_an_emptied_redis_replaces_its_owner_after_grace(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    theirs = first.hold().owned
    client.flushall()
    assert not second.hold().owned & theirs
    clock.now += GRACE_MS
    assert second.hold().owned == frozenset(SHARDS)


def test_redis_outage_ends_without_a_change_of_owner(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    before = [first.hold(), second.hold()]
    clock.now += 60_000
    assert [second.hold(), first.hold()] == before[::-1]
    assert hold_for(clock, 5000, second, first) == before[::-1]


def test_older_table_yields_to_later_epochs(client: "redis.Redis", clock: Clock) -> None:
    """A replica that was promoted lacks the last changes, here the one that made the second process an owner."""
    first = table(client, clock)
    hold_for(clock, BALANCED_MS, first)
    older = client.dump(keys.SHARDS_KEY)
    second = table(client, clock)
    hold_for(clock, BALANCED_MS, first, second)
    before = [first.hold(SHARDS), second.hold(SHARDS)]
    assert older is not None
    client.restore(keys.SHARDS_KEY, 0, older, replace=True)
    assert [first.hold(SHARDS).owned, second.hold(SHARDS).owned] == [each.owned for each in before]
    after = hold_for(clock, BALANCED_MS, first, second)
    assert [each.owned for each in after] == [each.owned for each in before]


def test_clock_set_back_keeps_owners_and_still_replaces_the_dead(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    before = [first.hold(), second.hold()]
    clock.now -= 3_600_000
    assert [first.hold(), second.hold()] == before
    (after,) = hold_for(clock, LEASE_MS, second)
    assert after.owned == frozenset(SHARDS)
    assert all(after.epochs[shard] > before[1].epochs[shard] for shard in before[1].standby)


def test_process_that_ingests_everything_becomes_the_owner(client: "redis.Redis", clock: Clock) -> None:
    (first,) = started(client, clock, 1)
    all_of_them, again = table(client, clock, takes_all=True), table(client, clock, takes_all=True)
    held = all_of_them.hold()
    assert (held.owned, held.leads) == (frozenset(SHARDS), True)
    assert first.hold().standby == frozenset(SHARDS)
    assert again.hold().owned == frozenset()
    assert [each.owned for each in hold_for(clock, 5000, again, first, all_of_them)] == [
        frozenset(),
        frozenset(),
        frozenset(SHARDS),
    ]


def test_changed_settings_add_and_remove_shards(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    first.shards = second.shards = ("exchange1", "exchange4")
    one, other = hold_for(clock, BALANCED_MS, first, second)
    assert one.owned | other.owned == {"exchange1", "exchange4"}
    assert set(first.table.rows) == {"exchange1", "exchange4", LEAD}
    second.shards = ("exchange1",)
    assert "exchange4" in hold_for(clock, CALL_MS, second, first)[1].owned
    assert first.table.rows["exchange4"].standby is None


def test_mode_of_a_fresh_start_is_the_configured_one(client: "redis.Redis", clock: Clock) -> None:
    first, second = table(client, clock), table(client, clock)
    assert first.hold((), state(Mode.LIVE)).mode is None
    clock.now += GRACE_MS
    assert first.hold((), state(Mode.LIVE)).mode is Mode.LIVE
    assert second.hold((), state(Mode.TEST)).mode is Mode.LIVE
    client.set(keys.MODE_KEY, "test")
    assert first.hold((), state(Mode.LIVE)).mode is Mode.TEST
    client.flushall()
    assert first.hold((), state(Mode.TEST)).mode is Mode.TEST  # an owner knows it
    first.hold(leaving=True)
    second.hold(leaving=True)
    clock.now += 60_000
    assert table(client, clock).hold((), state(Mode.LIVE)).mode is Mode.LIVE


def test_mode_that_a_process_switched_itself_is_set(client: "redis.Redis", clock: Clock) -> None:
    first, second = started(client, clock, 2)
    first.hold((), state(Mode.LIVE), Mode.LIVE)
    assert second.hold((), state(Mode.TEST)).mode is Mode.LIVE


def test_all_keys_of_the_table_expire(client: "redis.Redis", clock: Clock) -> None:
    first = table(client, clock)
    first.hold((), state(Mode.LIVE))
    clock.now += GRACE_MS
    first.hold((), state(Mode.LIVE))
    names = {keys.SHARDS_KEY, keys.MODE_KEY, keys.STATES_KEY}
    assert {*client.keys("*")} == {name.encode() for name in names}
    assert [name for name in names if client.ttl(name) == -1] == []
    first.hold(leaving=True)
    assert client.exists(keys.STATES_KEY) == 0


def test_server_time_decides_without_a_clock_of_the_test(client: "redis.Redis") -> None:
    first = ShardTable(client, SHARDS)
    first.hold()
    seconds, _ = client.time()
    at = json.loads(client.get(keys.SHARDS_KEY) or "{}")["at"]
    assert abs(at - 1000 * seconds) < 60_000


def test_unreachable_redis_makes_the_table_unavailable(clock: Clock) -> None:
    with connect(connection_keywords(HOST, free_port(), "", 0)) as client:
        for leaving in (False, True):
            with pytest.raises(Unavailable):
                table(client, clock).hold(leaving=leaving)


# Many processes, at random


class Process:
    """An ingest process: calls the table at its intervals, and is ready for a shard some time after it was given it."""

    def __init__(self, client: "redis.Redis", clock: Clock, shards: tuple[str, ...], dice: random.Random) -> None:
        self.table = table(client, clock, shards)
        self._clock = clock
        self._dice = dice
        self._ready_at: dict[str, int] = {}
        self.held = Assignment(frozenset(), frozenset(), False, {}, None)
        self.frozen_until = 0
        self.late_ms = 0
        """By how much it calls late, at most."""

    def call(self) -> int:
        """Call the table; return when to call again."""
        now = self._clock()
        ready = [shard for shard, at in self._ready_at.items() if at <= now]
        self.held = self.table.hold(ready)
        assert not self.held.owned & self.held.standby
        connected = self.held.owned | self.held.standby
        self._ready_at = {
            shard: self._ready_at.get(shard, now + self._dice.randrange(READY_MS)) for shard in sorted(connected)
        }
        return now + round(self.table.call_again_seconds * 1000) + self._dice.randrange(10 + self.late_ms)


class Cluster:
    """Processes that join, leave, die and freeze on one Redis, which may be emptied or come back with older data."""

    def __init__(self, client: "redis.Redis", clock: Clock, seed: int, shards: int | None = None) -> None:
        self.dice = random.Random(seed)
        self.shards = tuple(f"exchange{n}" for n in range(1, (shards or self.dice.randrange(1, 10)) + 1))
        self.owner_changes = 0
        self._client, self._clock = client, clock
        self._numbers = itertools.count()
        self.processes: list[Process] = []
        self._due: list[tuple[int, int, Process]] = []
        self._older: bytes | None = None

    def run_for(self, milliseconds: int) -> None:
        """Let every process call the table when it is due."""
        until = self._clock.now + milliseconds
        while self._due and self._due[0][0] <= until:
            at, _, process = heapq.heappop(self._due)
            if process in self.processes:
                self._clock.now = max(self._clock.now, at)
                before = process.held.owned
                self._plan(process, process.frozen_until if process.frozen_until > at else process.call())
                self.owner_changes += len(process.held.owned - before)
        self._clock.now = until

    def _plan(self, process: Process, at: int) -> None:
        heapq.heappush(self._due, (at, next(self._numbers), process))

    def join(self) -> None:
        """Start a process."""
        self.processes.append(Process(self._client, self._clock, self.shards, self.dice))
        self._plan(self.processes[-1], self._clock.now)

    def leave(self) -> None:
        """Stop a process."""
        self._any().table.hold(leaving=True)
        self.processes.remove(self._last)

    def die(self) -> None:
        """Kill a process."""
        self.processes.remove(self._any())

    def freeze(self) -> None:
        """Freeze a process for up to twice its lease."""
        self._any().frozen_until = self._clock.now + self.dice.randrange(2 * LEASE_MS)

    def empty(self) -> None:
        """Empty Redis."""
        self._client.flushall()

    def save(self) -> None:
        """Remember the table for `roll_back`."""
        self._older = self._client.dump(keys.SHARDS_KEY)

    def roll_back(self) -> None:
        """Bring Redis back with the table that was saved last."""
        if self._older is not None:
            self._client.restore(keys.SHARDS_KEY, 0, self._older, replace=True)

    def outage(self) -> None:
        """Let time pass in which nobody can call."""
        self._clock.now += self.dice.randrange(3 * LEASE_MS)

    def _any(self) -> Process:
        self._last = self.dice.choice(self.processes)
        return self._last

    # What has to hold

    def assert_owned(self) -> None:
        """Each shard has one owner, by the table's answers to all processes, and the lead has one."""
        owned = sorted(shard for process in self.processes for shard in process.held.owned)
        assert owned == sorted(self.shards)
        assert sum(process.held.leads for process in self.processes) == 1

    def assert_balanced(self) -> None:
        """Each shard has a standby if there can be one, and loads of either kind differ by one at most."""
        self.assert_owned()
        stood = sorted(shard for process in self.processes for shard in process.held.standby)
        assert stood == (sorted(self.shards) if len(self.processes) > 1 else [])
        for loads in (
            [len(process.held.owned) for process in self.processes],
            [len(process.held.standby) for process in self.processes],
        ):
            assert max(loads) - min(loads) <= 1, loads


@pytest.mark.parametrize("seed", range(25))
def test_shards_stay_owned_and_balanced_through_faults(
    client: "redis.Redis", clock: Clock, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_table, "LAPSED_SECONDS", BALANCED_MS / 1000)
    cluster = Cluster(client, clock, seed)
    cluster.join()
    cluster.run_for(2 * GRACE_MS)
    for _ in range(12):
        for _ in range(cluster.dice.randrange(1, 4)):
            few = len(cluster.processes) < 2
            choices = [cluster.join] if few else [cluster.leave, cluster.die, cluster.freeze]
            if len(cluster.processes) < 6:
                choices.append(cluster.join)
            cluster.dice.choice([*choices, cluster.empty, cluster.save, cluster.roll_back, cluster.outage])()
            cluster.run_for(cluster.dice.randrange(600))
        thawed = max((process.frozen_until - clock() for process in cluster.processes), default=0)
        cluster.run_for(max(thawed, 0) + LEASE_MS + GRACE_MS + 2 * CALL_MS)
        cluster.assert_owned()
        cluster.run_for(2 * BALANCED_MS)  # the first for those that have lapsed
        cluster.assert_balanced()
        before = [process.held for process in cluster.processes]
        cluster.run_for(5000)
        assert [process.held for process in cluster.processes] == before


@pytest.mark.parametrize("count", [1, 2, 4])
def test_join_and_stop_are_balanced_within_two_seconds(client: "redis.Redis", clock: Clock, count: int) -> None:
    for seed in range(5):
        client.flushall()
        cluster = Cluster(client, clock, seed)
        for _ in range(count):
            cluster.join()
        cluster.run_for(2 * BALANCED_MS)
        cluster.assert_balanced()
        cluster.join()
        cluster.run_for(BALANCED_MS)
        cluster.assert_balanced()
        cluster.leave()
        cluster.run_for(CALL_MS + 10)
        cluster.assert_owned()
        cluster.run_for(BALANCED_MS)
        cluster.assert_balanced()

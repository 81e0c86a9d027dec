"""The shard table: which ingest process owns which shard, and which one is its standby.

One value in Redis and one script, which each ingest process calls several times a second: it renews the lease of the
process, replaces processes whose lease has expired, and spreads the shards evenly. The server's time decides. There is
no fencing: a process that has lost a shard unnoticed may write a little longer, which is harmless because each store
keeps the more complete candle.

If nobody has called it for so long that a lease may have expired, the table proves nothing: Redis was down or emptied,
or is back with older data. So for GRACE_SECONDS no process is replaced and no shard assigned; processes assert what
they hold, and the later epoch wins.

A process that calls again after its lease has expired is short of CPU. A handover costs CPU, so it would soon lose its
shards again. For LAPSED_SECONDS it has a longer lease, and becomes the owner of no shard that another process can own.
It remains a standby, which costs less, and its feeds stay connected: after a suspension it may have ticks that no other
process has.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple, cast
from uuid import uuid4

import msgspec
import redis

from marketflow.cluster.messages import Published, decode, encode, mode_of
from marketflow.errors import Unavailable
from marketflow.model import Mode
from marketflow.settings.shards import LEAD
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import sync_client

LEASE_SECONDS = 1.0
"""How long a process holds its shards after a call of the table."""

GRACE_SECONDS = 1.0
"""How long processes may assert what they hold, after a table was lost: four calls of each."""

MOST_SILENCES = 20
"""How many silences of the table (no call while a lease may expire) that follow each other protect a process that has
not called meanwhile, and how many of them delay the assignment of shards."""

CALL_SECONDS = 0.25
"""How often the table is called."""

ALONE_CALL_SECONDS = 2.0
"""How often a process that takes all shards calls it while there is no other process: at CALL_SECONDS, this was half of
the CPU of a process without ticks. It notices another process at most this much later."""

ALONE_LEASE_SECONDS = 2.5 * ALONE_CALL_SECONDS
"""Lease of a process that calls so rarely."""

STATE_SECONDS = 3.0
"""Expiry of the published state."""

LAPSED_SECONDS = 20.0
"""How long a process counts as short of CPU, after its last call that was late by a lease."""

LAPSED_LEASE_SECONDS = 3.0
"""Lease of a process that is short of CPU: its death is noticed that much later."""

KEPT_SECONDS = 24 * 60 * 60
"""Expiry of table and mode once no ingest process runs."""

ANSWER_SECONDS = 0.5
"""Timeout of a call."""

_CALL = """
local LEAD = '*lead'
local request, state = cjson.decode(ARGV[1]), ARGV[2]
local run, caller, now = request.run, request.member, request.now
if not now then
    local time = redis.call('time')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local stored = redis.call('get', KEYS[1])
local known = stored and cjson.decode(stored) or {rows = {}, members = {}, at = 0, grace = 0, takeovers = 0}
local rows, members, lapsed = known.rows, known.members, known.lapsed or {}
known.lapsed = lapsed

-- Expire members, except in the grace time after a table was lost; all have left one that has none. Silences may follow
-- each other, as where all processes are suspended most of the time: they replace none that has called meanwhile. But a
-- process that calls rarely must own shards all the same, and replace the others once these are dead.
local shortest = math.huge
for name, member in pairs(members) do
    shortest = math.min(shortest, member.lease - (name == run and 0 or request.call))
end
local is_silent = now - known.at > shortest
local more = is_silent and 1 or 0
known.silences = (known.silences or 0) + more
if not stored or (is_silent and known.silences < request.silences) then known.grace = now + request.grace
elseif now >= known.grace then known.silences = 0 end
known.grace = math.min(known.grace, now + request.grace)
local in_grace, protected_until = now < known.grace, is_silent and now + request.grace or known.grace
local function remove(name)
    members[name] = nil
    redis.call('hdel', KEYS[3], name)
end
for name, member in pairs(members) do
    member.silences = (member.silences or 0) + more
    if member.silences < request.silences then member.expires = math.max(member.expires, protected_until) end
    member.expires = math.min(member.expires, now + member.lease)
    if member.expires <= now then
        remove(name)
        lapsed[name] = now + request.lapsed
    end
end
for name, ends in pairs(lapsed) do lapsed[name] = ends > now and math.min(ends, now + request.lapsed) or nil end
if lapsed[run] then
    if not members[run] or now - members[run].called >= caller.lease then lapsed[run] = now + request.lapsed end
    caller.lease = math.max(caller.lease, request.lapsed_lease)
end
caller.called, caller.expires = now, now + caller.lease
members[run] = caller
if request.leaving then remove(run) end
local function can(name, shard) return members[name] and members[name].shards[shard] end

-- A process that reaches all of Redis, in place of an owner that does not: the standby; any process as the leader.
local function better_than(row, shard)
    if not members[row.owner] or not members[row.owner].cut_off then return nil end
    if shard ~= LEAD then return row.standby and members[row.standby].ready[shard] and row.standby or nil end
    local best = nil
    for name, member in pairs(members) do
        if not member.cut_off and (not best or name < best) then best = name end
    end
    return best
end

-- Take rows of which the caller has a later epoch: a table that is back with older data has earlier ones.
for shard, epoch in pairs(request.epochs) do
    local row = rows[shard] or {epoch = 0}
    local is_older = row.epoch < epoch
    if is_older and row.owner == run then row.owner = nil end
    if is_older and row.standby == run then row.standby = nil end
    if is_older and request.held[shard] then
        row.owner, row.epoch = run, epoch
    elseif request.stood[shard] and (is_older or (not row.standby and row.owner ~= run)) then
        row.standby = run
    end
    rows[shard] = row
end

-- Replace processes that have expired or have dropped a shard.
local function give(row, owner)
    row.owner = owner
    row.epoch = math.max(row.epoch + 1, now)
end
for shard, row in pairs(rows) do
    if not can(row.standby, shard) then row.standby = nil end
    if row.owner and not can(row.owner, shard) then
        local is_alive = members[row.owner] or (request.leaving and row.owner == run)
        if shard ~= LEAD and not is_alive then known.takeovers = known.takeovers + 1 end
        give(row, row.standby)
        row.standby = nil
    elseif row.owner and not in_grace and better_than(row, shard) then
        local owner = row.owner
        give(row, better_than(row, shard))
        if shard ~= LEAD then row.standby = owner end
    end
end

local function spread()
    local order, shards, plan = {}, {}, {}
    known.rows = {}
    for name, member in pairs(members) do
        order[#order + 1] = name
        for shard in pairs(member.shards) do known.rows[shard] = rows[shard] or {epoch = 0} end
    end
    rows = known.rows
    for shard in pairs(rows) do shards[#shards + 1] = shard end
    table.sort(order)
    table.sort(shards)

    -- How many shards each process has, once the planned moves are done.
    local function loads(kind)
        local load = {}
        for _, name in ipairs(order) do load[name] = 0 end
        for _, shard in ipairs(shards) do
            local name = (plan[shard] or rows[shard])[kind]
            if shard ~= LEAD and name then load[name] = load[name] + 1 end
        end
        return load
    end
    local function least(shard, kind, other_kind, except)
        local load, other, best = loads(kind), loads(other_kind), nil
        local function less(name)
            if kind == 'owner' and not lapsed[name] ~= not lapsed[best] then return not lapsed[name] end
            if load[name] ~= load[best] then return load[name] < load[best] end
            return other[name] < other[best]
        end
        for _, name in ipairs(order) do
            if name ~= except and can(name, shard) and (not best or less(name)) then best = name end
        end
        return best
    end
    for _, shard in ipairs(shards) do
        local row = rows[shard]
        -- The previous owner may be unknown, as in a Redis that was emptied.
        local owner = row.owner or row.standby or least(shard, 'owner', 'standby')
        for _, name in ipairs(members[owner].takes_all and {} or order) do
            if members[name].takes_all and can(name, shard) then owner = name break end
        end
        if owner ~= row.owner then
            if row.standby == owner or row.owner then row.standby = row.owner end
            give(row, owner)
        end
        if shard == LEAD then row.standby = nil
        else row.standby = row.standby or least(shard, 'standby', 'owner', row.owner) end
    end
    -- Owners first: the next owner of a shard becomes its standby, and its owner once it is ready. Then the standbys of
    -- the other shards.
    for _, kind in ipairs({'owner', 'standby'}) do
        repeat
            local load, stand, from, to, best, rank = loads(kind), loads('standby'), nil, nil, nil, nil
            for _, name in ipairs(order) do
                if kind == 'standby' or not members[name].takes_all then
                    if not from or load[name] > load[from] then from = name end
                    local can_take = kind == 'standby' or not lapsed[name]
                    if can_take and (not to or load[name] < load[to]) then to = name end
                end
            end
            for _, shard in ipairs(from and to and load[from] - load[to] > 1 and shards or {}) do
                local row = rows[shard]
                if shard ~= LEAD and row[kind] == from and row.owner ~= to and not plan[shard] and can(to, shard) then
                    local new = stand[row.standby] or 1000
                    if row.standby == to then new = members[to].ready[shard] and 3000 or 2000 end
                    if not best or new > rank then best, rank = shard, new end
                end
            end
            if best then
                if kind == 'owner' then plan[best] = {owner = to, standby = from} end
                rows[best].standby = to
                if rank == 3000 then
                    give(rows[best], to)
                    rows[best].standby = from
                end
            end
        until not best
    end
end
known.at = now
if not in_grace then spread() end
redis.call('set', KEYS[1], cjson.encode(known), 'px', request.kept)

-- The mode: a fresh start with no other process begins in the configured one.
local mode, holds, is_fresh = redis.call('get', KEYS[2]), next(request.held), not in_grace and not next(request.stood)
for name in pairs(members) do is_fresh = is_fresh and not holds and name == run end
local new = request.new_mode
if not new and not request.leaving and (is_fresh or (not mode and (holds or not in_grace))) then new = request.mode end
if new then mode = new end
if mode then redis.call('set', KEYS[2], mode, 'px', request.kept) end

-- The state of the caller.
if state ~= '' then redis.call('hset', KEYS[3], run, state) end
redis.call('pexpire', KEYS[3], request.state_kept)
return {mode, redis.call('exists', KEYS[4], KEYS[5]), cjson.encode(known)}
"""


class Row(msgspec.Struct, frozen=True):
    """A row of the table; None is no process, or an unknown one."""

    epoch: int
    owner: str | None = None
    standby: str | None = None


class Lease(msgspec.Struct, frozen=True):
    """When the lease of a process expires (server time, Unix ms), unless it calls the table before."""

    expires: int


class Table(msgspec.Struct, frozen=True):
    """The table: its rows by shard, and the leases by run.

    `at` is the time of its last call, `grace` until when it replaces no process and assigns no shard (server time, Unix
    ms), `takeovers` how often an owner whose lease had expired was replaced, `lapsed` by run until when it counts as
    short of CPU (the same times).
    """

    rows: dict[str, Row] = {}
    members: dict[str, Lease] = {}
    at: int = 0
    grace: int = 0
    takeovers: int = 0
    lapsed: dict[str, int] = {}


class Assignment(NamedTuple):
    """What a process owns and stands by for, whether it is the leader, the epochs of all shards, and the mode."""

    owned: frozenset[str]
    standby: frozenset[str]
    leads: bool
    epochs: Mapping[str, int]
    mode: Mode | None
    """The mode to adopt; None if it is not known."""


NO_TABLE = Table()

NOTHING = Assignment(frozenset(), frozenset(), False, {}, None)
"""What a process holds before its first call."""


def connect(keywords: Mapping[str, Any], answer_seconds: float = ANSWER_SECONDS) -> "redis.Redis":
    """Return a client with the timeout of this package, which connects when first used."""
    return sync_client(keywords, answer_seconds)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn errors of Redis into Unavailable."""
    try:
        yield
    except redis.RedisError as error:
        raise Unavailable(f"Redis cannot be used: {error}") from error


def decode_cluster(table: bytes | None, states: Mapping[bytes, bytes]) -> tuple[Table, dict[str, Published]]:
    """Decode the values of SHARDS_KEY and STATES_KEY: the table, and the states by run."""
    found = [each for state in states.values() if (each := decode(state, Published)) is not None]
    return decode(table, Table) or NO_TABLE, {each.run: each for each in sorted(found, key=attrgetter("run"))}


class ShardTable:
    """The table as one process sees it. For one thread at a time.

    Args:
        client: of Redis; not closed here.
        shards: those that this process can ingest.
        takes_all: whether it ingests all of them in any case; then it becomes their owner.
        now: Unix time in ms instead of the server's, for tests.
    """

    def __init__(
        self,
        client: "redis.Redis",
        shards: Collection[str],
        takes_all: bool = False,
        now: Callable[[], int] | None = None,
    ) -> None:
        self.run = f"{socket.gethostname()}/{os.getpid()}/{uuid4().hex[:12]}"
        self.shards = shards
        """Those that this process can ingest; a reload of the settings may change them."""
        self._client = client
        self._takes_all = takes_all
        self._now = now
        self.held = NOTHING
        """What this process holds, by the last answer."""
        self.table = NO_TABLE
        """The table, by the last answer."""
        self.is_followed = False
        """Whether other processes follow the states, or commands wait for this one."""
        self.call_again_seconds = CALL_SECONDS
        """When to call again: sooner where the lease of another process would expire before CALL_SECONDS are over."""
        self._is_alone = False
        """Whether this process takes all shards, and no other ingests or follows, by the last answer."""

    @property
    def has_lapsed(self) -> bool:
        """Whether this process counts as short of CPU, by the last answer."""
        return self.run in self.table.lapsed

    def hold(
        self,
        ready: Collection[str] = (),
        published: Published | None = None,
        new_mode: Mode | None = None,
        leaving: bool = False,
        cut_off: bool = False,
    ) -> Assignment:
        """Renew what this process holds, and return what it holds now.

        Args:
            ready: shards that it could own at once: their feeds are connected, or need not be.
            published: its state, which the same call stores.
            new_mode: set if it has switched the mode itself, which others adopt.
            leaving: whether to release everything: standbys take over at once.
            cut_off: whether it cannot reach all masters of a Redis Cluster; standbys that can reach them take over.

        Raises:
            Unavailable: Redis did not answer; it goes on with what it has.
        """
        held, was_alone = self.held, self._is_alone
        self._is_alone, self.call_again_seconds = False, CALL_SECONDS  # unless the answer says otherwise
        request = {
            "run": self.run,
            "member": {
                "lease": _ms(ALONE_LEASE_SECONDS if was_alone else LEASE_SECONDS),
                "shards": dict.fromkeys((*self.shards, LEAD), True),
                "ready": dict.fromkeys(ready, True),
                "takes_all": self._takes_all,
                "cut_off": cut_off,
            },
            "held": dict.fromkeys((*held.owned, *([LEAD] if held.leads else [])), True),
            "stood": dict.fromkeys(held.standby, True),
            "epochs": held.epochs,
            "leaving": leaving,
            "call": _ms(CALL_SECONDS),
            "grace": _ms(GRACE_SECONDS),
            "silences": MOST_SILENCES,
            "kept": _ms(KEPT_SECONDS),
            "state_kept": _ms(STATE_SECONDS),
            "lapsed": _ms(LAPSED_SECONDS),
            "lapsed_lease": _ms(LAPSED_LEASE_SECONDS),
            "now": self._now and self._now(),
            "new_mode": new_mode,
            "mode": published and published.state.mode,
        }
        given = {name: value for name, value in request.items() if value is not None}
        state = encode(published) if published else b""
        with redis_errors():
            # The keys share a hash tag, so that one script may use them on a cluster as well.
            names = (keys.SHARDS_KEY, keys.MODE_KEY, keys.STATES_KEY, keys.commands_key(self.run), keys.FOLLOWED_KEY)
            answer = self._client.eval(_CALL, len(names), *names, encode(given), state)
        mode, followers, stored = cast("tuple[bytes | None, int, bytes]", answer)
        self.is_followed = followers > 0
        table = decode(stored, Table) or NO_TABLE
        others = [member.expires for run, member in table.members.items() if run != self.run]
        self._is_alone = self._takes_all and not self.is_followed and not others
        # Only with the longer lease: the call that finds out that it is alone has the shorter one.
        rarely = self._is_alone and was_alone
        expire_seconds = [(at - table.at + 1) / 1000 for at in others]
        self.call_again_seconds = ALONE_CALL_SECONDS if rarely else min([CALL_SECONDS, *expire_seconds])
        rows = table.rows
        # Before the table: another thread that has seen a new table sees what it gives.
        self.held = Assignment(
            frozenset(name for name, row in rows.items() if row.owner == self.run and name != LEAD),
            frozenset(name for name, row in rows.items() if row.standby == self.run),
            LEAD in rows and rows[LEAD].owner == self.run,
            {name: row.epoch for name, row in rows.items()},
            mode_of(mode),
        )
        self.table = table
        return self.held


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

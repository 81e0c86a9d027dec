-- Daily candles, so that a question about a year reads hundreds of rows instead of half a million.
--
-- One row for each exchange, pair, mode and UTC day, with the columns of a minute: candles merge, so a period is the
-- daily candles of its whole days and the minutes of its two edges. At most two days of minutes and 365 days a year
-- are read; hours between them would save a millisecond.
--
-- Why not something else: a summary of a year of one series among 15 (7.9 million rows, 64 MB of shared buffers) takes
-- 1.7 s by the primary key and 1 ms by daily candles. By the primary key it reads no row too many, but half a million
-- are too many, spread over all pages of the table. BRIN would find the same pages with the rows of all series in them;
-- partitions cut the table but not the rows that a period has. Only a sum that is made before is quick.
--
-- What holds, always and for every reader: of a day before `rolled_until` each series that has minutes has a row here,
-- either its candle or, with tick_count null, the mark that its minutes are to be read instead. A change of a minute
-- of such a day sets the mark in the same transaction; MarketFlow moves `rolled_until` on and replaces marks by
-- candles, some at a time. A series without a row had no ticks that day.

drop table if exists aggregates_daily, aggregates_rolled_until;  -- of a table of minutes that is there no more

create table aggregates_daily (
    pair_name     text             not null,
    exchange      text             not null,
    mode          text             not null,
    timestamp     timestamptz      not null,  -- start of the day, UTC
    average_price double precision,
    min_price     double precision,
    max_price     double precision,
    open_price    double precision,
    close_price   double precision,
    tick_count    bigint,                     -- null: read the minutes
    open_at       timestamptz,
    close_at      timestamptz,
    min_at        timestamptz,
    max_at        timestamptz,
    primary key (exchange, pair_name, mode, timestamp)
) with (fillfactor = 80);

create index aggregates_daily_marked on aggregates_daily (timestamp, exchange, pair_name, mode) where tick_count is null;

create table aggregates_rolled_until (
    rolled_until timestamptz not null
);

insert into aggregates_rolled_until values ('epoch');

-- The one row of aggregates_rolled_until orders changes and the move of `rolled_until`: a change locks it for share, a
-- move for update. So either the change comes first and the move sees its minutes, or the change sees the move and sets
-- its marks; under repeatable read it fails with a serialization error instead. Rows of today cost this one look.
create or replace function aggregates_changed() returns trigger language plpgsql security definer as $$
declare
    rolled timestamptz;
begin
    if not exists (select from changed) then
        return null;
    end if;
    select rolled_until into rolled from aggregates_rolled_until for share;
    if not exists (select from changed where timestamp < rolled) then
        return null;
    end if;
    -- A mark that is there already is set anew: whoever is about to replace it has to wait for this change.
    insert into aggregates_daily (exchange, pair_name, mode, timestamp)
    select distinct exchange, pair_name, mode, date_trunc('day', timestamp, 'UTC') from changed where timestamp < rolled
    order by 1, 2, 3, 4
    on conflict (exchange, pair_name, mode, timestamp) do update set tick_count = null;
    return null;
end
$$;

create or replace function aggregates_truncated() returns trigger language plpgsql security definer as $$
begin
    delete from aggregates_daily;
    return null;
end
$$;

create or replace trigger inserted after insert on aggregates
    referencing new table as changed for each statement execute function aggregates_changed();
create or replace trigger updated_from after update on aggregates
    referencing old table as changed for each statement execute function aggregates_changed();
create or replace trigger updated_to after update on aggregates
    referencing new table as changed for each statement execute function aggregates_changed();
create or replace trigger deleted after delete on aggregates
    referencing old table as changed for each statement execute function aggregates_changed();
create or replace trigger truncated after truncate on aggregates
    for each statement execute function aggregates_truncated();

-- The functions run with the rights of their owner, so that whoever may change minutes needs no further ones, and
-- therefore only on the tables of this schema. Who may read minutes may read days.
do $$
declare
    reader text;
begin
    execute format('alter function aggregates_changed() set search_path = %I, pg_temp', current_schema());
    execute format('alter function aggregates_truncated() set search_path = %I, pg_temp', current_schema());
    for reader in
        select case grantee when 0 then 'public' else format('%I', pg_get_userbyid(grantee)) end
        from pg_class, aclexplode(relacl)
        where oid = 'aggregates'::regclass and privilege_type = 'SELECT' and grantee <> relowner
    loop
        execute format('grant select on aggregates_daily, aggregates_rolled_until to %s', reader);
    end loop;
end
$$;

-- Hourly candles, so that a year of candles of an hour or four reads thousands of rows instead of half a million.
--
-- One row for each exchange, pair, mode and hour (UTC), with the columns of a minute. They are made together with the
-- daily candle of their day, which is made of them, and hold exactly where that says so: where `hourly` is true in the
-- row of their day. Anywhere else what stands here is old or half there, and the minutes are to be read instead. So a
-- changed minute, which marks its day, needs no look at its hours, and a reader one at its days.
--
-- The mark of a day is `hourly` being false; `tick_count` stays what it was, the sign for what is asked by the day.
-- Days that an earlier version has made, or makes beside this one, have no hours and say so: they answer for the
-- whole day as before until they are made anew.

drop table if exists aggregates_hourly;  -- of a table of minutes that is there no more

create table aggregates_hourly (
    pair_name     text             not null,
    exchange      text             not null,
    mode          text             not null,
    timestamp     timestamptz      not null,  -- start of the hour, UTC
    average_price double precision not null,
    min_price     double precision not null,
    max_price     double precision not null,
    open_price    double precision not null,
    close_price   double precision not null,
    tick_count    bigint           not null,
    open_at       timestamptz      not null,
    close_at      timestamptz      not null,
    min_at        timestamptz      not null,
    max_at        timestamptz      not null,
    primary key (exchange, pair_name, mode, timestamp)
);

alter table aggregates_daily add column hourly boolean not null default false;

drop index aggregates_daily_marked;
create index aggregates_daily_marked on aggregates_daily (timestamp, exchange, pair_name, mode) where not hourly;

-- As before (0002), but for `hourly`.
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
    on conflict (exchange, pair_name, mode, timestamp) do update set tick_count = null, hourly = false;
    return null;
end
$$;

create or replace function aggregates_truncated() returns trigger language plpgsql security definer as $$
begin
    delete from aggregates_daily;
    delete from aggregates_hourly;
    return null;
end
$$;

-- Replaced functions have lost their settings, see 0002. Who may read minutes may read hours, and who may do more with
-- days may do that with hours.
do $$
declare
    may record;
begin
    execute format('alter function aggregates_changed() set search_path = %I, pg_temp', current_schema());
    execute format('alter function aggregates_truncated() set search_path = %I, pg_temp', current_schema());
    for may in
        select distinct privilege_type as what,
               case grantee when 0 then 'public' else format('%I', pg_get_userbyid(grantee)) end as who
        from pg_class, aclexplode(relacl)
        where (oid = 'aggregates'::regclass and privilege_type = 'SELECT' or oid = 'aggregates_daily'::regclass)
          and grantee <> relowner
    loop
        execute format('grant %s on aggregates_hourly to %s', may.what, may.who);
    end loop;
end
$$;

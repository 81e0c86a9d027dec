-- The functions of the triggers run with the rights of their owner, so that who may change minutes needs no further ones.
-- That makes them a way to these rights, for anybody who can have them run on something else than the minutes:
--
-- - nobody but the owner may make a trigger that executes them (it takes the right to execute; to fire one does not);
-- - they refuse any other table than the one they are for, before they look at its rows, whose types another user may
--   have made, with casts that run code;
-- - every name is qualified and nothing but pg_catalog is searched, so that no table, function or operator that somebody
--   else has made is found in the place of the one that is meant.
--
-- Minutes from before `kept_from` are of no concern to days any more: their retention (archive.keep_minutes) has ended,
-- or ends while they are deleted, and the day and its hours stay as they are.
--
-- They name their schema: to move the tables to another one, dump and restore them.

alter table aggregates_rolled_until add column kept_from timestamptz not null default 'epoch';

do $migration$
begin
    execute format($function$
create or replace function %1$I.aggregates_changed() returns trigger language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    rolled timestamptz;
    kept timestamptz;
begin
    if tg_relid <> '%1$I.aggregates'::regclass then
        raise exception 'aggregates_changed() is for the table %1$I.aggregates alone' using errcode = '42501';
    end if;
    if not exists (select from changed) then
        return null;
    end if;
    select rolled_until, kept_from into rolled, kept from %1$I.aggregates_rolled_until for share;
    if not exists (select from changed where timestamp < rolled and timestamp >= kept) then
        return null;
    end if;
    -- A mark that is there already is set anew: whoever is about to replace it has to wait for this change.
    insert into %1$I.aggregates_daily (exchange, pair_name, mode, timestamp)
    select distinct exchange, pair_name, mode, date_trunc('day', timestamp, 'UTC') from changed
    where timestamp < rolled and timestamp >= kept
    order by 1, 2, 3, 4
    on conflict (exchange, pair_name, mode, timestamp) do update set tick_count = null, hourly = false;
    return null;
end
$$
    $function$, current_schema());
    execute format($function$
create or replace function %1$I.aggregates_truncated() returns trigger language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
    if tg_relid <> '%1$I.aggregates'::regclass then
        raise exception 'aggregates_truncated() is for the table %1$I.aggregates alone' using errcode = '42501';
    end if;
    delete from %1$I.aggregates_daily;
    delete from %1$I.aggregates_hourly;
    return null;
end
$$
    $function$, current_schema());
    execute format(
        'revoke execute on function %1$I.aggregates_changed(), %1$I.aggregates_truncated() from public', current_schema()
    );
end
$migration$;

-- How often a row was changed since it was first written, so that a correction of a closed candle can be seen. The
-- database counts, whoever makes the change: MarketFlow, or somebody by hand. An update that changes nothing is none.
-- Hours and days have the changes of all their minutes, plus one.

alter table aggregates add column version integer not null default 1;
alter table aggregates_hourly add column version bigint not null default 1;
alter table aggregates_daily add column version bigint not null default 1;

create or replace function aggregates_versioned() returns trigger language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    new.version := greatest(new.version, old.version + 1);
    return new;
end
$$;
revoke execute on function aggregates_versioned() from public;

create or replace trigger versioned before update on aggregates for each row
when (
    (old.average_price, old.min_price, old.max_price, old.open_price, old.close_price, old.tick_count)
    is distinct from
    (new.average_price, new.min_price, new.max_price, new.open_price, new.close_price, new.tick_count)
)
execute function aggregates_versioned();

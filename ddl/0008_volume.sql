-- What was traded in a minute: volume in the base currency, turnover in the quote currency, and both of buyers as takers.
-- Null is unknown, which is not zero: rows from before, and of exchanges whose ticks have no quantity.
--
-- `source` says what a row is made of: the ticks, or the venue's own candle where there are none. Of such a row the number
-- of trades and the average may be unknown (null); where they are known, the average is the venue's mean of what was
-- traded. A row of ticks replaces it. `verified` says whether the venue's own candle is the same, null while unknown;
-- where it differs, `venue_values` has it: open, high, low, close, volume, turnover and number of trades.
--
-- Of an hour or a day an amount is null where that of any of its minutes is; its tick_count counts those that are known.

alter table aggregates
    add column volume double precision,
    add column turnover double precision,
    add column buy_volume double precision,
    add column buy_turnover double precision,
    add column source text not null default 'ticks',
    add column verified boolean,
    add column venue_values double precision[],
    alter column average_price drop not null,
    alter column tick_count drop not null;

alter table aggregates_hourly
    add column volume double precision,
    add column turnover double precision,
    add column buy_volume double precision,
    add column buy_turnover double precision,
    add column source text not null default 'ticks',
    add column verified boolean,
    alter column average_price drop not null;

alter table aggregates_daily
    add column volume double precision,
    add column turnover double precision,
    add column buy_volume double precision,
    add column buy_turnover double precision,
    add column source text not null default 'ticks',
    add column verified boolean;

-- Not valid, as 0005 has it: what stands here is looked at by MarketFlow at each start.
alter table aggregates drop constraint aggregates_valid;
alter table aggregates add constraint aggregates_valid check (
    timestamp >= timestamptz '1970-01-01 00:00:00+00' and timestamp < timestamptz '2200-01-01 00:00:00+00'
    and min_price >= float8 '-1e100' and max_price <= float8 '1e100'
    and min_price <= open_price and min_price <= close_price and max_price >= open_price and max_price >= close_price
    and (
        tick_count between 1 and 1000000000000 and average_price is not null
        and average_price between min_price - greatest(abs(min_price), float8 '1e-290') * float8 '1e-9'
                              and max_price + greatest(abs(max_price), float8 '1e-290') * float8 '1e-9'
        or source = 'venue' and tick_count is null and average_price is null
    )
    and source in ('ticks', 'venue')
    and coalesce(least(volume, turnover, buy_volume, buy_turnover), 0) >= float8 '0'
    and coalesce(greatest(volume, turnover, buy_volume, buy_turnover), 0) < float8 'infinity'
    and coalesce(least(open_at, close_at, min_at, max_at), timestamp) >= timestamptz '1970-01-01 00:00:00+00'
    and coalesce(greatest(open_at, close_at, min_at, max_at), timestamp) < timestamptz '2200-01-01 00:00:00+00'
) not valid;

-- As 0006 has it; to learn that a row is verified is no correction of it.
create or replace trigger versioned before update on aggregates for each row
when (
    (old.average_price, old.min_price, old.max_price, old.open_price, old.close_price, old.tick_count,
     old.volume, old.turnover, old.buy_volume, old.buy_turnover)
    is distinct from
    (new.average_price, new.min_price, new.max_price, new.open_price, new.close_price, new.tick_count,
     new.volume, new.turnover, new.buy_volume, new.buy_turnover)
)
execute function aggregates_versioned();

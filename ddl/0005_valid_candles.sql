-- What is no candle is refused: a time that is none of this age, a price that is no finite number, an average or an
-- end beyond the extremes. One such row would else spoil its day, and what is added up of it.
--
-- NOT VALID: rows that stand here already are not looked at now. MarketFlow does so at each start; as long as there are
-- some it names them in its log, leaves them out of every answer, and holds new rows alone to the rule. Once they are
-- corrected or deleted, the constraint is valid for all (`alter table aggregates validate constraint aggregates_valid`).
-- 1e100 is the highest price that a feed may send. An average may be off by a rounding;
-- 1e-290 keeps the product of that from an underflow, which is an error.

alter table aggregates add constraint aggregates_valid check (
    timestamp >= timestamptz '1970-01-01 00:00:00+00' and timestamp < timestamptz '2200-01-01 00:00:00+00'
    and min_price >= float8 '-1e100' and max_price <= float8 '1e100'
    and min_price <= open_price and min_price <= close_price and max_price >= open_price and max_price >= close_price
    and average_price between min_price - greatest(abs(min_price), float8 '1e-290') * float8 '1e-9'
                          and max_price + greatest(abs(max_price), float8 '1e-290') * float8 '1e-9'
    and tick_count between 1 and 1000000000000
    and coalesce(least(open_at, close_at, min_at, max_at), timestamp) >= timestamptz '1970-01-01 00:00:00+00'
    and coalesce(greatest(open_at, close_at, min_at, max_at), timestamp) < timestamptz '2200-01-01 00:00:00+00'
) not valid;

-- Days and hours that were made of such rows, or marked by them.
delete from aggregates_daily
where timestamp < timestamptz '1970-01-01 00:00:00+00' or timestamp >= timestamptz '2200-01-01 00:00:00+00';
delete from aggregates_hourly
where timestamp < timestamptz '1970-01-01 00:00:00+00' or timestamp >= timestamptz '2200-01-01 00:00:00+00';
update aggregates_daily set tick_count = null, hourly = false
where tick_count is not null and not (
    tick_count between 1 and 1000000000000000
    and min_price >= float8 '-1e100' and max_price <= float8 '1e100'
    and min_price <= open_price and min_price <= close_price and max_price >= open_price and max_price >= close_price
    and average_price between min_price - greatest(abs(min_price), float8 '1e-290') * float8 '1e-9'
                          and max_price + greatest(abs(max_price), float8 '1e-290') * float8 '1e-9'
);

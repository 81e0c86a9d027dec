-- One-minute candles: one row for each exchange, pair, mode and minute.
--
-- The primary key begins with what every query names and ends with the minute, so a period of one series is one range
-- of the index. The *_at columns are the event times of the four prices; rows from other sources may leave them out.

create table if not exists aggregates (
    pair_name     text             not null,
    exchange      text             not null,
    mode          text             not null check (mode in ('test', 'live')),
    timestamp     timestamptz      not null,  -- start of the minute
    average_price double precision not null,
    min_price     double precision not null,
    max_price     double precision not null,
    open_price    double precision not null,
    close_price   double precision not null,
    tick_count    bigint           not null check (tick_count > 0),
    open_at       timestamptz,
    close_at      timestamptz,
    min_at        timestamptz,
    max_at        timestamptz,
    primary key (exchange, pair_name, mode, timestamp)
);

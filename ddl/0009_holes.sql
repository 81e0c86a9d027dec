-- Holes: trades of a series that were not received, found by the venue's ids, and what became of them.
--
-- One row for each hole: the trades with ids above `after_id` and below `before_id`, both of which were received, at
-- `from_time` and `to_time`. It is open until its trades are fetched from the venue (filled), the venue has none with
-- these ids (absent), or they cannot be fetched any more (given_up); `reason` says why in words. `from_time` is the
-- event time of the trade before the hole, so the candles that lack something are those of the minutes from `from_time`
-- to `to_time`.
--
-- Ids are of any size, and begin anew where a venue lists a pair again: a later hole then replaces an earlier one with
-- the same `after_id`, whose candles are long corrected or not.

drop table if exists holes;  -- left from minutes that were dropped

create table holes (
    exchange   text           not null,
    pair_name  text           not null,
    mode       text           not null,
    after_id   numeric(40, 0) not null,
    before_id  numeric(40, 0) not null,
    from_time  timestamptz    not null,
    to_time    timestamptz    not null,
    state      text           not null,
    reason     text           not null default '',
    found_at   timestamptz    not null,
    changed_at timestamptz    not null,
    primary key (exchange, pair_name, mode, after_id),
    constraint holes_valid check (
        before_id > after_id and to_time >= from_time and state in ('open', 'filled', 'absent', 'given_up')
    )
);

create index holes_newest on holes (mode, from_time);
create index holes_open on holes (mode, exchange) where state = 'open';

-- Who may read minutes may read holes, and who may do more with days may do that with holes.
do $$
declare
    may record;
begin
    for may in
        select distinct privilege_type as what,
               case grantee when 0 then 'public' else format('%I', pg_get_userbyid(grantee)) end as who
        from pg_class, aclexplode(relacl)
        where (oid = 'aggregates'::regclass and privilege_type = 'SELECT' or oid = 'aggregates_daily'::regclass)
          and grantee <> relowner
    loop
        execute format('grant %s on holes to %s', may.what, may.who);
    end loop;
end
$$;

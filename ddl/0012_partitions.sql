-- Daily partitions of minutes, for retention: what has expired is dropped as a whole instead of deleted row by row.
--
-- For many series only, and on demand: `marketflow migrate --partition` makes them. Here is what they need. Measured with
-- 1,500 series (2.2 million rows a day): deleting a day takes 27 s, 0.6 GB of WAL and a vacuum of the whole index, which
-- grows with the days that are kept; dropping its partition takes half a second. But with 92 partitions the first query of
-- each kind on a connection takes 0.2 s instead of 0.02 s, for it plans them all, and each later one some ms more. So a
-- table of 15 series, whose day is deleted in a third of a second, stays as it is.
--
-- `partitioned_from` is the end of the first partition, which is the table from before; null where MarketFlow has not
-- partitioned the table. From there on each day (UTC) has a partition. What belongs to no other one is in the default
-- partition, so no row is ever refused: minutes of dropped days, and of days far ahead.
--
-- Both functions run with the rights of their owner, as those of triggers (0004): MarketFlow's role need not own the table.

alter table aggregates_rolled_until add column partitioned_from timestamptz;

do $migration$
declare
    who text;
begin
    -- Left from minutes that were dropped. Dropped, not replaced: a replaced function keeps its owner.
    execute format(
        'drop function if exists %1$I.aggregates_partitions(), %1$I.aggregates_add_partitions(timestamptz, timestamptz),'
        ' %1$I.aggregates_drop_partition()', current_schema()
    );
    execute format($function$
-- The partitions of minutes with their bounds; the default one has none.
create function %1$I.aggregates_partitions(out partition regclass, out since timestamptz, out until timestamptz)
returns setof record language sql stable
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
    select oid::regclass, coalesce(substring(bound from 'FROM \(''([^'']+)''\)')::timestamptz, '-infinity'),
           coalesce(substring(bound from 'TO \(''([^'']+)''\)')::timestamptz, 'infinity')
    from (
        select child.oid, pg_get_expr(child.relpartbound, child.oid) as bound
        from pg_inherits join pg_class as child on child.oid = inhrelid
        where inhparent = '%1$I.aggregates'::regclass
    ) as found where bound <> 'DEFAULT'
$$
    $function$, current_schema());

    execute format($function$
-- Make the partitions that are missing for the days from `first` until before `until`, two months at most.
create function %1$I.aggregates_add_partitions(first timestamptz, until timestamptz) returns setof text
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
declare
    begin_of_day timestamptz;
    end_of_day timestamptz;
    name text;
    columns text;
    other regclass;
    may record;
begin
    -- One at a time; the one that waited sees what the other has made.
    perform pg_advisory_xact_lock(7364017243);
    select date_trunc('day', greatest(first, partitioned_from), 'UTC') into begin_of_day
    from %1$I.aggregates_rolled_until where partitioned_from is not null;
    while begin_of_day < least(until, first + interval '62 days') loop
        end_of_day := begin_of_day + interval '24 hours';
        name := 'aggregates_' || to_char(begin_of_day, 'YYYYMMDD');
        if not exists (
            select from %1$I.aggregates_partitions() as there
            where there.since < end_of_day and there.until > begin_of_day
        ) then
            -- Attached, for `partition of` would lock out all readers.
            execute format(
                'create table %1$I.%%I (like %1$I.aggregates including all excluding indexes excluding statistics)',
                name
            );
            for may in
                select case grantee when 0 then 'public' else format('%%I', pg_get_userbyid(grantee)) end as who
                from pg_class, aclexplode(relacl)
                where oid = format('%1$I.%%I', name)::regclass and grantee <> relowner group by grantee
            loop
                execute format('revoke all on %1$I.%%I from %%s', name, may.who);
            end loop;
            select inhrelid into other from pg_inherits join pg_class on pg_class.oid = inhrelid
            where inhparent = '%1$I.aggregates'::regclass and pg_get_expr(relpartbound, inhrelid) = 'DEFAULT';
            if other is not null then
                execute format('lock table %%s in access exclusive mode', other);
                select string_agg(format('%%I', attname), ', ') into columns from pg_attribute
                where attrelid = '%1$I.aggregates'::regclass and attnum > 0 and not attisdropped;
                execute format(
                    'with moved as (delete from %%s where timestamp >= $1 and timestamp < $2 returning %%s)'
                    ' insert into %1$I.%%I (%%s) select %%s from moved', other, columns, name, columns, columns
                ) using begin_of_day, end_of_day;
            end if;
            execute format(
                'alter table %1$I.aggregates attach partition %1$I.%%I for values from (%%L) to (%%L)',
                name, begin_of_day, end_of_day
            );
            return next name;
        end if;
        begin_of_day := end_of_day;
    end loop;
end
$$
    $function$, current_schema());

    execute format($function$
-- Drop the oldest partition whose minutes have all expired, if there is one, and return its name.
--
-- Expired is what lies before `kept_from`, which moves only past days that are rolled up, and before which no change
-- concerns a day any more (0004). Dropping a table fires no trigger.
create function %1$I.aggregates_drop_partition() returns text language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
declare
    expired regclass;
    name text;
begin
    select there.partition into expired
    from %1$I.aggregates_rolled_until as kept, %1$I.aggregates_partitions() as there
    where kept.partitioned_from is not null and there.until <= kept.kept_from and there.until <= kept.rolled_until
    order by there.until limit 1;
    if expired is not null then
        select relname into name from pg_class where oid = expired;
        execute format('drop table %%s', expired);
    end if;
    return name;
end
$$
    $function$, current_schema());

    execute format(
        'revoke execute on function %1$I.aggregates_partitions(), %1$I.aggregates_add_partitions(timestamptz, timestamptz),'
        ' %1$I.aggregates_drop_partition() from public', current_schema()
    );
    -- Who may delete minutes may drop expired ones.
    for who in
        select case grantee when 0 then 'public' else format('%I', pg_get_userbyid(grantee)) end
        from pg_class, aclexplode(relacl)
        where oid = 'aggregates'::regclass and privilege_type = 'DELETE' and grantee <> relowner
    loop
        execute format(
            'grant execute on function %1$I.aggregates_add_partitions(timestamptz, timestamptz),'
            ' %1$I.aggregates_drop_partition() to %2$s', current_schema(), who
        );
    end loop;
end
$migration$;

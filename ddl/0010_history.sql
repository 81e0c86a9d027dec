-- History: for which times the venue's own minutes have been fetched, so that a restart asks for the others alone.
--
-- One row for each series. `complete` holds the times for which every minute that the venue has is in `aggregates`, so a
-- minute that is not there had no trades. Delete a row to have all of its minutes asked for again that are not there.

drop table if exists history;  -- left from minutes that were dropped

create table history (
    exchange  text           not null,
    pair_name text           not null,
    mode      text           not null,
    complete  tstzmultirange not null,
    primary key (exchange, pair_name, mode)
);

-- Who may read minutes may read this, and who may do more with days may do that with it.
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
        execute format('grant %s on history to %s', may.what, may.who);
    end loop;
end
$$;

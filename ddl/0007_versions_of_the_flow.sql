-- MarketFlow says which version a minute has: what changes it before it is closed is no correction, and raises nothing.
-- The transaction that writes minutes says so by the setting marketflow.versions; any other change of a row is a
-- correction, as before. A row older than six minutes has been read as closed, so changing it always is one.

create or replace function aggregates_versioned() returns trigger language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if current_setting('marketflow.versions', true) = 'kept' and new.timestamp > now() - interval '7 minutes' then
        new.version := greatest(new.version, old.version);
    else
        new.version := greatest(new.version, old.version + 1);
    end if;
    return new;
end
$$;

-- Alerts: rules, what they have done, their events, and the deliveries of these to webhooks.
--
-- A rule is one of the settings, which the application puts here so that others can read it, or of the API. `secret`
-- signs what is posted to its webhook. `alert_states` says when a rule had its last event, and whether it is done. It is
-- written with the event, so two processes that find one crossing store one event, and a rule that ends with its first
-- event stays ended. `number` ascends in the order of commits. An event has a delivery if its rule has a webhook; it is
-- pending until the receiver has acknowledged it.

drop table if exists alert_deliveries, alert_events, alert_states, alert_webhooks, alert_rules;  -- left from minutes that were dropped

create table alert_rules (
    number     bigint      generated always as identity,
    id         text        not null primary key,
    origin     text        not null,
    rule       text        not null,  -- as JSON, without webhook and secret
    receiver   text        not null,  -- scheme, host and port of the webhook, or ''
    created_at timestamptz not null default now(),
    constraint alert_rules_valid check (origin in ('settings', 'api'))
);

create table alert_webhooks (
    rule    text not null primary key references alert_rules (id) on delete cascade,
    webhook text not null,
    secret  text not null
);

create table alert_states (
    rule          text        not null primary key,
    last_event_at timestamptz not null,
    done          boolean     not null
);

create table alert_events (
    number   bigint      generated always as identity,
    id       text        not null primary key,
    rule     text        not null,
    time     timestamptz not null,
    event    text        not null,  -- as JSON: what was signed once stays the same to the byte
    found_at timestamptz not null default now()
);

create unique index alert_events_number on alert_events (number);
create index alert_events_found on alert_events (found_at);

create table alert_deliveries (
    event       text        not null primary key references alert_events (id) on delete cascade,
    receiver    text        not null,
    state       text        not null default 'pending',
    attempts    int         not null default 0,
    next_try_at timestamptz not null default now(),
    changed_at  timestamptz not null default now(),
    constraint alert_deliveries_valid check (state in ('pending', 'acknowledged', 'given_up'))
);

create index alert_deliveries_pending on alert_deliveries (receiver, next_try_at) where state = 'pending';

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
        execute format(
            'grant %s on alert_rules, alert_webhooks, alert_states, alert_events, alert_deliveries to %s', may.what, may.who
        );
    end loop;
    -- But who only reads may not read the secrets, whatever default privileges say.
    for may in
        select case grantee when 0 then 'public' else format('%I', pg_get_userbyid(grantee)) end as who
        from pg_class, aclexplode(relacl)
        where oid = 'alert_webhooks'::regclass and grantee <> relowner
        group by grantee
        having not bool_or(privilege_type = 'INSERT')
    loop
        execute format('revoke all on alert_webhooks from %s', may.who);
    end loop;
end
$$;

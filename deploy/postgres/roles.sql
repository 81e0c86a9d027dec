-- Three roles for MarketFlow, none of them a superuser, in a database of its own. Once, as a superuser:
--
--     export OWNER_PASSWORD=... WRITER_PASSWORD=... READER_PASSWORD=...
--     psql --file deploy/postgres/roles.sql postgres
--
-- marketflow_owner    owns the tables and applies ddl/ (`marketflow migrate`), at installation and upgrade only
-- marketflow_writer   role of MarketFlow: reads, writes and rolls up, may change no table
-- marketflow_reader   for `--role api`, `marketflow export`, dashboards and people

\set ON_ERROR_STOP on
\getenv owner_password OWNER_PASSWORD
\getenv writer_password WRITER_PASSWORD
\getenv reader_password READER_PASSWORD

create role marketflow_owner login password :'owner_password';
create role marketflow_writer login password :'writer_password';
create role marketflow_reader login password :'reader_password';

create database marketflow owner marketflow_owner;
revoke connect, temporary on database marketflow from public;
grant connect on database marketflow to marketflow_writer, marketflow_reader;

\connect marketflow
revoke create on schema public from public;
grant create on schema public to marketflow_owner;
alter default privileges for role marketflow_owner in schema public
    grant select, insert, update, delete on tables to marketflow_writer;
alter default privileges for role marketflow_owner in schema public grant select on tables to marketflow_reader;

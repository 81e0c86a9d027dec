import json
import os
from pathlib import Path

import pytest

from marketflow.alerts.alert_model import PriceRule, without_webhook
from marketflow.errors import SettingsError
from marketflow.model import Mode
from marketflow.resources import resource
from marketflow.settings import (
    ExchangeSettings,
    GeneratorSettings,
    HttpSettings,
    PostgresSettings,
    RedisSettings,
    Settings,
    convert,
    load,
    load_with_origins,
)
from marketflow.settings.effective_settings import as_toml, effective_values
from marketflow.settings.schema import KEYS, choices, is_text

pytestmark = pytest.mark.usefixtures("nothing_set")


def problems(overrides: dict[str, object] | None = None, config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(config, overrides)
    return str(caught.value)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- defaults


def test_shipped_file_has_the_defaults() -> None:
    assert load(resource("settings.toml")) == Settings()


def test_defaults_conform_to_the_rules() -> None:
    defaults = Settings()
    given: dict[str, object] = {"mode": defaults.mode, "symbols": list(defaults.symbols)}
    for section in ("http", "postgres", "redis", "flow", "generator", "log"):
        struct = getattr(defaults, section)
        given |= {f"{section}.{name}": getattr(struct, name) for name in struct.__struct_fields__}
    assert load(None, given) == defaults


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:40101", "127.0.0.1", 40101), ("[::1]:40101", "::1", 40101), ("feed.example:1", "feed.example", 1)],
)
def test_address_has_host_and_port(address: str, host: str, port: int) -> None:
    loaded = load(None, {"exchanges": [{"name": "a", "address": address}]}).exchanges[0]
    assert (loaded.host, loaded.port) == (host, port)


# --- precedence of sources


def test_each_source_overrides_the_previous_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written(tmp_path / "settings.toml", "[http]\nhost = 'from.file'\nport = 1\ntoken = 'file-file-file-file'")
    monkeypatch.setenv("MARKETFLOW_HTTP__PORT", "2")
    monkeypatch.setenv("MARKETFLOW_HTTP__TOKEN", "variable-variable")
    loaded = load(None, {"http.token": "flag-flag-flag-flag"})
    assert loaded.http == HttpSettings(host="from.file", port=2, token="flag-flag-flag-flag")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", "[redis]\nport = 7\n[generator]\nseed = 5"),
        ("c.yaml", "redis:\n  port: 7\ngenerator:\n  seed: 5\n"),
        ("c.yml", "redis: {port: 7}\ngenerator: {seed: 5}\n"),
        ("c.json", '{"redis": {"port": 7}, "generator": {"seed": 5}}'),
        ("a,b;c.json", '{"REDIS": {"Port": 7}, "Generator": {"SEED": 5}}'),
    ],
)
def test_config_file_replaces_settings_toml(tmp_path: Path, name: str, text: str) -> None:
    written(tmp_path / "settings.toml", "[http]\nport = 1")
    loaded = load(written(tmp_path / name, text))
    assert loaded == Settings(redis=RedisSettings(port=7), generator=GeneratorSettings(seed=5))


def test_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load(written(tmp_path / "c.yaml", "")) == load(written(tmp_path / "c.toml", "")) == Settings()


def test_list_replaces_the_list_of_another_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written(tmp_path / "settings.toml", "symbols = ['A', 'B']\nexchanges = [{name = 'x', address = 'x:1'}]")
    monkeypatch.setenv("MARKETFLOW_SYMBOLS", '["C"]')
    monkeypatch.setenv("MARKETFLOW_EXCHANGES", '[{name="y",address="y:2"}]')
    loaded = load()
    assert loaded.symbols == ("C",)
    assert loaded.exchanges == (ExchangeSettings(name="y", address="y:2"),)


def test_variable_matches_in_any_case_after_prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written(tmp_path / "settings.toml", "[http]\nhost = 'file'")
    monkeypatch.setenv("MARKETFLOW_http__Host", "variable")
    assert load().http == HttpSettings(host="variable")


def test_table_in_a_variable_sets_only_its_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written(tmp_path / "settings.toml", "[http]\nhost = 'file'")
    monkeypatch.setenv("MARKETFLOW_HTTP", "{port=5}")
    assert load().http == HttpSettings(host="file", port=5)


@pytest.mark.parametrize("name", ["settings.toml", "other.yaml"])
@pytest.mark.timeout(10)
def test_fifo_in_place_of_a_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(SettingsError, match=f"{name}: must be a regular file"):
        load(tmp_path / name)


# --- types of values


@pytest.mark.parametrize(
    "password", ["007", "1e5", "true", "True", "[1]", "{a=1}", '"q"', " x ", "", "nan", "2024-01-01"]
)
def test_text_in_a_variable_is_literal(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    monkeypatch.setenv("MARKETFLOW_POSTGRES__PASSWORD", password)
    assert load().postgres == PostgresSettings(password=password)


TOKENS = [
    "@int 7",
    "@format {env[HOME]}",
    "@jinja {{ env.HOME }}",
    "@read_file /etc/hostname",
    "@merge a",
    "@none",
    "@x",
]


@pytest.mark.parametrize("password", TOKENS)
def test_password_with_at_sign_is_literal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, password: str) -> None:
    written(tmp_path / "settings.toml", f"[postgres]\npassword = '{password}'")
    monkeypatch.setenv("MARKETFLOW_REDIS__PASSWORD", password)
    loaded = load()
    assert (loaded.postgres.password, loaded.redis.password) == (password, password)


@pytest.mark.parametrize("text", ['["BTCUSDT","ETHUSDT"]', "BTCUSDT,ETHUSDT", "BTCUSDT ETHUSDT", " BTCUSDT, ETHUSDT, "])
def test_symbols_may_be_a_list_or_text(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MARKETFLOW_SYMBOLS", text)
    assert load().symbols == ("BTCUSDT", "ETHUSDT")


@pytest.mark.parametrize("text", ['["a.example", "[::1]"]', "a.example,[::1]", " a.example  [::1], "])
def test_allowed_hosts_may_be_a_list_or_text(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MARKETFLOW_HTTP__ALLOWED_HOSTS", text)
    assert load().http.allowed_hosts == ("a.example", "[::1]")


@pytest.mark.parametrize("hosts", [[], ["*"], ["::1"], ["127.0.0.1", "Prices_2.Example.com"]])
def test_allowed_host_is_a_name_or_address(hosts: list[str]) -> None:
    assert load(None, {"http.allowed_hosts": hosts}).http.allowed_hosts == tuple(hosts)


@pytest.mark.parametrize("host", ["", "a:80", "[::1]:80", "http://a", "a/b", "*.a", "\u00e9", 5, None])
def test_wrong_allowed_host_is_named_by_position(host: object) -> None:
    text = problems({"http.allowed_hosts": ["a", host]})
    assert text.startswith("http.allowed_hosts[1] = ")
    assert ': must be a host name without a port, or "*"' in text


@pytest.mark.parametrize("text", ['[{name="a",address="[::1]:1"}]', '[{"name": "a", "address": "[::1]:1"}]'])
def test_exchanges_can_be_set_by_variable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MARKETFLOW_EXCHANGES", text)
    assert load().exchanges == (ExchangeSettings(name="a", address="[::1]:1"),)


@pytest.mark.parametrize("text", ["kraken, a=[::1]:1", "kraken a=[::1]:1", " Kraken,a=[::1]:1, "])
def test_exchanges_may_be_venues_and_addresses_as_text(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MARKETFLOW_EXCHANGES", text)
    assert load().exchanges == (
        ExchangeSettings(name="kraken", venue="kraken"),
        ExchangeSettings(name="a", address="[::1]:1"),
    )


@pytest.mark.parametrize(
    "text", ["mtgox", "kraken a=b", "kraken =b:1", "kraken a:1", "kraken KRAKEN", "", "[{name='a'"]
)
def test_wrong_exchange_in_a_text_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MARKETFLOW_EXCHANGES", text)
    assert problems().startswith("exchanges")
    assert "must" in problems()


@pytest.mark.parametrize("text", ["BTCUSDT, ETHUSDT", "BTCUSDT ETHUSDT"])
def test_symbols_of_a_venue_may_be_text(text: str) -> None:
    (venue,) = load(None, {"exchanges": [{"name": "a", "venue": "okx", "symbols": text}]}).exchanges
    assert venue.symbols == {"BTCUSDT": "", "ETHUSDT": ""}


# --- Redis Cluster


@pytest.mark.parametrize("text", ["[::1]:7001, b:7002", "[::1]:7001 b:7002", '["[::1]:7001", "b:7002"]'])
def test_nodes_of_a_redis_cluster_may_be_text(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MARKETFLOW_REDIS__NODES", text)
    redis = load().redis
    assert redis.addresses == (("::1", 7001), ("b", 7002))
    assert (redis.bucket_count, redis.is_embedded) == (16, False)


def test_plain_redis_has_one_bucket() -> None:
    assert (load().redis.bucket_count, load().redis.is_embedded) == (1, True)
    assert load(None, {"redis.host": "a", "redis.buckets": 1}).redis.bucket_count == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"redis.nodes": ["a"]}, "redis.nodes[0]"),
        ({"redis.nodes": ["a:0"]}, "redis.nodes[0]"),
        ({"redis.nodes": [7001]}, "redis.nodes[0]"),
        ({"redis.nodes": ["a:1", "A:1"]}, "redis.nodes"),
        ({"redis.nodes": 7001}, "redis.nodes"),
        ({"redis.buckets": 0}, "redis.buckets"),
        ({"redis.buckets": 16}, "redis.buckets = 16: must be 1 without redis.nodes"),
        ({"redis.nodes": ["a:1"], "redis.host": "b"}, "redis.host and redis.nodes"),
        ({"redis.nodes": ["a:1"], "redis.db": 3}, "redis.db = 3: must be 0"),
    ],
)
def test_contradicting_cluster_settings_are_refused(given: dict[str, object], named: str) -> None:
    assert problems(given).startswith(named)


def test_numbers_and_words_get_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKETFLOW_MODE", "LIVE")
    monkeypatch.setenv("MARKETFLOW_LOG__LEVEL", "debug")
    monkeypatch.setenv("MARKETFLOW_GENERATOR__RATE", "3")
    loaded = load()
    assert (loaded.mode, loaded.log.level, loaded.generator.rate) == (Mode.LIVE, "DEBUG", 3.0)
    assert isinstance(loaded.mode, Mode)
    assert isinstance(loaded.generator.rate, float)


def test_data_dir_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(None, {"data_dir": "~/data"}).data_dir == tmp_path / "data"
    assert load(None, {"data_dir": "data"}).data_dir == tmp_path / "data"
    assert load(None, {"data_dir": ""}).data_dir == Settings().data_dir


# --- ignored sources


def test_other_sources_of_dynaconf_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written(tmp_path / ".env", "MARKETFLOW_HTTP__PORT=1")
    written(tmp_path / ".secrets.toml", "http = {port = 2}")
    written(tmp_path / "settings.toml", "[http]\nhost = 'file'")
    written(tmp_path / "settings.local.toml", "[http]\nport = 3")
    written(tmp_path / "other.toml", "[http]\nport = 4")
    monkeypatch.setenv("DYNACONF_HTTP__PORT", "5")
    monkeypatch.setenv("SETTINGS_FILE_FOR_DYNACONF", "other.toml")
    monkeypatch.setenv("ENVIRONMENTS_FOR_DYNACONF", "true")
    monkeypatch.setenv("LOAD_DOTENV_FOR_DYNACONF", "true")
    monkeypatch.setenv("HTTP__PORT", "6")
    monkeypatch.setenv("AUTO_CAST_FOR_DYNACONF", "true")
    monkeypatch.setenv("MERGE_ENABLED_FOR_DYNACONF", "true")
    monkeypatch.setenv("YAML_LOADER_FOR_DYNACONF", "unsafe_load")
    monkeypatch.setenv("NESTED_SEPARATOR_FOR_DYNACONF", "o")
    assert load() == Settings(http=HttpSettings(host="file"))
    assert "MARKETFLOW_HTTP__PORT" not in os.environ
    unsafe = written(tmp_path / "c.yaml", "mode: !!python/object/apply:os.getcwd []")
    assert "malformed YAML" in problems(None, unsafe)


def test_service_variables_of_kubernetes_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKETFLOW_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("MARKETFLOW_SERVICE_PORT_HTTP", "8080")
    monkeypatch.setenv("MARKETFLOW_PORT", "tcp://10.0.0.1:8080")
    monkeypatch.setenv("MARKETFLOW_PORT_8080_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("MARKETFLOW_REDIS_PORT", "tcp://10.0.0.2:6379")
    assert load() == Settings()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_current_folder_without_permission_has_no_settings(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o700)
    os.seteuid(65534)
    try:
        given = load()
    finally:
        os.seteuid(0)
    assert given.http == HttpSettings()


# --- errors


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("http.port", 99999, "must be a whole number from 0 to 65535"),
        ("http.port", -1, "must be a whole number from 0 to 65535"),
        ("http.port", True, "must be a whole number from 0 to 65535"),
        ("http.port", 1.5, "must be a whole number from 0 to 65535"),
        ("postgres.port", 0, "must be a whole number from 1 to 65535"),
        ("redis.port", 0, "must be a whole number from 1 to 65535"),
        ("redis.db", -1, "must be a whole number from 0 to 65535"),
        ("redis.ttl_seconds", 0, "must be a whole number of seconds from 1 to 86400"),
        ("flow.workers_per_exchange", 65, "must be a whole number from 1 to 64"),
        ("flow.db_batch_size", 10001, "must be a whole number from 1 to 10000"),
        ("flow.stale_after_seconds", 0, "must be a number of seconds from 0.001 to 86400"),
        ("flow.stale_after_seconds", 1e-7, "must be a number of seconds from 0.001 to 86400"),
        ("flow.max_clock_skew_seconds", 1e-7, "must be a number of seconds from 0.001 to 3600"),
        ("flow.reconnect_after_seconds", 5e-324, "must be a number of seconds from 0.001 to 30"),
        ("generator.rate", 1e-320, "must be a number from 0.001 to 100000"),
        ("flow.late_after_seconds", float("nan"), "must be a number of seconds from 0.001 to 300"),
        ("flow.late_after_seconds", 301, "must be a number of seconds from 0.001 to 300"),
        ("flow.max_clock_skew_seconds", 3601, "must be a number of seconds from 0.001 to 3600"),
        ("flow.reconnect_after_seconds", 31, "must be a number of seconds from 0.001 to 30"),
        ("flow.window_seconds", 7, "must be a whole number of seconds that divides 60"),
        ("flow.window_seconds", 0, "must be a whole number of seconds that divides 60"),
        ("flow.window_seconds", True, "must be a whole number of seconds that divides 60"),
        ("generator.rate", float("inf"), "must be a number from 0.001 to 100000"),
        ("generator.seed", 2**63, "must be a whole number of at most 64 bits, or left out"),
        ("mode", "demo", "must be one of test, live"),
        ("log.level", "LOUD", "must be one of TRACE, DEBUG, INFO, SUCCESS, WARNING, ERROR, CRITICAL"),
        ("log.format", 5, "must be one of text, json"),
        ("postgres.sslmode", "yes", "must be one of disable, allow, prefer, require, verify-ca, verify-full"),
        ("postgres.dbname", "", "must be text that is not empty"),
        ("postgres.user", 7, "must be text that is not empty; put it in quotes"),
        ("http.host", "", "must be a host name or an IP address"),
        ("http.host", "a\nb", "must be a host name or an IP address"),
        ("http.allowed_hosts", 5, 'must be a list of host names, such as ["prices.example.com"]'),
        ("data_dir", 5, 'must be the path of a folder, or "" for the default'),
        ("symbols", [], "must be a list of one or more symbols"),
        ("symbols", ["A", "A"], "must all be different, A is there twice"),
        ("exchanges", [], "must be a list of one or more exchanges"),
        ("exchanges", "x", "must be a list of one or more exchanges"),
        ("history", "1w", 'must be a duration such as "24h", "365d" or "1h30m", or "0s" for none'),
        ("history", 24, 'must be a duration such as "24h", "365d" or "1h30m", or "0s" for none; put it in quotes'),
    ],
)
def test_wrong_value_is_named_with_allowed_values(key: str, value: object, allowed: str) -> None:
    text = problems({key: value})
    assert text.startswith(f"{key} = ")
    assert f": {allowed}" in text
    assert "\n" not in text


def test_history_is_of_venues_and_may_differ_by_exchange() -> None:
    venues = [{"name": "a", "venue": "okx"}, {"name": "b", "venue": "kraken", "history": "2d"}]
    settings = load(None, {"exchanges": [*venues, {"name": "c", "address": "c:1"}], "history": "1h30m"})
    assert [settings.history_ms(each) for each in settings.exchanges] == [5_400_000, 172_800_000, 0]
    assert Settings().history == "24h"
    kept = load(None, {"exchanges": venues, "history": "365d", "archive.keep_minutes": "2d"})
    assert [kept.history_ms(each) for each in kept.exchanges] == [172_800_000, 172_800_000]
    text = problems({"exchanges": [{"name": "b", "venue": "kraken", "history": ""}]})
    assert text.startswith('exchanges[0].history = ""')


@pytest.mark.parametrize("symbol", ["btc", "", "A B", "A" * 33, "-A", "A/B", "Ä", "A\n", 5, None])
def test_wrong_symbol_is_named_by_position(symbol: object) -> None:
    assert problems({"symbols": ["A", symbol]}).startswith("symbols[1] = ")


@pytest.mark.parametrize(
    "address", ["", "a", "a:", ":1", "a:0", "a:65536", "a:1 ", "::1:5", "a:b@c:1", "a:\uff11", 5, "a..b:1"]
)
def test_wrong_address_is_named_by_position(address: object) -> None:
    text = problems({"exchanges": [{"name": "a", "address": address}]})
    assert text.startswith("exchanges[0].address = ")
    assert text.endswith(": must be host:port, the port from 1 to 65535")
    assert problems({"redis.nodes": ["a:1", address]}).startswith("redis.nodes[1] = ")


@pytest.mark.parametrize("host", ["redis..svc", ".svc", f"{'a' * 64}.svc", f"a.{'b' * 64}", "..", "\u00ad.svc"])
def test_host_that_no_resolver_takes_is_refused(host: str) -> None:
    for key in ("http.host", "redis.host", "postgres.host"):
        text = problems({key: host})
        assert text.startswith(f"{key} = ")
        assert ": must be a host name" in text
    venue = {"name": "a", "venue": "okx"}
    assert problems({"exchanges": [venue | {"url": f"wss://{host}:8443/ws"}]}).startswith("exchanges[0].url = ")
    assert problems({"exchanges": [venue | {"rest_url": f"https://{host}"}]}).startswith("exchanges[0].rest_url = ")


@pytest.mark.parametrize(
    "host", ["redis.svc.", "::1", "fe80::1%lo", "10.0.0.1", "b\u00fccher.example", "a_b-c", "a" * 63]
)
def test_host_that_a_resolver_takes_is_accepted(host: str) -> None:
    settings = load(None, {f"{section}.host": host for section in ("http", "redis", "postgres")})
    assert {settings.http.host, settings.redis.host, settings.postgres.host} == {host}


@pytest.mark.parametrize("url", ["wss://[::1", "wss://a:99999", "wss://a:b", "wss://a:0", "wss://?a", "wss://", "a", 5])
def test_wrong_url_of_a_venue_is_named_by_position(url: object) -> None:
    text = problems({"exchanges": [{"name": "a", "venue": "okx", "url": url}]})
    assert text.startswith("exchanges[0].url = ")
    assert text.endswith(": must be a URL that begins with wss:// or ws://")


def test_exchange_cannot_have_the_name_of_the_reference() -> None:
    assert "the median over all exchanges" in problems({"exchanges": [{"name": "Reference", "address": "a:1"}]})


def test_wrong_exchange_is_named_by_position() -> None:
    good = {"name": "a", "address": "a:1"}
    assert problems({"exchanges": [good, {"name": "b:", "address": "b:1"}]}).startswith(
        'exchanges[1].name = "b:": must be'
    )
    assert problems({"exchanges": [good, {"name": "b"}]}).startswith(
        "exchanges[1] = ['name']: must be a table of name and"
    )
    assert problems({"exchanges": [good, 5]}).startswith("exchanges[1] = 5: must be a table of name and address")
    assert "must all be different" in problems({"exchanges": [good, {"name": "A", "address": "b:1"}]})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("flow.stale_after", "flow.stale_after_seconds"),
        ("port", "http.port"),
        ("http_port", "http.port"),
        ("postgres.pasword", "postgres.password"),
        ("symbol", "symbols"),
        ("http.port.x", "http.port"),
    ],
)
def test_unknown_key_is_refused_with_nearest_known_key(key: str, nearest: str) -> None:
    assert problems({key: 1}) == f"{key}: unknown key, did you mean {nearest}?"


@pytest.mark.parametrize("key", [key for key in KEYS if "." in key])
def test_variable_with_one_underscore_names_the_right_one(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    wrong, right = (f"MARKETFLOW_{key.upper().replace('.', separator)}" for separator in ("_", "__"))
    monkeypatch.setenv(wrong, "1")
    assert problems() == f"{wrong}: unknown variable, did you mean {right}?"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("DATA__DIR", "DATA_DIR"), ("HTTP__PROT", "HTTP__PORT"), ("http_port", "HTTP__PORT"), ("SYMBOL", "SYMBOLS")],
)
def test_unknown_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch, wrong: str, right: str) -> None:
    monkeypatch.setenv(f"MARKETFLOW_{wrong}", "1")
    assert problems() == f"MARKETFLOW_{wrong}: unknown variable, did you mean MARKETFLOW_{right}?"


def test_all_problems_are_reported_with_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "c.toml", "http = {port = 70000}\nredis = 5")
    monkeypatch.setenv("MARKETFLOW_FLOW__DB_BATCH_SIZE", "0")
    assert problems({"mode": "demo"}, path).splitlines() == [
        f"http.port = 70000: must be a whole number from 0 to 65535 (from {path})",
        "redis: must be a table of host, port, username, password, tls, tls_ca, tls_cert, tls_key, db, nodes, buckets,"
        f" ttl_seconds (from {path})",
        "flow.db_batch_size = 0: must be a whole number from 1 to 10000 (from MARKETFLOW_FLOW__DB_BATCH_SIZE)",
        'mode = "demo": must be one of test, live',
    ]


TEXT_KEYS = [key for key, kind in KEYS.items() if is_text(kind) and not choices(kind) and key != "data_dir"]


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_undecodable_bytes_are_refused(key: str) -> None:
    assert problems({key: "/a\udcff"}).startswith(f"{key} = ")


@pytest.mark.parametrize("text", ["", "x", "08080", "9" * 5000, "[" * 5000, "tru\ne"])
def test_variable_without_number_is_refused_for_a_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MARKETFLOW_HTTP__PORT", text)
    assert problems().startswith("http.port = ")
    assert len(problems()) < 400


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.toml", None, "can't be read: No such file or directory"),
        ("c.ini", b"", "must be a file that ends in .toml, .yaml, .yml or .json"),
        ("c.toml", b"a = 1\nb = = 2", "malformed: Invalid value (at line 2, column 5)"),
        ("c.json", b'{"mode": }', "malformed: Expecting value: line 1 column 10 (char 9)"),
        ("c.yaml", b"a: 1\nb: [", "malformed YAML: line 2, column 5"),
        ("c.yaml", b"postgres: {password: *hush}", "malformed YAML: line 1, column 22"),
        ("c.toml", b"a = '\xff'", "is not UTF-8 text (byte 5)"),
        ("c.yaml", b"- 1\n- 2", "must hold a table of settings"),
        ("c.json", b"[1]", "must hold a table of settings"),
        ("c.yaml", b"1: 2", "1: unknown key"),
    ],
)
def test_unreadable_file_is_named_with_position(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    text = problems(None, path)
    assert str(path) in text
    assert message in text
    assert "hush-hush-hush-hush" not in text


# --- secrets


@pytest.mark.parametrize(
    "token", ["x", "fifteen-letters", "change-me", "change-me-change-me", "sixteen letters!", "ä" * 16]
)
def test_token_that_can_be_guessed_is_refused(token: str) -> None:
    text = problems({"http.token": token})
    assert text.startswith("http.token = ***: must be at least 16 characters")
    assert token not in text.replace("must not contain change-me", "")


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        (
            "http.allowed_origins",
            "https://a.example, http://localhost:8081",
            ("https://a.example", "http://localhost:8081"),
        ),
        ("http.allowed_origins", ["*"], ("*",)),
        ("http.trusted_proxies", "127.0.0.1 10.0.0.0/8 ::1", ("127.0.0.1", "10.0.0.0/8", "::1")),
    ],
)
def test_origins_and_proxies_may_be_a_list_or_text(key: str, value: object, found: tuple[str, ...]) -> None:
    assert getattr(load(None, {key: value}).http, key.partition(".")[2]) == found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("http.allowed_origins", [text])
            for text in ("example.com", "https://a.example/", "ftp://a", "https://u@a", "")
        ),
        *(("http.trusted_proxies", [text]) for text in ("proxy", "10.0.0.0/33", "", 7)),
        *(("http.streams_per_client", number) for number in (0, 10_001, "x")),
    ],
)
def test_wrong_origins_and_proxies_are_refused(key: str, value: object) -> None:
    assert problems({key: value}).startswith(key)


@pytest.mark.parametrize("key", ["http.token", "postgres.password", "redis.password"])
def test_secrets_are_in_no_message_or_representation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    loaded = load(None, {key: "hush-hush-hush-hush"})
    assert getattr(getattr(loaded, section), name) == "hush-hush-hush-hush"
    assert "hush-hush-hush-hush" not in repr(loaded) + str(loaded) + repr(loaded.__rich_repr__())
    assert f"{name}='***'" in repr(loaded)
    assert problems({key: ["hush-hush-hush-hush"]}).startswith(f"{key} = ***: must be ")
    assert "hush-hush-hush-hush" not in problems({key: "hush\0 \n"})
    assert "hush-hush-hush-hush" not in problems({section: "hush-hush-hush-hush"})
    assert "hush-hush-hush-hush" not in problems({f"{key}x": "hush-hush-hush-hush"})
    assert "4711" not in problems(None, written(tmp_path / "c.yaml", f"{section}: {{{name}: 4711}}"))
    monkeypatch.setenv(f"MARKETFLOW_{section}__{name}", "hush\x01\udcff")
    assert "hush-hush-hush-hush" not in problems({"mode": "demo"})


def test_url_as_host_does_not_show_its_password() -> None:
    assert "hush-hush-hush-hush" not in problems({"postgres.host": "postgresql://me:hush-hush-hush-hush@host/db"})


# --- effective settings


def test_printed_file_loads_the_same_settings(tmp_path: Path) -> None:
    path = written(
        tmp_path / "c.json",
        json.dumps(
            {
                "mode": "live",
                "symbols": ["A", "B-C"],
                "exchanges": [{"name": "a", "address": "[::1]:1"}, {"name": "b.c", "address": "x.example:2"}],
                "data_dir": "/tmp/a 'quoted' \"\\ folder\x7f\n\u00e9\U0001f600 # no comment",
                "http": {"host": "::", "port": 0, "allowed_hosts": ["a.example", "::1"]},
                "postgres": {"user": "m'e", "dbname": 'a "b" = c\u00e9', "sslmode": "verify-full"},
                "flow": {"late_after_seconds": 0.001, "stale_after_seconds": 12.5, "window_seconds": 5},
                "generator": {"seed": -(2**63), "rate": 1},
            }
        ),
    )
    for config in (None, path):
        settings, origins = load_with_origins(config)
        printed = written(tmp_path / "printed.toml", as_toml(effective_values(settings, origins)))
        assert load(printed) == settings
    assert settings != Settings()


def test_printed_file_leaves_secrets_to_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MARKETFLOW_REDIS__PASSWORD", "hush-hush-hush-hush")
    settings, origins = load_with_origins(None, {"http.token": "hush-hush-hush-hush"})
    text = as_toml(effective_values(settings, origins))
    assert "hush-hush-hush-hush" not in text
    assert "# password: a secret, not shown (from MARKETFLOW_REDIS__PASSWORD)" in text
    assert "set it by MARKETFLOW_HTTP__TOKEN" in text
    printed = written(tmp_path / "printed.toml", text)
    assert load(printed, {"http.token": "hush-hush-hush-hush"}) == settings
    monkeypatch.delenv("MARKETFLOW_REDIS__PASSWORD")
    assert load(printed).redis == RedisSettings()


def test_each_key_has_the_source_that_set_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "c.toml", "[http]\nhost = 'file'\nport = 1")
    monkeypatch.setenv("MARKETFLOW_http__PORT", "2")
    settings, origins = load_with_origins(path, {"mode": "live"})
    assert settings == load(path, {"mode": "live"})
    assert origins == {"http.host": str(path), "http.port": "MARKETFLOW_http__PORT", "mode": ""}
    assert {entry.key: entry.source for entry in effective_values(settings, origins)}["log.level"] == "default"


# --- options


def test_text_of_an_option_is_checked_by_its_key() -> None:
    assert convert("http.port", "0") == 0
    assert convert("symbols", "A,B") == ("A", "B")
    assert convert("exchange.name", "007") == "007"
    with pytest.raises(SettingsError, match=r"^99999: must be a whole number from 0 to 65535$"):
        convert("http.port", "99999")
    with pytest.raises(SettingsError, match=r"^\[0\] = \"a\": must be 1 to 32"):
        convert("symbols", "a")


# --- alerts

HOOK = {"webhook": {"url": "https://hooks.example.com/T0/path-is-a-secret", "secret": "sixteen-characters"}}


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "price", "symbol": "btcusdt", "exchange": "EXCHANGE1", "level": 70000, "direction": "up"},
        {"kind": "price", "symbol": "BTCUSDT", "exchange": "reference", "level": 0.5, "once": True, "cooldown": "0s"},
        {"kind": "change", "symbol": "BTCUSDT", "percent": 2.5, "period": "24h", **HOOK},
        {"KIND": "gap", "Symbol": "BTCUSDT", "BASIS_POINTS": 20},
        {"kind": "stale", "name": "feeds"},
        {"kind": "hole", "symbol": "ETHUSDT"},
    ],
)
def test_alert_rules_are_accepted_and_shown_as_toml(rule: dict[str, object], tmp_path: Path) -> None:
    loaded, origins = load_with_origins(None, {"alerts": [rule]})
    assert len(loaded.alerts) == 1
    shown = as_toml(effective_values(loaded, origins))
    assert "secret-" not in shown
    assert "path-is" not in shown
    (again,) = load(written(tmp_path / "shown.toml", shown)).alerts
    assert without_webhook(loaded.alerts[0]) == again


def test_alert_rules_get_the_configured_spelling() -> None:
    (rule,) = load(
        None, {"alerts": [{"kind": "price", "symbol": "btcusdt", "exchange": "Exchange1", "level": 1}]}
    ).alerts
    assert isinstance(rule, PriceRule)
    assert (rule.symbol, rule.exchange) == ("BTCUSDT", "exchange1")


def hooked(**webhook: str) -> dict[str, object]:
    return {"kind": "stale", "webhook": webhook}


@pytest.mark.parametrize(
    ("alerts", "message"),
    [
        ("up", 'alerts = "up": must be a list of rules'),
        ([7], "alerts[0] = 7: must be a list of rules"),
        (
            [{"kind": "moon", "symbol": "BTCUSDT"}],
            "alerts[0] = ['kind', 'symbol']: must be a rule: `kind` must be one of",
        ),
        ([{"kind": "gap", "symbol": "BTCUSDT"}], "`basis_points` is missing, which must be a number above 0"),
        ([{"kind": "price", "symbol": "BTCUSDT", "level": -1}], "`level` must be a number above 0"),
        ([{"kind": "price", "symbol": "BTCUSDT", "level": 1, "moon": 1}], "a rule of this kind has no key `moon`"),
        ([{"kind": "price", "symbol": "XYZ", "level": 1}], "alerts[0]: symbol must be one of those configured"),
        ([{"kind": "stale", "exchange": "reference"}], "alerts[0]: exchange must be one of those configured"),
        ([hooked(url="https://a.example/")], "`webhook.secret` is missing"),
        ([hooked(url="https://a.example/", secret="short")], "`webhook.secret` must be a text of 16"),
        ([hooked(url="ftp://a.example/", secret="sixteen-characters")], "`webhook.url` must be http"),
        ([hooked(url="https://u:p@a.example/", secret="sixteen-characters")], "`webhook.url` must be http"),
        ([hooked(url="http://a:99999/", secret="sixteen-characters")], "`webhook.url` must be http"),
        ([{"kind": "stale"}, {"kind": "stale", **HOOK}], "alerts[1] = ['kind', 'webhook']: must all be"),
    ],
)
def test_wrong_alert_rules_are_named_without_their_values(alerts: object, message: str) -> None:
    shown = problems({"alerts": alerts})
    assert message in shown
    assert "sixteen" not in shown
    assert "path-is" not in shown


def test_exchange_may_be_divided_into_shards() -> None:
    loaded = load(None, {"exchanges": [{"name": "a", "address": "x:1", "shards": 2}, {"name": "b", "venue": "okx"}]})
    assert loaded.shards.names == ("a/1of2", "a/2of2", "b")
    text = problems({"exchanges": [{"name": "a", "address": "x:1", "shards": 0}]})
    assert text.startswith("exchanges[0].shards = 0: must be a whole number from 1 to 64")

"""What is sent to PostgreSQL over a network, and to whom, with real TLS."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from marketflow.cli.export.row_reader import snapshot
from marketflow.errors import Unavailable
from marketflow.resources import resource
from marketflow.stores.postgres import rows
from marketflow.stores.postgres.rows import connection_keywords, is_local
from marketflow.stores.postgres.writer import PostgresWriter
from tests.support.servers import HOST
from tests.support.tls import OPENSSL, TlsSession, certificate, tls_front


class _PostgresSession(TlsSession):
    """TLS as PostgreSQL does it: once it was asked for."""

    def is_asked_for(self) -> bool:
        # Without an SSLRequest what would be sent in the clear gets no answer.
        if self.request.recv(8, socket.MSG_WAITALL)[4:] != bytes.fromhex("04d2162f"):
            return False
        self.request.sendall(b"S")
        return True


@contextmanager
def with_tls(place: dict[str, Any], key: Path, crt: Path) -> Iterator[dict[str, Any]]:
    """Keywords of connections to a server by TLS."""
    with tls_front(place["port"], key, crt, _PostgresSession) as port:
        yield place | {"port": port}


@pytest.fixture
def over_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address is this machine's."""
    monkeypatch.setattr(rows, "is_local", lambda host: False)


_resolve = socket.getaddrinfo


def resolve(host: str, *others: Any, **keywords: Any) -> list[Any]:
    """Resolve hosts; that of the certificate has two addresses, of which the second has a server."""
    if host == "database.example":
        return [(0, 0, 0, "", (address, 0)) for address in ("127.0.0.2", HOST)]
    return _resolve(host, *others, **keywords)


def write(keywords: dict[str, Any]) -> None:
    with closing(PostgresWriter(keywords, resource("ddl"), 10)) as archive:
        archive.write({})


@pytest.mark.skipif(OPENSSL is None, reason="there is no openssl")
@pytest.mark.usefixtures("over_a_network")
def test_only_a_server_with_the_right_certificate_is_written_to(
    postgres_db: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, crt = certificate(tmp_path, "server", f"IP:{HOST}")
    _, other = certificate(tmp_path, "other", f"IP:{HOST}")
    named_key, named = certificate(tmp_path, "named", "DNS:database.example")
    with with_tls(postgres_db, key, crt) as place:
        write(connection_keywords(**place))  # encrypted
        write(connection_keywords(**place, sslrootcert=str(crt)))
        with snapshot(connection_keywords(**place, sslrootcert=str(crt))) as connection:
            assert connection.info.pgconn.ssl_in_use
        with pytest.raises(Unavailable, match="certificate verify failed"):
            write(connection_keywords(**place, sslrootcert=str(other)))
        with pytest.raises(Unavailable, match="certificate"):
            write(connection_keywords(**place, sslrootcert=str(tmp_path / "none.crt")))
    with with_tls(postgres_db, named_key, named) as place:
        with pytest.raises(Unavailable, match="does not match host name"):
            write(connection_keywords(**place, sslrootcert=str(named)))
        write(connection_keywords(**place, sslrootcert=str(named), sslmode="verify-ca"))
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        write(connection_keywords(**place | {"host": "database.example"}, sslrootcert=str(named)))


@pytest.mark.usefixtures("over_a_network")
def test_password_is_sent_in_the_clear_on_purpose_only(postgres_db: dict[str, Any]) -> None:
    with pytest.raises(Unavailable, match="SSL"):
        write(connection_keywords(**postgres_db))
    for sslmode in ("prefer", "disable"):
        write(connection_keywords(**postgres_db, sslmode=sslmode))


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("/run/postgresql", True),
        ("10.0.0.5", False),
        ("0.0.0.0", False),
        ("fe80::1%eth0", False),
        ("postgres", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
    ],
)
def test_sslmode_depends_on_whose_host_it_is(host: str, local: bool) -> None:
    assert is_local(host) is local
    assert connection_keywords(host, 5432, "u", "p", "d")["sslmode"] == ("prefer" if local else "require")
    verified = connection_keywords(host, 5432, "u", "p", "d", sslrootcert="/ca.crt")
    assert verified["sslmode"] == ("prefer" if local else "verify-full")
    assert connection_keywords(host, 5432, "u", "p", "d", "verify-ca")["sslmode"] == "verify-ca"

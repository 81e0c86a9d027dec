"""Faults of a real Redis: each lasts as long as its block."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.servers import HOST, RedisServer, free_port


@contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    """The process is killed; a new one starts on the same data after the block."""
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """The process is stopped by SIGSTOP: connections stay open and nothing is answered."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


@contextmanager
def out_of_memory(server: RedisServer) -> Iterator[None]:
    """Writes are refused, reads are answered."""
    with server.client() as client:
        client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


@contextmanager
def read_only(server: RedisServer) -> Iterator[None]:
    """The server is the replica of one that does not exist, as after a failover."""
    with server.client() as client:
        client.replicaof(HOST, str(free_port()))
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")

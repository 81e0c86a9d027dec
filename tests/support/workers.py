"""The processes that share the port of one application."""

import json
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from typing import Any

import psutil

from tests.support.application import Application
from tests.support.servers import HOST

CONNECTIONS = 16
"""Enough that nearly always each of a few processes accepts one of them."""


def children(application: Application) -> set[int]:
    """The processes that an application has started."""
    return {child.pid for child in psutil.Process(application.process.pid).children()}


def ask_workers(application: Application, path: str) -> dict[int, Any]:
    """Send a request on many connections; gives a good answer of each process that has one."""
    with ExitStack() as stack:
        answers: dict[int, Any] = {}
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(closing(HTTPConnection(HOST, application.port, timeout=5)))
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status == 200:
                answers[connection.sock.getsockname()[1]] = json.loads(body)
        return {
            pid: answers[each.raddr[1]]
            for pid in children(application)
            for each in psutil.Process(pid).net_connections("tcp")
            if each.raddr and each.raddr[1] in answers
        }

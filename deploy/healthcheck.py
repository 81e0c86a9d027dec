"""The image's health check: exit code 0 if the application in this container answers /livez, else 1.

Port and names come from the same settings.toml and the same variables as the application's; flags are not read.
"""

import http.client
import ipaddress
import sys

from marketflow.settings import HttpSettings, load

TIMEOUT_SECONDS = 4.0
"""Less than the health check itself may take."""


def answers(settings: HttpSettings) -> bool:
    """Whether /livez is answered as it should be."""
    name = next((name for name in settings.allowed_hosts if name != "*"), "localhost")
    connection = http.client.HTTPConnection(_reachable(settings.host), settings.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/livez", headers={"Host": name})
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _reachable(host: str) -> str:
    """An address by which to reach what listens there: 0.0.0.0 and :: are every one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host


if __name__ == "__main__":
    sys.exit(0 if answers(load().http) else 1)

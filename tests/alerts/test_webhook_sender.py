"""Posts to webhooks over real sockets: signed, not redirected, and ended in time."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from marketflow.alerts.alert_model import Webhook
from marketflow.alerts.webhook_sender import WebhookSender, signature
from marketflow.clock import system_clock
from tests.support.servers import HOST, free_port
from tests.support.tls import OPENSSL, certificate, tls_front
from tests.support.webhook_receiver import SECRET, WebhookReceiver


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as receiver:
        yield receiver


@pytest.fixture
def sender() -> Iterator[WebhookSender]:
    sender = WebhookSender(system_clock, seconds=1.0)
    yield sender
    sender.close()


@pytest.fixture
def patient_sender() -> Iterator[WebhookSender]:
    sender = WebhookSender(system_clock, seconds=30.0)
    yield sender
    sender.close()


def test_post_is_signed_and_has_the_id_of_its_event(receiver: WebhookReceiver, sender: WebhookSender) -> None:
    assert sender.post(receiver.webhook, "e1", '{"text":"\u20ac"}').error is None
    (post,) = receiver.posts
    assert (post.path, post.id, post.event) == ("/hooks/path-secret", "e1", {"text": "\u20ac"})
    assert post.headers["content-type"] == "application/json"
    assert post.is_signed
    assert abs(int(post.headers["marketflow-timestamp"]) - time.time()) < 5


def test_signature_is_that_of_timestamp_and_body() -> None:
    # python -c 'import hmac; print(hmac.digest(b"secret", b"1700000000.{}", "sha256").hex())'
    expected = "v1=b8569b78799ff9e3cbff0fc2d63a33a2b57f3282abd07c37ae5e8e7d79a5f163"
    assert signature("secret", 1_700_000_000, b"{}") == expected


@pytest.mark.parametrize(("status", "error"), [(200, None), (299, None), (404, "status 404"), (503, "status 503")])
def test_only_a_2xx_acknowledges(
    receiver: WebhookReceiver, sender: WebhookSender, status: int, error: str | None
) -> None:
    receiver.status = status
    assert sender.post(receiver.webhook, "e1", "{}").error == error


def test_redirect_is_not_followed(receiver: WebhookReceiver, sender: WebhookSender) -> None:
    with WebhookReceiver() as other:
        receiver.status, receiver.answer_headers = 307, {"Location": f"{other.place}/inside"}
        assert sender.post(receiver.webhook, "e1", "{}").error == "status 307"
        assert other.posts == []


@pytest.mark.parametrize(("given", "seconds"), [("7", 7.0), ("999999", 3600.0), ("soon", 0.0), ("-1", 0.0)])
def test_retry_after_is_obeyed_up_to_an_hour(
    receiver: WebhookReceiver, sender: WebhookSender, given: str, seconds: float
) -> None:
    receiver.status, receiver.answer_headers = 429, {"Retry-After": given}
    assert sender.post(receiver.webhook, "e1", "{}").retry_after_seconds == seconds


def test_receiver_that_does_not_answer_is_given_up_in_time(receiver: WebhookReceiver, sender: WebhookSender) -> None:
    go = threading.Event()
    receiver.before_answer = lambda: go.wait(10)
    began = time.monotonic()
    assert sender.post(receiver.webhook, "e1", "{}").error == "no answer within 1 s"
    assert time.monotonic() - began < 3
    go.set()


def test_answer_that_drips_is_given_up_in_time(sender: WebhookSender) -> None:
    """A byte now and then keeps each read within its timeout, but not the whole."""
    with socket.create_server((HOST, 0)) as listener:

        def drip() -> None:
            client, _ = listener.accept()
            with client:
                try:
                    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
                        client.sendall(bytes([byte]))
                        time.sleep(0.05)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        assert sender.post(Webhook(f"http://{HOST}:{listener.getsockname()[1]}/", SECRET), "e1", "{}").error
        assert time.monotonic() - began < 3


def test_endless_body_is_not_read(sender: WebhookSender) -> None:
    with socket.create_server((HOST, 0)) as listener:

        def pour() -> None:
            client, _ = listener.accept()
            with client:
                try:
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    while True:
                        client.sendall(b"x" * 65536)
                except OSError:
                    pass

        threading.Thread(target=pour, daemon=True).start()
        began = time.monotonic()
        assert sender.post(Webhook(f"http://{HOST}:{listener.getsockname()[1]}/", SECRET), "e1", "{}").error is None
        assert time.monotonic() - began < 3


def test_unreachable_receiver_is_an_error_without_its_address(patient_sender: WebhookSender) -> None:
    error = patient_sender.post(Webhook(f"http://{HOST}:{free_port()}/path-secret", SECRET), "e1", "{}").error
    assert error == "Connection refused"


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"", "Server disconnected"), (b"SSH-2.0-secret\x1b\r\n", "Server disconnected|illegal status line")],
)
def test_answer_that_is_no_http_is_described(patient_sender: WebhookSender, answer: bytes, words: str) -> None:
    with socket.create_server((HOST, 0)) as listener:

        def answer_once() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        threading.Thread(target=answer_once, daemon=True).start()
        error = (
            patient_sender.post(Webhook(f"http://{HOST}:{listener.getsockname()[1]}/", SECRET), "e1", "{}").error or ""
        )
    assert re.search(words, error)
    assert "\x1b" not in error


def test_failed_lookup_is_described_in_words(patient_sender: WebhookSender, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert (
        patient_sender.post(Webhook("http://nowhere.invalid/", SECRET), "e1", "{}").error == "Name or service not known"
    )


@pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
def test_distrusted_certificate_is_described(
    receiver: WebhookReceiver, patient_sender: WebhookSender, tmp_path: Path
) -> None:
    with tls_front(
        int(receiver.place.rpartition(":")[2]), *certificate(tmp_path, "other", "DNS:other.example")
    ) as port:
        error = patient_sender.post(Webhook(f"https://{HOST}:{port}/", SECRET), "e1", "{}").error
    assert error == "TLS: certificate verify failed: self-signed certificate"
    assert receiver.posts == []


def test_receiver_without_tls_is_described(receiver: WebhookReceiver, patient_sender: WebhookSender) -> None:
    error = patient_sender.post(Webhook(receiver.place.replace("http", "https"), SECRET), "e1", "{}").error or ""
    assert error.startswith("TLS: ")


def test_receiver_whose_name_hangs_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, sender: WebhookSender) -> None:
    going = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: going.wait(30))
    began = time.monotonic()
    assert sender.post(Webhook("http://hangs.invalid/", SECRET), "e1", "{}").error == "no answer within 1 s"
    assert time.monotonic() - began < 5
    going.set()


def test_close_ends_a_post_that_is_under_way(receiver: WebhookReceiver) -> None:
    sender = WebhookSender(system_clock, seconds=30.0)
    go = threading.Event()
    posted = threading.Event()

    def wait() -> None:
        posted.set()
        go.wait(10)

    receiver.before_answer = wait
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(sender.post(receiver.webhook, "e1", "{}").error))
    thread.start()
    assert posted.wait(5)
    sender.close()
    thread.join(3)
    go.set()
    assert results == ["stopping"]
    assert sender.post(receiver.webhook, "e2", "{}").error == "stopping"
    assert len(receiver.posts) == 1


def test_http_client_is_loaded_with_the_first_post_only() -> None:
    modules = "marketflow.runtime.processes, marketflow.runtime.engine"
    code = f"import sys, {modules}; print([name for name in sys.modules if name == 'httpx'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "[]\n"

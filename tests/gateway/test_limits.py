"""What strangers send is bounded in bytes and time, and a gateway that is told to stop ends politely."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import socket
import threading
from collections.abc import Callable

import pytest
from support.gateway import PATIENCE_S, Gateway, Hold, eventually

from shoal.errors import UsageError
from shoal.gateway.limits import Limits
from shoal.gateway.server import _listen, serve

Start = Callable[[Limits], Gateway]
BODY = {"model": "plain", "prompt": "hi"}


def connect(gateway: Gateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.listening.port), timeout=PATIENCE_S)


def head(gateway: Gateway, *lines: str) -> bytes:
    fixed = ["POST /v1/completions HTTP/1.1", "host: localhost", f"authorization: Bearer {gateway.key}"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def answer_of(connection: socket.socket) -> tuple[int, dict[str, object]]:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())["error"]


def test_a_declared_body_that_is_too_large_is_refused_before_it_is_sent(start: Start) -> None:
    gateway = start(Limits(body_bytes=1000))
    with connect(gateway) as connection:
        connection.sendall(head(gateway, "content-length: 1001", "expect: 100-continue"))
        status, error = answer_of(connection)
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_chunked_body_is_counted_while_it_is_read(start: Start) -> None:
    gateway = start(Limits(body_bytes=1000))
    with connect(gateway) as connection:
        connection.sendall(head(gateway, "transfer-encoding: chunked"))
        for _ in range(400):
            connection.sendall(b"5\r\nhello\r\n")
        status, error = answer_of(connection)
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_refused_body_that_never_ends_is_cut_off(start: Start) -> None:
    gateway = start(Limits(body_bytes=1000))
    with connect(gateway) as connection:
        connection.sendall(head(gateway, "transfer-encoding: chunked"))
        sent = 0

        def send_for_ever() -> None:
            nonlocal sent
            while sent < 1_000_000:
                connection.sendall(b"5\r\nhello\r\n" * 100)
                sent += 1

        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            send_for_ever()
    assert sent > 1


def test_a_body_that_comes_too_slowly_is_408(start: Start) -> None:
    gateway = start(Limits(body_timeout_s=0.1))
    with connect(gateway) as connection:
        connection.sendall(head(gateway, "content-length: 30") + b'{"model":')
        status, error = answer_of(connection)
    assert (status, error["code"]) == (408, "body_timeout")


@pytest.mark.parametrize("begun", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: local"])
def test_a_head_that_does_not_come_closes_the_connection(start: Start, begun: bytes) -> None:
    gateway = start(Limits(head_timeout_s=0.1))
    with connect(gateway) as connection:
        connection.sendall(begun)
        assert connection.recv(1) == b""


def test_a_second_head_that_drips_closes_the_connection_too(start: Start) -> None:
    gateway = start(Limits(head_timeout_s=0.1))
    with connect(gateway) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.read() == b'{"status":"ok"}'
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        assert connection.recv(1) == b""


def test_a_head_that_is_too_long_is_400(start: Start) -> None:
    gateway = start(Limits())
    with connect(gateway) as connection:
        connection.sendall(head(gateway, "x: " + "y" * 100_000))
        status, _ = answer_of(connection)
    assert status == 400


@pytest.mark.parametrize("more", [b"zz\r\n", b"-5\r\nhello\r\n"])
@pytest.mark.parametrize("method", [b"POST", b"HEAD"])
@pytest.mark.parametrize("path", [b"/no/such/page", b"/v1/completions"])
def test_broken_bytes_behind_a_request_leave_no_error_in_the_log(
    start: Start, caplog: pytest.LogCaptureFixture, method: bytes, path: bytes, more: bytes
) -> None:
    # 400 is said while the request before the bytes is still being answered: two answers, of which one must give way.
    gateway = start(Limits())
    with connect(gateway) as connection:
        connection.sendall(
            method + b" " + path + b" HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" + more
        )
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 4")
    with gateway.http() as client:
        assert client.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_connections_are_bounded(start: Start) -> None:
    gateway = start(Limits(connections=2))

    def answered(connection: socket.socket) -> bool:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            return connection.recv(8) == b"HTTP/1.1"
        except ConnectionError:
            return False

    with connect(gateway) as first, connect(gateway) as second, connect(gateway) as third:
        assert [answered(connection) for connection in (first, second, third)] == [True, True, False]

    def another_one_is_answered() -> bool:
        with connect(gateway) as connection:
            return answered(connection)

    assert eventually(another_one_is_answered)


def test_compressed_bodies_are_refused(gateway: Gateway) -> None:
    with gateway.http() as client:
        answer = client.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")


def test_a_client_that_leaves_in_the_middle_of_its_body_frees_its_place(start: Start) -> None:
    gateway = start(Limits(requests=1))
    with connect(gateway) as connection:
        connection.sendall(head(gateway, "content-length: 1000") + b"{")

        def refused() -> bool:
            with gateway.http() as client:
                return client.post("/v1/completions", json=BODY).status_code == 429

        assert eventually(refused)
    assert eventually(lambda: not refused())


def test_running_streams_may_end_when_the_gateway_stops(start: Start) -> None:
    gateway = start(Limits())
    hold = Hold()
    gateway.plain.does(40, hold, 41, 1)
    body = {**BODY, "stream": True}
    with gateway.http() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        assert hold.reached.wait(PATIENCE_S)
        stopping = threading.Thread(target=gateway.stop)
        stopping.start()
        assert eventually(lambda: not listens(gateway))
        hold.release.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()


def test_a_stream_that_outlasts_the_end_is_told_so(start: Start) -> None:
    gateway = start(Limits(shutdown_s=1))
    gateway.plain.does(40, Hold())
    body = {**BODY, "stream": True}
    with gateway.http() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        stopping = threading.Thread(target=gateway.stop)
        stopping.start()
        text = answer.read().decode()
    stopping.join(PATIENCE_S)
    last = json.loads(text.strip().split("\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "interrupted"
    assert gateway.plain.calls[0].closed.is_set()


def fill_the_pipe(gateway: Gateway, connection: socket.socket) -> None:
    """Ask for more than the kernel's buffers hold, read none of it, and wait until the gateway cannot send on."""
    gateway.plain.script = lambda call: itertools.chain(itertools.repeat(40, call.max_tokens))
    body = json.dumps({**BODY, "stream": True, "max_tokens": 500, "n": 32, "logprobs": 5}).encode()
    connection.sendall(head(gateway, f"content-length: {len(body)}") + body)
    assert eventually(lambda: len(gateway.plain.calls) == 32)
    assert eventually(lambda: all(call.closed.is_set() for call in gateway.plain.calls))


def unread_connection(gateway: Gateway) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", gateway.listening.port))
    return connection


def running_requests(gateway: Gateway) -> float | None:
    return gateway.metrics.registry.get_sample_value("shoal_num_requests_running")


def test_a_client_that_reads_no_more_gives_its_place_back(start: Start) -> None:
    gateway = start(Limits(send_timeout_s=0.2, requests=1, shutdown_s=1))
    with unread_connection(gateway) as connection:
        fill_the_pipe(gateway, connection)
        assert eventually(lambda: running_requests(gateway) == 0)
        value = gateway.metrics.registry.get_sample_value("shoal_request_errors_total", {"code": "client_gone"})
        assert value == 1


def test_a_client_that_reads_no_more_does_not_keep_the_gateway_from_stopping(start: Start) -> None:
    gateway = start(Limits(shutdown_s=1))
    with unread_connection(gateway) as connection:
        fill_the_pipe(gateway, connection)
        assert running_requests(gateway) == 1
        gateway.stop()


def listens(gateway: Gateway) -> bool:
    try:
        connect(gateway).close()
    except ConnectionRefusedError:
        return False
    return True


async def serve_once(host: str, port: int) -> None:
    async with serve(None, host, port):  # type: ignore[arg-type]  # refused before the application is looked at
        pass


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("0.0.0.0", "Without TLS"),
        ("192.168.1.5", "Without TLS"),
        ("::", "Without TLS"),
        ("example.org", "no IP address"),
        ("", "no IP address"),
    ],
)
def test_without_tls_only_this_machine_is_listened_on(host: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        asyncio.run(serve_once(host, 0))
    assert "127.0.0.1" in caught.value.hint


def test_a_port_in_use_is_said_with_a_way_out(gateway: Gateway) -> None:
    with pytest.raises(UsageError, match=f"port {gateway.listening.port}") as caught:
        asyncio.run(serve_once("127.0.0.1", gateway.listening.port))
    assert "another port" in caught.value.hint
    with pytest.raises(UsageError, match="no port 70000"):
        asyncio.run(serve_once("127.0.0.1", 70000))


def test_small_chunks_leave_at_once() -> None:
    # asyncio turns off the kernel's collecting of small packets only for sockets that name their protocol.
    with _listen("127.0.0.1", 0, encrypted=False) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_the_real_port_is_told(gateway: Gateway) -> None:
    assert gateway.listening.port > 0
    assert gateway.listening.url == f"http://127.0.0.1:{gateway.listening.port}"

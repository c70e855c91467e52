"""Whatever bytes come in, the answer is an answer or the caller's error: never a 500, and the gateway lives on."""

from __future__ import annotations

import copy
import http.client
import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.gateway import PATIENCE_S, Gateway

from shoal.gateway.limits import Limits

CHAT = {
    "model": "org/chatty:1b",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "x"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
    ],
    "max_completion_tokens": 8,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "n": 2,
    "stop": ["wo"],
    "presence_penalty": 0.5,
    "logit_bias": {"5": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "stream": False,
    "response_format": {"type": "text"},
    "user": "u",
}
COMPLETION = {
    "model": "plain",
    "prompt": [[5, 6], [7]],
    "max_tokens": 8,
    "n": 2,
    "logprobs": 1,
    "stop": "x",
    "ignore_eos": False,
    "stream": True,
    "stream_options": {"include_usage": True},
    "suffix": None,
}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 5, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, -1e-320),
    *("", "x", "text", "assistant", "\x00", "�", "\U0010ffff", "é" * 300, "9" * 50, "_5", "٣", "$.a[...]"),
    *([], {}, [[]], [None], [{}], [1, "a", []], {"type": "image_url"}, {"": None}, [[[[[1]]]]], ["a"] * 40),
]


def mutated(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """The body with one to three of its parts, at any depth, replaced, removed, or joined by a stranger."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        node: Any = body
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys) if keys else None
            deeper = key is not None and isinstance(node[key], dict | list) and bool(node[key])
            if not deeper or rng.random() < 0.4:
                break
            node = node[key]
        action = rng.random()
        if action < 0.7 and key is not None:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.85 and key is not None:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice(["extra", "tools", "echo", "stream", "n", "x\r\ny", "é"])] = copy.deepcopy(
                rng.choice(VALUES)
            )
        else:
            node.append(copy.deepcopy(rng.choice(VALUES)))
    return body


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, lost, repeated or made up."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(damaged) + 1)
        action = rng.randrange(4)
        if action == 0:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del damaged[at : at + rng.randint(1, 20)]
        elif action == 2:
            damaged[at:at] = rng.choice(
                [b'"', b"\\ud800", b"\\u0000", b"{", b"]", b"1e999", b"\xff", b"," * 9, b"[" * 2000]
            )
        else:
            damaged[at:at] = damaged[: rng.randint(0, 40)]
    return bytes(damaged)


def bodies(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    for _ in range(count):
        path, body = rng.choice([("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
        data = json.dumps(mutated(rng, body), ensure_ascii=rng.random() < 0.5).encode()
        yield path, damaged(rng, data) if rng.random() < 0.3 else data


@pytest.mark.parametrize("seed", range(4))
def test_no_body_makes_the_gateway_fail(gateway: Gateway, seed: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.listening.port, timeout=PATIENCE_S)
    headers = {"authorization": f"Bearer {gateway.key}"}
    statuses: dict[int, int] = {}
    for path, body in bodies(seed, 300):
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        assert answer.status == 200 or 400 <= answer.status < 500, (path, body, text)
        if answer.status != 200:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}, (path, body)
        else:
            assert b'"error"' not in text, (path, body, text)
    connection.close()
    # The mutations are neither all harmless nor all fatal, so both ways are walked.
    assert statuses[200] > 30
    assert statuses[400] > 30


def test_no_request_head_makes_the_gateway_fail(start: Callable[[Limits], Gateway]) -> None:
    gateway = start(Limits(head_timeout_s=0.05, body_timeout_s=0.05))
    rng = random.Random(5)
    body = json.dumps({"model": "plain", "prompt": "hi"}).encode()
    head = (
        f"POST /v1/completions?x=1 HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode()
    seen = set()
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", gateway.listening.port), timeout=PATIENCE_S) as connection:
            connection.sendall(damaged(rng, head) + body)
            answer = connection.makefile("rb").readline()
        status = int(answer.split()[1]) if answer else None  # a head that never ended
        assert status is None or status == 200 or 400 <= status < 500, (status, head)
        seen.add(status)
    assert {200, 400} <= seen
    with gateway.http() as client:
        assert client.post("/v1/completions", content=body).status_code == 200

"""What the audit log says about requests, and when: before the first byte of an answer, and before the last."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.auditlog import log_of, verdict
from support.gateway import Gateway, Given, Hold, ScriptedModel, byte_level_tokenizer, eventually, running

from shoal.errors import PolicyUnmet, SwarmIncomplete
from shoal.gateway.accounts import Account
from shoal.gateway.audit import Audit
from shoal.gateway.errors import AuditUnavailable
from shoal.gateway.limits import Limits
from shoal.hostile.edits import files_of, put_files
from shoal.manifest.chain import Entry
from shoal.spec.ids import BlockRange

CHAIN = (Given("n1", "0:4"), Given("n2", "4:8"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def gateway(tmp_path: Path, home: Path) -> Iterator[Gateway]:
    with running(tmp_path, Limits(requests=16), log_of(home)) as gateway:
        yield gateway


def entries(home: Path) -> list[Entry]:
    found: list[Entry] = []
    assert verdict(home, on_entry=found.append).whole
    return [entry for entry in found if entry.kind.startswith("request")]


def asked(gateway: Gateway, text: str = "a secret", key: str | None = None, **fields: Any) -> Any:
    with gateway.client(key) as client:
        return client.chat.completions.with_raw_response.create(
            model="org/chatty:1b", messages=[{"role": "user", "content": text}], max_tokens=4, **fields
        )


def test_a_request_is_in_the_log_with_everyone_who_computed_it_and_without_its_text(
    gateway: Gateway, home: Path
) -> None:
    gateway.chatty.does(*CHAIN, 5, 6, 7, 8)
    answer = asked(gateway)
    begun, ended = entries(home)
    assert (begun.kind, ended.kind) == ("request.hosts", "request")
    about = {"request": answer.headers["x-request-id"], "key": 1, "model": "org/chatty:1b", "zones": ""}
    hosts = [["n1", "0:4"], ["n2", "4:8"]]
    assert begun.data == {**about, "hosts": hosts}
    usage = answer.parse().usage
    counted = {"outcome": "ok", "prompt_tokens": usage.prompt_tokens, "tokens": 4}
    assert ended.data == {**about, **counted, "hosts": hosts}
    assert b"secret" not in (home / "audit.jsonl").read_bytes()


def test_the_machines_are_in_the_log_before_the_first_byte_and_the_end_before_the_last(
    gateway: Gateway, home: Path
) -> None:
    hold, late = Hold(), Hold()
    gateway.chatty.does(*CHAIN, None, hold, 5, late, Given("n3", "4:8"), 6, 7, 8)
    with gateway.client() as client:
        stream = client.chat.completions.create(
            model="org/chatty:1b", messages=[{"role": "user", "content": "x"}], max_tokens=4, stream=True
        )
        assert [entry.kind for entry in entries(home)] == ["request.hosts"]
        hold.release.set()
        late.release.set()
        for _ in stream:
            pass
    *_, moved, ended = entries(home)
    assert moved.data["hosts"] == [["n3", "4:8"]]
    assert ended.data["hosts"] == [["n1", "0:4"], ["n2", "4:8"], ["n3", "4:8"]]


def test_requests_that_fail_or_are_left_are_in_the_log_too(gateway: Gateway, home: Path) -> None:
    gateway.chatty.does(*CHAIN, 5, SwarmIncomplete("gone"))
    with pytest.raises(openai.InternalServerError):
        asked(gateway)
    assert entries(home)[-1].data["outcome"] == "swarm_incomplete"
    assert entries(home)[-1].data["hosts"] == [["n1", "0:4"], ["n2", "4:8"]]
    gateway.chatty.does(PolicyUnmet("The trust zone cannot be met."))
    with pytest.raises(openai.InternalServerError) as caught:
        asked(gateway)
    assert caught.value.status_code == 503
    assert caught.value.code == "policy_unmet"
    assert (entries(home)[-1].data["outcome"], entries(home)[-1].data["hosts"]) == ("policy_unmet", [])
    hold = Hold()
    gateway.chatty.does(*CHAIN, None, 5, hold)
    with gateway.client() as client:
        stream = client.chat.completions.create(
            model="org/chatty:1b", messages=[{"role": "user", "content": "x"}], max_tokens=4, stream=True
        )
        next(iter(stream))
        stream.close()
    assert eventually(lambda: entries(home)[-1].data.get("outcome") == "client_gone")
    assert entries(home)[-1].data["hosts"] == [["n1", "0:4"], ["n2", "4:8"]]


def test_the_zone_of_a_key_goes_to_the_model_and_into_the_log(gateway: Gateway, home: Path) -> None:
    gateway.chatty.says("hello")
    asked(gateway, key=gateway.zoned_key)
    assert [str(zone) for zone in gateway.chatty.calls[-1].zones] == ["first=2:hq"]
    assert (entries(home)[-1].data["zones"], entries(home)[-1].data["key"]) == ("first=2:hq", gateway.zoned.id)


def test_every_kind_of_request_is_in_the_log(gateway: Gateway, home: Path) -> None:
    gateway.plain.does(*CHAIN, 5, 6)
    gateway.plain.embedding_script = lambda call: CHAIN
    with gateway.client() as client:
        client.completions.create(model="plain", prompt="x", max_tokens=2)
        client.embeddings.create(model="plain", input=["x", "y"])
        gateway.chatty.does(*CHAIN, 5, 6)
        client.responses.create(model="org/chatty:1b", input="x", max_output_tokens=2)
    ended = [entry for entry in entries(home) if entry.kind == "request"]
    assert [entry.data["model"] for entry in ended] == ["plain", "plain", "org/chatty:1b"]
    assert all(entry.data["hosts"] == [["n1", "0:4"], ["n2", "4:8"]] for entry in ended)


def test_a_log_that_cannot_be_written_stops_answers_until_it_can(gateway: Gateway, home: Path) -> None:
    gateway.chatty.does(*CHAIN, 5, 6, 7, 8)
    asked(gateway)
    before = files_of(home)
    asked(gateway)
    good = files_of(home)
    put_files(home, before)  # somebody rolls the log back under the running gateway
    calls = len(gateway.chatty.calls) + 1
    for _ in range(2):
        with pytest.raises(openai.InternalServerError) as caught:
            asked(gateway)
        assert (caught.value.status_code, caught.value.code) == (503, "audit_unavailable")
        assert "home" not in str(caught.value)
    assert len(gateway.chatty.calls) == calls  # the second one was refused before anything was computed
    with gateway.http() as http:
        assert http.get("/ready").status_code == 503
    put_files(home, good)
    with gateway.http() as http:
        assert http.get("/ready").status_code == 200
    asked(gateway)
    assert verdict(home).whole


def test_who_gets_inputs_after_the_answer_is_in_the_log_too(gateway: Gateway, home: Path) -> None:
    """As when a server's work is computed again on another one, to compare the two."""
    gateway.chatty.does(*CHAIN, 5, 6, 7, 8)
    asked(gateway)
    on_host = gateway.chatty.calls[-1].on_host
    assert on_host is not None
    gateway._loop.call_soon_threadsafe(on_host, "n9", BlockRange(0, 4))
    assert eventually(lambda: entries(home)[-1].data["hosts"] == [["n9", "0:4"]])


def test_machines_that_found_no_room_in_the_log_are_told_before_the_first_byte() -> None:
    told: list[list[list[str]]] = []
    full = [True]

    class Behind(Audit):
        def submit(self, kind: str, /, **data: Any) -> None:
            if full:
                full.clear()
                raise AuditUnavailable("The disk is behind.")
            told.append(data["hosts"])

    async def request() -> None:
        model = ScriptedModel("m", byte_level_tokenizer())
        trail = Behind().trail("r1", Account(1, "k", "sk-", None, 0), model)
        for given in CHAIN:
            trail.on_host(given.node, BlockRange.parse(given.blocks))
        await asyncio.sleep(0)
        assert not told
        await trail.begun()

    asyncio.run(request())
    assert told == [[["n1", "0:4"], ["n2", "4:8"]]]

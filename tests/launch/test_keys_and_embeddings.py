"""Keys, quotas and embeddings in a real swarm, as an operator and a user meet them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from support.reference import Reference
from support.swarm import DEMO, PATIENCE_S, Process, Swarm, children_of, command_of, until

pytestmark = pytest.mark.slow

TEXTS = ["In SQLite, a table", "The quick brown fox", "In SQLite, a table has rows and columns. " * 8]


def shoal(folder: Path, *command: str) -> tuple[int, Any]:
    """(exit code, JSON) of a command about the swarm in `folder`."""
    process = Process(folder, "shoal", *command, "--json", "--swarm-dir", str(folder / "swarm"))
    told = json.loads(process.line())
    process.rest()
    return process.popen.returncode, told


def client(swarm: Swarm, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=swarm.api, api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path, "--servers", "2", "--memory", "1GiB")
    yield swarm
    swarm.stop()


def test_a_key_has_its_limits_its_usage_outlives_a_killed_gateway_and_a_revoked_one_is_worthless(
    swarm: Swarm, tmp_path: Path
) -> None:
    code, made = shoal(tmp_path, "keys", "create", "alice", "--tokens-per-day", "60", "--requests-per-minute", "100")
    assert code == 0
    _, other = shoal(tmp_path, "keys", "create", "bob", "--model", "nothing here")
    with client(swarm, made["key"]) as alice, client(swarm, other["key"]) as bob:
        with pytest.raises(openai.PermissionDeniedError):
            bob.completions.create(model=swarm.model, prompt="hi")
        code, revoked = shoal(tmp_path, "keys", "revoke", str(other["id"]))
        assert (code, bool(revoked.get("revoked"))) == (0, True), revoked
        with pytest.raises(openai.AuthenticationError):
            bob.models.list()

        used = 0
        for _ in range(2):
            answer = alice.completions.create(model=swarm.model, prompt="In SQLite, a", max_tokens=10)
            assert answer.usage is not None
            used += answer.usage.total_tokens
        with pytest.raises(openai.RateLimitError) as refused:
            alice.completions.create(model=swarm.model, prompt="In SQLite, a", max_tokens=60)
        assert refused.value.response.headers["x-ratelimit-remaining-tokens"] == str(60 - used)

    code, verdict = shoal(tmp_path, "audit", "verify")
    assert (code, verdict["whole"]) == (0, True)
    _, log = shoal(tmp_path, "audit", "show")
    assert sorted(entry["kind"] for entry in log["entries"] if entry["kind"].startswith("key.")) == [
        *["key.create"] * 2, "key.revoke"
    ]  # fmt: skip

    # What a client has received stays charged, whatever happens to the gateway the moment after.
    (gateway,) = [pid for pid in children_of(swarm.up.pid) if "gateway-process" in command_of(pid)]
    os.kill(gateway, signal.SIGKILL)
    until(lambda: swarm.up.popen.poll() is not None, "the end of `shoal up`")
    _, listed = shoal(tmp_path, "keys", "list")
    (alice_key,) = [key for key in listed["keys"] if key["id"] == made["id"]]
    assert alice_key["total"] == alice_key["today"]
    assert (alice_key["today"]["tokens"], alice_key["today"]["requests"]) == (used, 2)


def test_embeddings_are_those_of_the_whole_model_and_do_not_disturb_answers(swarm: Swarm) -> None:
    reference = Reference(DEMO)
    with torch.inference_mode():
        expected = [
            torch.nn.functional.normalize(
                reference.model.base_model(torch.tensor([reference.prompt(text)])).last_hidden_state[0, -1], dim=0
            ).tolist()
            for text in TEXTS
        ]
    with swarm.client() as user:
        before = user.completions.create(model=swarm.model, prompt="In SQLite, a", max_tokens=20, temperature=0)
        answer = user.embeddings.create(model=swarm.model, input=TEXTS * 5)
        after = user.completions.create(model=swarm.model, prompt="In SQLite, a", max_tokens=20, temperature=0)
    assert before.choices[0].text == after.choices[0].text
    assert answer.usage.prompt_tokens == 5 * sum(len(reference.prompt(text)) for text in TEXTS)
    for entry, wanted in zip(answer.data, expected * 5, strict=True):
        assert entry.embedding == pytest.approx(wanted, abs=1e-4)
    until(lambda: not any(server["sessions"] for server in swarm.servers()), "every session is closed")


def test_the_key_of_an_earlier_run_over_the_same_directory_is_worthless(swarm: Swarm, tmp_path: Path) -> None:
    swarm.stop()
    again = Swarm(tmp_path, "--servers", "2", "--memory", "1GiB")
    try:
        with client(again, swarm.key) as old, pytest.raises(openai.AuthenticationError):
            old.models.list()
        assert again.http.get("/models").status_code == 200
    finally:
        again.stop()

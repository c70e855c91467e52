"""The clients that people really use against the gateway: LangChain, LlamaIndex, `llm` and Vercel's ai-sdk.

Each runs as a program of its own in tests/gateway/clients, since they need other versions of the same packages, and
reports one line per case. It fails when it reaches for another machine. Without node, or without the environment that
`make test` makes for the Python ones, the tests say that they are skipped.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gateway import Call, Gateway, Step, dreamt_tokens, running

from shoal.errors import Full, SwarmIncomplete
from shoal.gateway.limits import Limits

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "clients"
PYTHON = Path(sys.prefix) / "clients" / "bin" / "python"
MODEL = "org/chatty:1b"
ANSWER = "hello world"
CLIENTS = {
    "langchain": "with_langchain.py",
    "llama-index": "with_llama_index.py",
    "llm": "with_llm.py",
    "ai-sdk": "with_ai_sdk.mjs",
}
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway"), Limits()) as gateway:
        gateway.chatty.context_length = 4096  # tools are described to a model whose template knows none
        refused: set[str] = set()
        decode = gateway.chatty.tokenizer.decode
        tokens = gateway.chatty.tokenizer.encode(ANSWER, add_special_tokens=False)

        def script(call: Call) -> Iterator[Step]:
            asked = decode(call.prompt)
            if "busy once" in asked and asked not in refused:
                refused.add(asked)
                yield Full("no room", retry_after_s=0.01)
            if call.constraint is not None:
                yield from dreamt_tokens(call, len(gateway.chatty.tokenizer), gateway.chatty.eos_ids)
                return
            if "broken" in asked:
                yield from tokens[:2]
                yield SwarmIncomplete("Blocks 4 to 7 were lost and nobody else hosts them.")
            yield from [*tokens, 1][: call.max_tokens]

        gateway.chatty.script = script
        yield gateway


def command(client: str) -> list[str]:
    if client == "ai-sdk":
        node = shutil.which("node")
        if node is None:
            pytest.skip("node is not installed, so the ai-sdk is not tested")
        if not (FOLDER / "node_modules").is_dir():
            pytest.skip("the ai-sdk is not installed: run `make test`, with npm on the path")
        return [node, CLIENTS[client]]
    if not PYTHON.exists():
        pytest.skip("the environment of other clients is not there: run `make test`")
    return [str(PYTHON), CLIENTS[client]]


@functools.cache
def results(client: str, gateway: Gateway) -> dict[str, dict[str, Any]]:
    """What every case of a client reported."""
    settings = {"SHOAL_BASE": f"{gateway.listening.url}/v1", "SHOAL_KEY": gateway.key, "SHOAL_MODEL": MODEL}
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    # Nothing else of this environment: LangSmith, for one, reports to its maker when a variable says so.
    ended = subprocess.run(
        command(client),
        cwd=FOLDER,
        env={**inherited, **settings, "AI_SDK_LOG_WARNINGS": "false"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line for line in lines}


def result(client: str, gateway: Gateway, case: str) -> Any:
    found = results(client, gateway)
    assert "raised" not in found[case], found[case]
    return found[case]["result"]


def raised(client: str, gateway: Gateway, case: str) -> str:
    found = results(client, gateway)[case]
    assert "raised" in found, found
    return f"{found['raised']} {found['code']}: {found['text']}"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_conversation_is_answered_whole(gateway: Gateway, client: str) -> None:
    answer = result(client, gateway, "whole")
    assert answer["text"] == ANSWER
    assert answer.get("finish", "stop") == "stop"
    used = answer["usage"]
    prompt = used.get("input_tokens") or used.get("prompt_tokens") or used.get("inputTokens")
    made = used.get("output_tokens") or used.get("completion_tokens") or used.get("outputTokens")
    assert made == len(gateway.chatty.tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    assert prompt > made


@pytest.mark.parametrize("client", CLIENTS)
def test_a_stream_gives_the_same_answer_in_pieces(gateway: Gateway, client: str) -> None:
    answer = result(client, gateway, "streamed")
    assert answer["text"] == ANSWER
    assert answer["pieces"] > 1
    if "usage" in answer:
        used = answer["usage"]
        assert (used.get("output_tokens") or used.get("outputTokens")) > 1


@pytest.mark.parametrize("client", CLIENTS)
def test_the_older_completion_endpoint_works(gateway: Gateway, client: str) -> None:
    answer = result(client, gateway, "completion")
    assert answer["text"] == ANSWER
    assert answer.get("streamed", ANSWER) == ANSWER


@pytest.mark.parametrize("client", CLIENTS)
def test_a_length_is_honoured_under_the_name_that_the_client_sends(gateway: Gateway, client: str) -> None:
    answer = result(client, gateway, "limited")
    assert answer["tokens"] == 1
    assert answer.get("finish", "length") == "length"


@pytest.mark.parametrize("client", ["langchain", "ai-sdk"])
def test_embeddings_are_vectors_in_the_order_of_the_texts(gateway: Gateway, client: str) -> None:
    vectors = result(client, gateway, "embeddings")
    assert [len(vector) for vector in vectors["many"]] == [gateway.chatty.embedding_size] * 2
    assert vectors["many"][0] == pytest.approx(vectors["query"], rel=1e-6)
    assert vectors["many"][1] != vectors["many"][0]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_wrong_key_and_an_unknown_model_are_the_clients_own_errors(gateway: Gateway, client: str) -> None:
    assert "No valid API key" in raised(client, gateway, "bad_key")
    assert "does not exist here" in raised(client, gateway, "unknown_model")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_chain_lost_for_good_is_an_error_and_no_short_answer(gateway: Gateway, client: str) -> None:
    assert "Blocks 4 to 7 were lost" in raised(client, gateway, "broken")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_full_swarm_is_tried_again(gateway: Gateway, client: str) -> None:
    assert result(client, gateway, "retried") == ANSWER


def is_a_card(made: Any) -> bool:
    return set(made) == {"colour", "number"} and made["colour"] in ("red", "black") and made["number"] in (1, 2, 3)


@pytest.mark.parametrize("client", ["langchain", "llama-index", "ai-sdk"])
def test_a_tool_is_called_with_arguments_of_its_schema(gateway: Gateway, client: str) -> None:
    called = result(client, gateway, "tools")
    assert called["name"] == "Pick"
    assert is_a_card(called["arguments"])
    assert is_a_card(called.get("streamed", called["arguments"]))
    assert called.get("finish", "tool-calls") == "tool-calls"
    assert called.get("text", ANSWER) == ANSWER


@pytest.mark.parametrize("client", ["langchain", "llm", "ai-sdk"])
def test_structured_output_keeps_to_its_schema(gateway: Gateway, client: str) -> None:
    assert is_a_card(result(client, gateway, "structured"))


def test_another_turn_of_a_conversation_keeps_its_history(gateway: Gateway) -> None:
    assert result("llm", gateway, "conversation") == ANSWER

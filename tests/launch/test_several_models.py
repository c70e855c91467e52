"""One gateway in front of several models, each with servers of its own: answers, embeddings, keys, status, metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file
from support.machines import Machine, directories
from support.reference import Reference
from support.swarm import DEMO, PATIENCE_S, Process, until

pytestmark = pytest.mark.long

PROMPT = "In SQLite, a"
TOKENS = 12


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """The demo model with other weights, so that it says other things."""
    folder = tmp_path / "other"
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.3 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (machine,) = directories(tmp_path, 1)
    return machine


def test_one_gateway_answers_for_two_models_with_their_own_servers(machine: Machine, other_model: Path) -> None:
    processes: list[Process] = []

    def start(*command: str) -> dict[str, Any]:
        process = machine.start("shoal", *command, "--json")
        processes.append(process)
        return dict(json.loads(process.line()))

    def join(name: str, model: Path, *flags: str) -> None:
        token = json.loads(machine.run("invite", "--role", "server", "--json"))["token"]
        options = ("--memory", "1GiB", "--threads", "1", "--exact", "--name", name)
        told = start("join", token, "--serve", str(model), *options, *flags)
        assert "error" not in told, told

    try:
        machine.run("init", "--name", "two-models")
        start("admin", "--listen", f"127.0.0.1:{machine.port()}")
        join("first", DEMO, "--blocks", "0:4")
        join("second", DEMO, "--blocks", "4:8")
        join("replica", DEMO, "--blocks", "4:8")
        join("third", other_model, "--blocks", "0:8")
        alone = processes[-1]
        key = json.loads(machine.run("keys", "create", "alice", "--json"))["key"]
        only = json.loads(machine.run("keys", "create", "bob", "--model", "other", "--json"))["key"]
        serves = ("--serve", f"demo={DEMO}", "--serve", f"other={other_model}")
        api = start("gateway", *serves, "--listen", "127.0.0.1:0", "--exact")["api"]
        http = httpx.Client(base_url=api.removesuffix("/v1"), timeout=PATIENCE_S, trust_env=False)
        until(lambda: http.get("/ready").status_code == 200, "both models are ready")
        assert http.get("/ready").json()["models"] == {"demo": True, "other": True}

        with openai.OpenAI(base_url=api, api_key=key, max_retries=0, timeout=PATIENCE_S) as client:
            assert [model.id for model in client.models.list()] == ["demo", "other"]
            for name, folder in (("demo", DEMO), ("other", other_model)):
                answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0,
                                                   extra_body={"ignore_eos": True})  # fmt: skip
                Reference(folder).check(PROMPT, TOKENS, answer.choices[0].text)
            vectors = [
                client.embeddings.create(model=name, input=PROMPT).data[0].embedding for name in ("demo", "other")
            ]
            assert vectors[0] != vectors[1]

        restricted = {"authorization": f"Bearer {only}"}
        assert [model["id"] for model in http.get("/v1/models", headers=restricted).json()["data"]] == ["other"]
        assert http.get("/v1/shoal/status", headers=restricted).json()["model"] == "other"
        everything = json.loads(machine.run("status", "--api", api, "--key", key, "--json"))
        assert {page["model"]: page["covered"] for page in everything["models"]} == {"demo": True, "other": True}
        said = http.get("/metrics").text
        for line in (
            'shoal_blocks_covered{model="demo"} 8.0',
            'shoal_replicas{model="demo",span="4:8"} 2.0',
            'shoal_replicas{model="other",span="0:8"} 1.0',
        ):
            assert line in said

        # The only server of one model goes: that model is not ready, and the other answers on.
        alone.kill()
        until(lambda: http.get("/ready", params={"model": "other"}).status_code == 503, "the loss is known")
        assert http.get("/ready", params={"model": "demo"}).status_code == 200
        assert 'shoal_replicas{model="other",span="0:8"} 0.0' in http.get("/metrics").text
    finally:
        for process in reversed(processes):
            process.kill()

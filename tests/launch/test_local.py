"""What a local swarm refuses before it starts any process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from shoal.errors import UsageError
from shoal.launch.children import Child
from shoal.launch.local import LocalSwarm, SwarmPlan


def model_with(config: object, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize("config", [{"num_hidden_layers": 8}, {"text_config": {"num_hidden_layers": 8}}])
def test_more_spans_than_blocks_are_refused_before_anything_is_made(
    config: dict[str, object], tmp_path: Path, state: Path
) -> None:
    plan = SwarmPlan(model_with(config, tmp_path / "model"), "demo", servers=9)

    with pytest.raises(UsageError, match="demo has 8 blocks, so it cannot be cut into 9 spans") as refused:
        LocalSwarm(plan)

    assert "--servers 8" in refused.value.hint
    assert not state.exists()


@pytest.mark.parametrize("config", [{"num_hidden_layers": 8}, {"n_layer": 2}, ["no", "configuration"]])
def test_what_the_configuration_does_not_rule_out_is_left_to_the_gateway(config: object, tmp_path: Path) -> None:
    swarm = LocalSwarm(SwarmPlan(model_with(config, tmp_path / "model"), "demo", servers=8))

    assert swarm.swarm_dir.is_dir()


@pytest.mark.parametrize(("servers", "replicas"), [(0, 1), (1, 0), (-1, 1)])
def test_a_swarm_of_nothing_is_refused(servers: int, replicas: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one server and one replica"):
        SwarmPlan(tmp_path, "demo", servers=servers, replicas=replicas)


async def _child(name: str, folder: Path) -> Child:
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    return Child(name, process, folder / name)


def test_processes_that_end_together_are_all_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = LocalSwarm(SwarmPlan(model_with({"num_hidden_layers": 8}, tmp_path / "model"), "demo"))
        names = ["server-0", "gateway", "server-1"]
        swarm._children = {name: await _child(name, tmp_path) for name in names}
        told = [(await swarm.ended())[0] for _ in names]
        assert sorted(told) == sorted(names)

    asyncio.run(scenario())


def test_an_interrupted_start_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        swarm = LocalSwarm(SwarmPlan(model_with({"num_hidden_layers": 8}, tmp_path / "model"), "demo"))

        async def interrupted() -> None:
            raise asyncio.CancelledError

        monkeypatch.setattr(swarm, "_start", interrupted)
        with pytest.raises(asyncio.CancelledError):
            await swarm.__aenter__()
        assert not swarm.swarm_dir.exists()

    asyncio.run(scenario())

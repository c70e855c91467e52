"""What one session's bad rows do to those that share its batch: nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.inprocess import InProcess
from support.networks import run

from shoal.compute import engine as compute
from shoal.compute.families import random_model
from shoal.errors import NotFinite, ProtocolError
from shoal.server.node import BlockServer
from shoal.spec.ids import BlockRange
from shoal.swarm.serving import Work
from shoal.wire import messages as msg
from shoal.wire.rows import Rows

GOOD, BAD = b"g" * 16, b"b" * 16
ROWS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model("llama", seed=3).save_pretrained(path)
    return path


def rows(width: int, *, value: float = 0.5, wire: msg.WireType = "f32") -> Rows:
    array = np.full((ROWS, width), value, np.float32 if wire == "f32" else np.uint16)
    return Rows(wire, width, ROWS, array.tobytes())


def work(session: bytes, payload: Rows) -> Work:
    return Work(session, 1, msg.StepItem(session, 0, ROWS, 0), payload, "f32")


def engine_of(server: BlockServer) -> tuple[BlockServer, int]:
    assert server._engine is not None
    assert server._engine.packed
    return server, server._engine.stage.hidden_size


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda width: rows(width, value=float("nan")), NotFinite),
        (lambda width: rows(width + 1), ProtocolError),
        (lambda width: rows(width, value=0, wire="bf16"), ProtocolError),
    ],
    ids=["not a number", "wrong width", "format not agreed"],
)
def test_bad_rows_fail_their_own_session_only(model_dir: Path, bad: object, error: type[Exception]) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            (node,) = await swarm.add("0:6")
            server, width = engine_of(swarm.servers[node].server)
            assert server._engine is not None
            assert callable(bad)
            for session in (GOOD, BAD):
                server._engine.open(session, BlockRange(0, 6), 16)
            (good, failed), _ = server._run([work(GOOD, rows(width)), work(BAD, bad(width))])
            assert isinstance(failed, error)
            assert isinstance(good, Rows)
            assert server._engine.length(GOOD) == ROWS

            server._engine.close(GOOD)
            server._engine.open(GOOD, BlockRange(0, 6), 16)
            (undisturbed,), _ = server._run([work(GOOD, rows(width))])
            assert isinstance(undisturbed, Rows)
            assert bytes(good.data) == bytes(undisturbed.data)

    run(scenario)


def test_a_session_whose_outputs_are_no_numbers_fails_alone(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            (node,) = await swarm.add("0:6")
            server, width = engine_of(swarm.servers[node].server)
            engine = server._engine
            assert engine is not None
            for session in (GOOD, BAD):
                engine.open(session, BlockRange(0, 6), 16)
            honest = engine.run

            def overflowing(works: Sequence[compute.Work], hidden: torch.Tensor) -> torch.Tensor:
                out = honest(works, hidden).clone()
                if works[-1].session == BAD:
                    out[-1] = float("inf")
                return out

            monkeypatch.setattr(engine, "run", overflowing)
            (good, failed), _ = server._run([work(GOOD, rows(width)), work(BAD, rows(width))])
            assert isinstance(good, Rows)
            assert isinstance(failed, NotFinite)
            assert engine.length(GOOD) == ROWS

    run(scenario)

"""What cannot be used is named, with what to do about it: one line for each, an exit code, and no process left."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.swarm import DEMO, Process, Swarm

from shoal.wire.messages import PROTOCOL_VERSION

pytestmark = pytest.mark.slow


def copy_of_the_demo(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO, folder / "model"))


def with_pickle_weights(folder: Path) -> list[str]:
    model = copy_of_the_demo(folder)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return ["--servers", "1", "--model", str(model)]


def of_an_unknown_family(folder: Path) -> list[str]:
    model = copy_of_the_demo(folder)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "nobody-knows"}
    (model / "config.json").write_text(json.dumps(config))
    return ["--servers", "1", "--model", str(model)]


def that_does_not_exist(folder: Path) -> list[str]:
    return ["--model", str(folder / "nothing")]


def more_spans_than_blocks(folder: Path) -> list[str]:
    return ["--servers", "9"]


@pytest.mark.parametrize(
    ("flags", "code", "said", "advice"),
    [
        (with_pickle_weights, 2, "pytorch_model.bin", "save_pretrained"),
        (of_an_unknown_family, 2, "nobody-knows", "transformers"),
        (that_does_not_exist, 2, "nothing is not a model directory", "safetensors"),
        (more_spans_than_blocks, 2, "8 blocks", "--servers 8"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_model(tmp_path: Path, flags: Callable[[Path], list[str]], code: int, said: str, advice: str) -> None:
    error, hint = two_lines(tmp_path, code, *flags(tmp_path))
    assert said in error
    assert advice in hint


def test_with_json_it_is_one_object_on_stdout(tmp_path: Path) -> None:
    up = Process(tmp_path, "shoal", "up", "--json", *that_does_not_exist(tmp_path))
    told = json.loads(up.rest())
    assert up.popen.returncode == 2
    assert set(told["error"]) == {"code", "message", "hint"}
    assert up.log.read_text() == ""


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error, hint = two_lines(tmp_path, 2, "--servers", "1", "--port", str(port))
    assert str(port) in error
    assert "choose another port" in hint


def test_blocks_outside_the_model(swarm: Swarm) -> None:
    server = swarm.join("4:99")
    assert server.rest() == ""
    error, hint = last_two_lines(server)
    assert server.popen.returncode == 2
    assert "4:99" in error
    assert "8" in error + hint


def test_another_protocol_version(swarm: Swarm) -> None:
    server = swarm.join("0:4", "support.other_version")
    server.rest()
    error, hint = last_two_lines(server)
    assert server.popen.returncode == 4
    assert f"protocol version {PROTOCOL_VERSION + 1}, this side speaks {PROTOCOL_VERSION}" in error
    assert "version of shoal" in hint
    assert len(swarm.servers()) == len(swarm.told["servers"]), "it never was a server of this swarm"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", disk]).returncode:
        pytest.skip("only root may mount a small disk here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk(tmp_path: Path, full_disk: Path) -> None:
    error, hint = two_lines(tmp_path, 5, "--servers", "2", "--swarm-dir", str(full_disk / "swarm"))
    assert "No space left on device" in error
    assert "Free some space" in hint


def two_lines(folder: Path, code: int, *flags: str) -> tuple[str, str]:
    """What `shoal up` says on stderr before it ends with `code`."""
    up = Process(folder, "shoal", "up", *flags)
    assert up.rest() == ""
    assert up.popen.returncode == code
    return last_two_lines(up)


def last_two_lines(process: Process) -> tuple[str, str]:
    lines = process.log.read_text().splitlines()
    assert "Traceback" not in process.log.read_text()
    error, hint = lines[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error, hint

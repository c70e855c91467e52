"""Nothing calls home: in a network that leads nowhere, shoal is imported, a swarm answers, and no packet leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.sources import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unshare() -> list[str]:
    """The command that runs another one in a network namespace of its own; skips where there may be none."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs unshare (util-linux) and ip (iproute2)")
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        tried = subprocess.run(
            [*command, "sh", "-c", "ip link add out0 type veth peer name out1"], capture_output=True, check=False
        )
        if tried.returncode == 0:
            return command
    pytest.skip("needs root, or user namespaces: no network namespace can be made here")


@pytest.mark.parametrize("kind", ["empty", "nowhere"])
def test_no_packet_leaves_while_shoal_is_imported_and_a_swarm_answers(
    tmp_path: Path, unshare: list[str], kind: str
) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "HF_HUB_OFFLINE" and not name.lower().endswith("_proxy")
    }
    paths = [str(REPOSITORY / "tests"), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "HF_HOME"):
        environment[name] = str(tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()

    ended = subprocess.run(
        [*unshare, sys.executable, "-m", "support.isolated", str(tmp_path), kind],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["text"]
    assert told["modules"] > 100
    assert told["doctor"] >= 10
    assert told["packets"] == 0
    assert told["control"] == (1 if kind == "nowhere" else "Network is unreachable")

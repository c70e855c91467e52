"""Keys of a swarm whose starter was killed do not lie around for ever."""

import os
import subprocess
import sys
from pathlib import Path

from shoal.launch.local import _sweep_keys


def folder_of(pid: int, state: Path) -> Path:
    folder = state / f"swarm-{pid}-x"
    for part in ("ca", "nodes", "logs"):
        (folder / part).mkdir(parents=True)
    return folder


def test_keys_of_the_dead_go_and_their_logs_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    dead, alive = folder_of(ended.pid, tmp_path), folder_of(os.getpid(), tmp_path)
    _sweep_keys(tmp_path)
    assert sorted(path.name for path in dead.iterdir()) == ["logs"]
    assert sorted(path.name for path in alive.iterdir()) == ["ca", "logs", "nodes"]

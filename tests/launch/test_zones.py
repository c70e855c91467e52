"""A trust zone in a real swarm: who computes, who takes over from a killed server, and what the audit log says."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from support.swarm import Answer, Ask, Process, Swarm, is_running, until

pytestmark = pytest.mark.long

ZONE = "embedding=hq,first=3:hq"
LABELS = [part for name in ("gateway", "server-1", "server-3") for part in ("--label", f"{name}=hq")]


def audit(folder: Path, *command: str) -> tuple[int, Any]:
    """(exit code, JSON) of a `shoal audit` command about the swarm in `folder`."""
    process = Process(folder, "shoal", "audit", *command, "--json", "--swarm-dir", str(folder / "swarm"))
    told = json.loads(process.line())
    process.rest()
    return process.popen.returncode, told


def test_a_zone_holds_through_a_kill_and_the_log_names_everyone(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, "--servers", "2", "--replicas", "2", "--memory", "1GiB", "--zones", ZONE, *LABELS)
    try:
        servers = swarm.status()["servers"]
        labelled = {server["id"] for server in servers if server["labels"] == ["hq"]}
        assert {server["blocks"] for server in servers if server["id"] in labelled} == {"0:4"}

        ask = Ask("In SQLite, a", 200)
        undisturbed = Answer(swarm, ask).text()
        answer = Answer(swarm, ask).begun()
        killed = swarm.busy(0)
        os.kill(killed["pid"], signal.SIGKILL)
        assert answer.text() == undisturbed

        code, told = audit(tmp_path, "show")
        assert code == 0
        last = told["entries"][-1]
        first_blocks = {reader["node"] for reader in last["readers"] if reader["part"] == "blocks 0:4"}
        assert first_blocks == labelled  # the killed one and the one that took over
        assert (last["outcome"], last["zones"]) == ("ok", ZONE)
        code, verdict = audit(tmp_path, "verify", "--swarm")
        assert (code, verdict["whole"]) == (0, True)
        assert verdict["members"]

        # Nobody with the label is left for the first blocks; one without it offers itself.
        (left,) = [server for server in swarm.servers(0) if server["id"] != killed["id"]]
        os.kill(left["pid"], signal.SIGKILL)
        until(lambda: not is_running(left["pid"]), "the end of the second labelled server")
        swarm.join("0:4").line()
        until(lambda: not swarm.status()["missing"] and len(swarm.servers(0)) == 1, "only the one without a label")
        with pytest.raises(openai.InternalServerError) as refused, swarm.client() as client:
            client.completions.create(model=swarm.model, prompt="x", max_tokens=4)
        assert (refused.value.status_code, refused.value.code) == (503, "policy_unmet")
        last = audit(tmp_path, "show")[1]["entries"][-1]
        assert last["outcome"] == "policy_unmet"
        assert [reader["part"] for reader in last["readers"]] == ["text, embedding and head"]
        explained = "\n".join(swarm.status()["explain"])
        assert f"under the trust zone {ZONE}" in explained
        assert "requests are refused" in explained
    finally:
        swarm.stop()


def members_know_the_end(folder: Path) -> bool:
    """Whether a member remembers the log's last entry."""
    code, verdict = audit(folder, "verify", "--swarm")
    return code == 0 and any(member["seq"] == verdict["head"]["seq"] for member in verdict["members"])


def test_a_log_rolled_back_with_its_head_is_found_by_asking_the_swarm(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, "--servers", "2", "--memory", "1GiB")
    try:
        Answer(swarm, Ask("In SQLite, a", 4)).text()
        names = ("audit.jsonl", "audit.head")
        for name in names:
            shutil.copy2(swarm.dir / name, tmp_path / name)
        Answer(swarm, Ask("In SQLite, a", 4)).text()
        until(lambda: members_know_the_end(tmp_path), "the members hear where the log stands")
        for name in names:
            shutil.copy2(tmp_path / name, swarm.dir / name)
        assert audit(tmp_path, "verify")[0] == 0
        code, verdict = audit(tmp_path, "verify", "--swarm")
        assert code == 3
        assert {member["in_log"] for member in verdict["members"]} >= {False}
        # The gateway notices as well, and answers nobody without being able to say so in its log.
        with pytest.raises(openai.InternalServerError), swarm.client() as client:
            client.completions.create(model=swarm.model, prompt="x", max_tokens=4)
    finally:
        swarm.stop()

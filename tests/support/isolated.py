"""Runs inside an empty network namespace: imports all of shoal, runs a swarm, asks it once, counts what tried to leave.

python -m support.isolated FOLDER empty|nowhere

"empty": loopback is all there is. "nowhere": there is a default route too, to a wire that nobody is at the other end
of, so every packet that means to leave is counted and none arrives. Prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

WIRE = "out0"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def make_network(kind: str) -> None:
    # Before any wire is up: IPv6 would speak by itself.
    for place in ("all", "default"):
        setting = Path(f"/proc/sys/net/ipv6/conf/{place}/disable_ipv6")
        if setting.exists():
            setting.write_text("1")
    ip("link", "set", "lo", "up")
    if kind == "nowhere":
        ip("link", "add", WIRE, "type", "veth", "peer", "name", "out1")
        ip("address", "add", "10.9.9.1/24", "dev", WIRE)
        for end in (WIRE, "out1"):
            ip("link", "set", end, "up")
        ip("neighbour", "add", "10.9.9.2", "lladdr", "02:00:00:00:00:02", "dev", WIRE)
        ip("route", "add", "default", "via", "10.9.9.2")


def packets_out() -> int:
    """Packets sent on every interface but loopback."""
    total = 0
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, figures = line.partition(":")
        if name.strip() == WIRE:
            total += int(figures.split()[9])
    return total


def import_everything() -> int:
    import shoal

    names = [module.name for module in pkgutil.walk_packages(shoal.__path__, "shoal.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    return len(names)


def swarm_answers(folder: Path) -> str:
    """`shoal up`, one completion, the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "up", "--json", "--servers", "2", "--swarm-dir", str(folder / "swarm")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=folder,
    )
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        request = urllib.request.Request(
            f"{told['api']}/completions",
            json.dumps({"model": told["model"], "prompt": "The sea", "max_tokens": 4, "temperature": 0}).encode(),
            {"authorization": f"Bearer {told['key']}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            page: dict[str, Any] = json.load(answer)
        return str(page["choices"][0]["text"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def main(folder: Path, kind: str) -> None:
    make_network(kind)
    before = packets_out()
    told: dict[str, Any] = {"modules": import_everything(), "text": swarm_answers(folder)}
    doctor = subprocess.run(
        [sys.executable, "-m", "shoal", "doctor", "--security", "--json"], capture_output=True, check=False, cwd=folder
    )
    told["doctor"] = len(json.loads(doctor.stdout)["checks"])
    told["packets"] = packets_out() - before
    # The control: what does leave is seen.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stray:
        try:
            stray.sendto(b"hello", ("192.0.2.1", 9))
        except OSError as error:
            told["control"] = os.strerror(error.errno or 0)
        else:
            told["control"] = packets_out() - before - told["packets"]
    print(json.dumps(told), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

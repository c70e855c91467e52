"""What a client has received stays charged, once, however often the gateway is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from shoal.gateway.accounts import Accounts, Usage

pytestmark = pytest.mark.slow

KILLS = 20
CLIENTS = 8
PATIENCE_S = 60.0


class Ledger:
    """What clients know: requests they sent, and those whose answers they have whole."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "support.metered_gateway", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])},
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


async def ask_until_killed(url: str, key: str, ledger: Ledger, process: subprocess.Popen[str], enough: int) -> None:
    """Clients that ask one question after another; the gateway is killed when `enough` were answered in this round."""
    first = ledger.received

    async def one(client: httpx.AsyncClient, stream: bool) -> None:
        body = {"model": "plain", "prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True, "stream": stream}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        while process.poll() is None:
            ledger.sent += 1
            try:
                answer = await client.post(f"{url}/v1/completions", json=body)
            except httpx.TransportError:
                return  # the end of the gateway
            assert answer.status_code == 200
            ledger.received += 1
            if ledger.received - first >= enough:
                process.send_signal(signal.SIGKILL)

    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=headers, timeout=PATIENCE_S, trust_env=False) as client:
        await asyncio.gather(*(one(client, bool(number % 2)) for number in range(CLIENTS)))


def test_twenty_kills_lose_no_charge_that_a_client_was_told_and_make_none_twice(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "accounts.sqlite")
    key, account = accounts.create("counted", tokens_per_day=10**9)
    rng, ledger = random.Random(7), Ledger()
    for _ in range(KILLS):
        process, url = start(tmp_path)
        try:
            asyncio.run(ask_until_killed(url, key, ledger, process, rng.randrange(1, 60)))
        finally:
            process.kill()
            process.communicate()
        used = accounts.used(account.id)
        assert ledger.received <= used.requests <= ledger.sent
        assert used == Usage(used.requests, 3 * used.requests, 5 * used.requests)
    accounts.close()
    assert ledger.received > KILLS

"""Child processes that announce themselves with lines of JSON and never outlive their parent.

A child reads its standard input only to see it end: when the parent dies, however it dies, the pipe closes and the
child stops (cli/process.py). Its log goes to a file, whose last lines tell why it failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError

ENVIRONMENT = {
    # One thread for each numerical library: children share the machine.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # torch asks for huge pages for large tensors: a decode step walks through all weights, and 4 KiB pages cost 1-2 %.
    "THP_MEM_ALLOC_ENABLE": "1",
    # `shoal up` has fetched the model by now: its processes read directories and ask nobody.
    "HF_HUB_OFFLINE": "1",
    # Its warnings are about loading whole models; a server that loads some blocks of one looks broken to it.
    "TRANSFORMERS_VERBOSITY": "error",
}
_TAIL_BYTES = 4000
_ERROR, _HINT = "error: ", "hint: "
"""How cli/output.py begins the two lines that tell an error."""


class ChildFailed(ShoalError):
    """A process of the swarm ended before it was ready. Its exit code is passed on when it said why it ended."""

    code = "child_failed"

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class Child:
    """One running `python -m shoal ...`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @classmethod
    async def start(cls, name: str, args: Sequence[str], log: Path) -> Child:
        """Start it, with its log in `log`."""
        env = os.environ | ENVIRONMENT
        with log.open("ab") as stream:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "shoal",
                *args,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stream,
                env=env,
                start_new_session=True,  # Ctrl-C is for the parent, which then stops the children in order
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def line(self) -> dict[str, Any]:
        """The next line of JSON it prints. Raises ChildFailed, with its own words, when it ends instead."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if line:
            value = json.loads(line)
            if "error" not in value:
                return dict(value)
            error = value["error"]
            raise ChildFailed(f"{self.name}: {error['message']}", hint=error.get("hint", ""))
        code = await self.process.wait()
        lines = self._last_lines()
        errors = [at for at, line in enumerate(lines) if line.startswith(_ERROR)]
        if code > 0 and errors and len(lines) - errors[-1] <= 2:  # the two lines with which every command ends
            hint = lines[-1].removeprefix(_HINT) if lines[-1].startswith(_HINT) else ""
            raise ChildFailed(f"{self.name}: {lines[errors[-1]].removeprefix(_ERROR)}", hint=hint, exit_code=code)
        words = "Its log ends with:\n" + "\n".join(lines[-8:]) if lines else f"Its log {self.log} is empty."
        raise ChildFailed(f"{self.name} ended with exit code {code} before it was ready.", hint=words)

    def _last_lines(self) -> list[str]:
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace").strip().splitlines()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after grace_s."""
        if self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

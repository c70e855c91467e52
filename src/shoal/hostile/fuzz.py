"""A range of seeds against every surface, in a process that may die of it; inputs that did harm are kept as files.

A run is a range of seeds and nothing else: the same range gives the same inputs, and an interrupted run goes on with
the rest of it. The corpus is a folder per target; each file is an input that did harm once, or one that came out as no
other did. `make test` runs all of them.
"""

from __future__ import annotations

import hashlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, UsageError
from shoal.hostile.worker import Finding, all_targets, target_of

HUNG_S = 30.0
"""A worker that says nothing for so long hangs. Inputs that take more than a second it reports by itself."""
KEPT_BYTES = 2048
"""Longer inputs are not kept for their outcome alone: a shorter one will show it too."""
MAX_DEATHS = 20
MAX_FINDINGS = 50
"""After so many the run stops: they are most likely one and the same."""


@dataclass
class Run:
    """What became of a run so far."""

    first: int
    last: int
    done: int
    """Seeds up to, not including, this one are behind us."""
    findings: list[Finding] = field(default_factory=list)
    grown_bytes: int = 0
    seconds: float = 0.0
    outcomes: int = 0

    @property
    def executions(self) -> int:
        return self.done - self.first


def seeds_of(text: str) -> tuple[int, int]:
    """FROM:TO as two numbers. Raises UsageError."""
    first, colon, last = text.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise UsageError(f"{text!r} is no range of seeds.", hint="Write FROM:TO, for example 0:1000000.")
    return int(first), int(last)


def fuzz(
    first: int,
    last: int,
    *,
    corpus: Path | None = None,
    grow: bool = False,
    on_progress: Callable[[Run], None] = lambda run: None,
    python: tuple[str, ...] = (sys.executable,),
    hung_s: float = HUNG_S,
) -> Run:
    """Attack with the seeds from `first` up to, not including, `last`.

    Findings are written to `corpus` as they come; with `grow` also every input whose outcome no earlier one had.
    """
    run = Run(first, last, first)
    start = time.monotonic()
    deaths = 0
    targets = all_targets()
    with tempfile.TemporaryDirectory(prefix="shoal-fuzz-") as folder:
        place = Path(folder) / "seed"
        while run.done < last and len(run.findings) < MAX_FINDINGS and deaths < MAX_DEATHS:
            place.write_bytes(run.done.to_bytes(8, "little"))
            ended = _one_worker(run, place, corpus, grow, on_progress, python, hung_s, start)
            if ended is not None:
                deaths += 1
                seed = int.from_bytes(place.read_bytes(), "little")
                target = target_of(seed, targets)
                kind = "hung" if ended == "hung" else "died"
                found = Finding(target.name, kind, seed, target.make(seed), ended)
                run.findings.append(found)
                keep(corpus, found.target, found.data, found.kind)
                run.done = seed + 1
    run.seconds = time.monotonic() - start
    return run


def _one_worker(
    run: Run,
    place: Path,
    corpus: Path | None,
    grow: bool,
    on_progress: Callable[[Run], None],
    python: tuple[str, ...],
    hung_s: float,
    start: float,
) -> str | None:
    """Run one worker from `run.done` to its end; None when it reached the last seed, else how it ended."""
    command = [*python, "-m", "shoal.hostile.worker", str(run.done), str(run.last), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        try:
            for line in _lines(worker, hung_s):
                _take(run, line, corpus, grow)
                run.seconds = time.monotonic() - start
                on_progress(run)
                if len(run.findings) >= MAX_FINDINGS:
                    return None
        except TimeoutError:
            return "hung"
        finally:
            worker.kill()
            _, complaints = worker.communicate()
    if run.done >= run.last:
        return None
    if run.executions == 0 and b"Error" in complaints and worker.returncode == 1:
        raise ShoalError(f"The fuzzer cannot start: {complaints.decode(errors='replace').strip().splitlines()[-1]}")
    return f"exit code {worker.returncode}: {complaints.decode(errors='replace')[-300:]}"


def _lines(worker: subprocess.Popen[bytes], hung_s: float) -> Iterator[dict[str, Any]]:
    """The worker's lines until it ends. Raises TimeoutError when none comes for `hung_s`."""
    if worker.stdout is None:
        raise ShoalError("The fuzzer's process has no output.")
    rest = b""
    while True:
        readable, _, _ = select.select([worker.stdout], [], [], hung_s)
        if not readable:
            raise TimeoutError
        data = worker.stdout.read1(1 << 20)  # type: ignore[attr-defined]  # a pipe of Popen is buffered
        if not data:
            worker.wait()
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield json.loads(line)


def _take(run: Run, line: dict[str, Any], corpus: Path | None, grow: bool) -> None:
    if (found := line.get("finding")) is not None:
        finding = Finding(found["target"], found["kind"], found["seed"], bytes.fromhex(found["data"]), found["why"])
        run.findings.append(finding)
        keep(corpus, finding.target, finding.data, finding.kind)
    if grow and (new := line.get("new")) is not None and len(new["data"]) <= 2 * KEPT_BYTES:
        keep(corpus, new["target"], bytes.fromhex(new["data"]), "seen")
    if "done" in line:
        run.done = line["done"]
        run.grown_bytes = max(run.grown_bytes, line["grown_bytes"])
        run.outcomes = line.get("outcomes", run.outcomes)


def keep(corpus: Path | None, target: str, data: bytes, kind: str) -> None:
    """Write an input to the corpus under a name that follows from its bytes."""
    if corpus is None:
        return
    folder = corpus / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)


def kept(corpus: Path) -> Iterator[tuple[str, Path]]:
    """(target, file) of every input of a corpus."""
    for file in sorted(corpus.glob("*/*")):
        yield file.parent.name, file

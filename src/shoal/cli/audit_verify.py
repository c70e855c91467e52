"""`shoal audit verify`: is the log still what was written, and does the swarm remember it so?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.manifest.chain import Verdict
    from shoal.net.auditing import Told
    from shoal.net.home import Home


@click.command("verify")
@click.option("--swarm", "ask_swarm", is_flag=True, help="Also ask the members which end of the log they remember.")
@click.option("--ca", type=click.Path(path_type=Path), default=None, help="Root's certificate; default: the swarm's.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(ask_swarm: bool, ca: Path | None, swarm_dir: Path | None, as_json: bool) -> int:
    """Check that nobody has changed the audit log; exit code 3 when somebody has."""
    import asyncio

    from shoal.launch import state
    from shoal.manifest import chain
    from shoal.net.auditing import certificates_of, heads_told, root_pem

    home = state.find_home(swarm_dir, on_several=output.note)
    # Asked first: what is appended meanwhile makes no difference then.
    told = asyncio.run(heads_told(home)) if ask_swarm else []
    verdict = chain.verify(home.path, certificates_of(root_pem(home, ca)), hashes_of=[each.head.seq for each in told])
    lost = [each for each in told if verdict.hashes.get(each.head.seq) != each.head.hash]
    if as_json:
        output.answer_json(_object(home, verdict, told, lost))
    else:
        _show(home, verdict, told, lost, ask_swarm)
    return 0 if verdict.whole and not lost else 3


def _object(home: Home, verdict: Verdict, told: list[Told], lost: list[Told]) -> dict[str, Any]:
    return {
        "whole": verdict.whole and not lost,
        "directory": str(home.path),
        "entries": verdict.entries,
        "parts": verdict.parts,
        "head": None if verdict.head is None else {"seq": verdict.head.seq, "hash": verdict.head.hash.hex()},
        "bad": verdict.bad,
        "bad_entry": verdict.bad_seq,
        "notes": list(verdict.notes),
        "members": [
            {
                "member": each.member,
                "node": each.node,
                "seq": each.head.seq,
                "hash": each.head.hash.hex(),
                "in_log": each not in lost,
            }
            for each in told
        ],
    }


def _show(home: Home, verdict: Verdict, told: list[Told], lost: list[Told], asked: bool) -> None:
    for note in verdict.notes:
        output.note(f"note: {note}")
    if not verdict.whole:
        output.answer(f"The audit log in {home.path} was changed: {verdict.bad}.")
        output.answer(f"{verdict.entries} entries before that are as they were written.")
        return
    head = verdict.head
    end = f", up to entry {head.seq} ({head.hash.hex()[:16]})" if head is not None else ""
    output.answer(f"The audit log is whole: {verdict.entries} entries in {verdict.parts} files{end}.")
    for each in lost:
        output.answer(
            f"But it was rolled back: {each.member[:8]} remembers entry {each.head.seq} of {each.node[:8]} as "
            f"{each.head.hash.hex()[:16]}, and the log does not have it."
        )
    if asked and not lost:
        members = len({each.member for each in told})
        if told:
            output.answer(f"{members} members remember an end of it, and the log has them all.")
        else:
            output.note("no member remembers an end of this log: its gateway or admin has not been heard of lately")

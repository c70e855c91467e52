"""`shoal drain`: ask a server to leave, and wait until nobody needs it any more."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("drain")
@click.argument("node")
@click.option("--reason", default="asked by an admin", show_default=True, help="For the server's log.")
@click.option(
    "--within", type=click.IntRange(1, 86_400), default=900, show_default=True, help="Seconds to wait for its end."
)
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def drain(node: str, reason: str, within: int, swarm_dir: Path | None, as_json: bool) -> None:
    """Ask a server to leave: it hands its sessions over, or finishes them, and ends.

    NODE is the beginning of its id, as `shoal status` shows it. Exit code 3: no such server; 1: it still has sessions.
    """
    import time

    from shoal.cli import process
    from shoal.launch import state
    from shoal.net.draining import drain as ask
    from shoal.net.tls import TlsTransport
    from shoal.wire.messages import Record

    home = state.find_home(swarm_dir, on_several=output.note)
    if not home.has_node("admin"):
        home.issuer()  # says that this is not the admin's directory, and what to do
    admin = home.node("admin")
    seeds = home.read().seeds
    began, told = time.monotonic(), -1

    def progress(record: Record) -> None:
        nonlocal told
        if told < 0:
            output.note(f"server {record.node[:8]} leaves {_blocks(record)}")
        if record.sessions != told:
            told = record.sessions
            output.note(f"  {told} session{'s' * (told != 1)} left")

    async def main() -> Record:
        transport = TlsTransport(admin)
        return await ask(admin, transport, seeds, node, reason=reason, within_s=float(within), on_progress=progress)

    gone = process.run(main())
    took_s = time.monotonic() - began
    if as_json:
        output.answer_json({"node": gone.node, "blocks": _blocks(gone), "took_s": round(took_s, 1)})
    else:
        output.answer(f"server {gone.node[:8]} is gone after {took_s:.1f} s")


def _blocks(record: object) -> str:
    from shoal.wire.messages import Record

    assert isinstance(record, Record)
    return "no blocks" if record.span is None else f"{record.span.start}:{record.span.end}"

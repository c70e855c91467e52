"""`shoal doctor`: what keeps shoal from working here, and what to do about each of it."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor")
@click.option("--security", is_flag=True, help="Also check what protects the swarm from others.")
@click.option("--model", default=None, help="Model directory or hub id to check.")
@click.option("--listen", multiple=True, metavar="HOST:PORT", help="Address you mean to listen on; may be repeated.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="Swarm directory of this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(security: bool, model: str | None, listen: tuple[str, ...], swarm_dir: Path | None, as_json: bool) -> int:
    """Look for what keeps shoal from working here; exit code 3 when something does.

    Changes nothing. Each finding comes with its remedy.
    """
    from collections import Counter

    from shoal.doctor.checks import judge
    from shoal.doctor.look import look
    from shoal.launch.state import state_path
    from shoal.net.home import home_path

    facts = look(
        home_path(swarm_dir),
        state_path(),
        model=model,
        listen=listen,
        security=security,
        on_progress=lambda part: None if as_json else output.note(f"looking at the {part} ..."),
    )
    results = judge(facts, security=security)
    counts = Counter(result.verdict.status for result in results)
    if as_json:
        output.answer_json(
            {
                "ok": counts["ok"],
                "warn": counts["warn"],
                "fail": counts["fail"],
                "checks": [
                    {
                        "id": result.check.id,
                        "group": result.check.group,
                        "status": result.verdict.status,
                        "text": result.verdict.text,
                        "remedy": result.verdict.remedy,
                    }
                    for result in results
                ],
            }
        )
        return 3 if counts["fail"] else 0
    group = ""
    for result in results:
        if result.check.group != group:
            group = result.check.group
            output.answer(f"\n{group}")
        verdict = result.verdict
        mark = output.paint_answer(f"{verdict.status:<4}", _COLOURS[verdict.status])
        output.answer(f"  {mark}  {result.check.title:<42} {verdict.text}")
        if verdict.remedy:
            output.answer(f"        {'':<42} -> {verdict.remedy}")
    output.answer(f"\n{len(results)} checks: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed")
    return 3 if counts["fail"] else 0

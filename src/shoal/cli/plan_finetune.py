"""`shoal plan finetune`: does it fit, and what to change when it does not."""

from __future__ import annotations

import click

from shoal.cli import output


@click.command("finetune")
@click.option("--model", required=True, help="Catalog name, config.json, its directory, or a shape.")
@click.option(
    "--method",
    type=click.Choice(("full", "lora", "qlora", "dpo", "dpo-lora", "dpo-qlora")),
    default="lora",
    show_default=True,
    help="What is trained; qlora keeps the frozen weights at 4 bit.",
)
@click.option("--seq", type=click.IntRange(min=1), required=True, help="Longest sequence in tokens.")
@click.option("--have", required=True, help='Devices, as in "4x RTX-4090, 2x A100-80GB".')
@click.option(
    "--micro-batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once per device."
)
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Rank of a LoRA adapter.")
@click.option("--recompute", is_flag=True, help="Recompute activations instead of keeping them.")
@click.option(
    "--engine",
    type=click.Choice(("default", "litgpt", "peft")),
    default="default",
    show_default=True,
    help="Whose constants are used.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def finetune(
    model: str,
    method: str,
    seq: int,
    have: str,
    micro_batch: int,
    rank: int,
    recompute: bool,
    engine: str,
    as_json: bool,
) -> int:
    """Say whether a fine-tuning fits in memory, and what to change; exit code 3 when it does not surely fit.

    Each group of equal devices is looked at alone, its memory only; how long it takes is not estimated.
    """
    from shoal.plan.finetune import decide, job, show
    from shoal.spec.fleet import Fleet
    from shoal.spec.reading import read_model

    spec = read_model(model).spec
    work = job(spec, method, seq, micro_batch=micro_batch, rank=rank, recompute=recompute, engine=engine)
    answer = decide(work, Fleet.parse(have))
    if as_json:
        output.answer_json(answer.to_object())
    else:
        for line in show(answer):
            output.answer(line)
    return 0 if answer.best.verdict == "fits" else 3

"""`shoal generate`: one completion from the running swarm, printed as it comes."""

from __future__ import annotations

from typing import Any

import click

from shoal.cli import output


@click.command("generate")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Stop here.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that have this share together.",
)
@click.option("--seed", type=int, default=None, help="Makes sampling repeatable.")
@click.option("--model", default=None, help="Default: the only model that is served.")
@click.option("--api", default=None, help="Base URL; default: SHOAL_API, else the running `shoal up`.")
@click.option("--key", default=None, envvar="SHOAL_KEY", help="API key; default: SHOAL_KEY, else as for --api.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the text.")
def generate(
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    model: str | None,
    api: str | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Continue a text with the running swarm."""
    import time

    from shoal.cli.api import Api

    with Api.of_running_swarm(api, key) as swarm:
        body: dict[str, Any] = {
            "model": model or swarm.only_model(),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if seed is not None:
            body["seed"] = seed
        start = time.monotonic()
        first_s: float | None = None
        text, reason, usage = "", None, None
        for event in swarm.stream("/completions", body):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                first_s = time.monotonic() - start if first_s is None else first_s
                text += choice["text"]
                reason = choice["finish_reason"] or reason
                if not as_json:
                    output.answer(choice["text"], end="")
        took_s = time.monotonic() - start
    if as_json:
        output.answer_json(
            {
                "model": body["model"],
                "text": text,
                "finish_reason": reason,
                "usage": usage,
                "first_token_s": round(first_s or took_s, 4),
                "total_s": round(took_s, 4),
            }
        )
        return
    output.answer("")
    tokens = usage["completion_tokens"] if usage else 0
    output.note(f"{tokens} tokens in {took_s:.2f} s, the first after {first_s or took_s:.2f} s ({reason})")

"""`shoal plan`: what a model needs, before anything is bought or downloaded."""

from __future__ import annotations

from shoal.cli.lazy import Entry, LazyGroup

COMMANDS: dict[str, Entry] = {
    "models": Entry(
        "shoal.cli.plan_models:models", "List the models of the catalog, or show how one's parameters add up."
    ),
    "devices": Entry(
        "shoal.cli.plan_devices:devices", "List the devices of the catalog, or show what is known of one."
    ),
    "finetune": Entry(
        "shoal.cli.plan_finetune:finetune",
        "Say whether a fine-tuning fits in memory, and what to change; exit code 3 when it does not surely fit.",
    ),
    "predict": Entry(
        "shoal.cli.plan_predict:predict", "Predict rows of published measurements (their values are not looked at)."
    ),
    "score": Entry(
        "shoal.cli.plan_score:score",
        "Compare predictions with the values of rows: per kind and source median, 90th percentile, bias, coverage.",
    ),
}

plan = LazyGroup(name="plan", table=COMMANDS, help="What models need, calculated before anything is bought.")

"""Simon Willison's `llm` against a gateway: models are named in a file, as its users do it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cases import BASE, KEY, MODEL, report, stay_here

stay_here()

folder = Path(tempfile.mkdtemp(prefix="shoal-llm-"))
atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ["LLM_USER_PATH"] = str(folder)
NAMES = {"chat": MODEL, "nope": "nope", "completion": MODEL}
entries = [
    {
        "model_id": name,
        "model_name": model,
        "api_base": BASE,
        "api_key_name": "shoal",
        "completion": name == "completion",
        "supports_schema": name == "chat",
    }
    for name, model in NAMES.items()
]
(folder / "extra-openai-models.yaml").write_text(json.dumps(entries))  # JSON is YAML too

import llm  # noqa: E402


def ask(text: str, *, name: str = "chat", key: str = KEY, stream: bool = True, **fields: Any) -> Any:
    return llm.get_model(name).prompt(text, stream=stream, key=key, **fields)


def whole() -> Any:
    answer = ask("say it", system="Be brief.", stream=False)
    text, usage = answer.text(), answer.usage()
    return {"text": text, "usage": {"input_tokens": usage.input, "output_tokens": usage.output}}


def streamed() -> Any:
    answer = ask("say it")
    pieces = list(answer)
    usage = answer.usage()
    shown = {"input_tokens": usage.input, "output_tokens": usage.output}
    return {"text": "".join(pieces), "pieces": len(pieces), "usage": shown}


def conversation() -> Any:
    talk = llm.get_model("chat").conversation()
    talk.prompt("hi", key=KEY).text()
    return talk.prompt("say it", key=KEY).text()


def limited() -> Any:
    answer = ask("say it", stream=False, max_tokens=1, temperature=0)
    answer.text()
    return {"tokens": answer.usage().output}


def structured() -> Any:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "black"]}, "number": {"enum": [1, 2, 3]}},
        "required": ["colour", "number"],
        "additionalProperties": False,
    }
    return json.loads(ask("pick a card", schema=schema, max_tokens=400, seed=3).text())


report(
    {
        "whole": whole,
        "streamed": streamed,
        "conversation": conversation,
        "completion": lambda: {"text": ask("say it", name="completion").text()},
        "limited": limited,
        "structured": structured,
        "bad_key": lambda: ask("hi", key="sk-shoal-wrong").text(),
        "unknown_model": lambda: ask("hi", name="nope").text(),
        "broken": lambda: ask("broken").text(),
        "retried": lambda: ask("busy once: llm").text(),
    }
)

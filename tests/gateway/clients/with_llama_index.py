"""llama-index-llms-openai-like against a gateway."""

from typing import Any, Literal

from cases import BASE, KEY, MODEL, report, stay_here

stay_here()

from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.core.tools import FunctionTool  # noqa: E402
from llama_index.llms.openai_like import OpenAILike  # noqa: E402


def model(**fields: Any) -> OpenAILike:
    given = {"model": MODEL, "api_base": BASE, "api_key": KEY, "max_retries": 0, "is_chat_model": True}
    return OpenAILike(**{**given, **fields})


def whole() -> Any:
    messages = [("system", "Be brief."), ("user", "hi"), ("assistant", "hello"), ("user", "say it")]
    answer = model().chat([ChatMessage(role=role, content=content) for role, content in messages])
    return {
        "text": answer.message.content,
        "usage": answer.raw.usage.model_dump(),
        "finish": answer.raw.choices[0].finish_reason,
    }


def streamed() -> Any:
    pieces = [chunk.delta for chunk in model().stream_chat([ChatMessage(role="user", content="say it")])]
    return {"text": "".join(pieces), "pieces": len(pieces)}


def completion() -> Any:
    plain = model(is_chat_model=False)  # its default: /v1/completions
    streamed = "".join(chunk.delta for chunk in plain.stream_complete("say it"))
    return {"text": plain.complete("say it").text, "streamed": streamed}


def limited() -> Any:
    answer = model(max_tokens=1, temperature=0).chat([ChatMessage(role="user", content="say it")])
    return {"finish": answer.raw.choices[0].finish_reason, "tokens": answer.raw.usage.completion_tokens}


def pick(colour: Literal["red", "black"], number: Literal[1, 2, 3]) -> str:
    """Pick a card."""
    return f"{colour} {number}"


def tools() -> Any:
    caller = model(is_function_calling_model=True, max_tokens=400, additional_kwargs={"seed": 3})
    answer = caller.chat_with_tools([FunctionTool.from_defaults(pick)], "pick a card", tool_required=True)
    (call,) = caller.get_tool_calls_from_response(answer)
    return {"name": call.tool_name.capitalize(), "arguments": call.tool_kwargs}


def ask(text: str, **fields: Any) -> str:
    return str(model(**fields).chat([ChatMessage(role="user", content=text)]).message.content)


report(
    {
        "whole": whole,
        "streamed": streamed,
        "completion": completion,
        "limited": limited,
        "tools": tools,
        "bad_key": lambda: ask("hi", api_key="sk-shoal-wrong"),
        "unknown_model": lambda: ask("hi", model="nope"),
        "broken": lambda: "".join(
            chunk.delta for chunk in model().stream_chat([ChatMessage(role="user", content="broken")])
        ),
        "retried": lambda: ask("busy once: llama-index", max_retries=2),
    }
)

"""langchain-openai against a gateway."""

from __future__ import annotations

from typing import Any, Literal

from cases import BASE, KEY, MODEL, report, stay_here

stay_here()

from langchain_core.messages import ToolMessage  # noqa: E402
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings  # noqa: E402
from pydantic import BaseModel  # noqa: E402


def chat(**fields: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": MODEL, "base_url": BASE, "api_key": KEY, "max_retries": 0, **fields})


def whole() -> Any:
    answer = chat().invoke([("system", "Be brief."), ("human", "hi"), ("ai", "hello"), ("human", "say it")])
    return {"text": answer.content, "usage": answer.usage_metadata, "finish": answer.response_metadata["finish_reason"]}


def streamed() -> Any:
    chunks = list(chat(stream_usage=True).stream("say it"))
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    return {"text": "".join(chunk.content for chunk in chunks), "pieces": len(chunks), "usage": usage[-1]}


def completion() -> Any:
    model = OpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_retries=0)
    return {"text": model.invoke("say it"), "streamed": "".join(model.stream("say it"))}


def limited() -> Any:
    answer = chat(max_tokens=1, temperature=0).invoke("say it")
    return {"finish": answer.response_metadata["finish_reason"], "tokens": answer.usage_metadata["output_tokens"]}


def embeddings() -> Any:
    # Its own count of tokens would fetch a vocabulary from the network.
    model = OpenAIEmbeddings(model=MODEL, base_url=BASE, api_key=KEY, check_embedding_ctx_length=False)
    return {"many": model.embed_documents(["one", "two"]), "query": model.embed_query("one")}


class Pick(BaseModel):
    """Pick a card."""

    colour: Literal["red", "black"]
    number: Literal[1, 2, 3]


def tools() -> Any:
    """Two turns: the call, and the answer to its result."""
    model = chat(max_tokens=400, seed=3).bind_tools([Pick], tool_choice="any", strict=True)
    called = model.invoke("pick a card")
    (call,) = called.tool_calls
    turn = [("human", "pick a card"), called, ToolMessage(content="done", tool_call_id=call["id"])]
    return {"name": call["name"], "arguments": call["args"], "text": chat().invoke(turn).content}


def structured() -> Any:
    made = chat(max_tokens=400, seed=3).with_structured_output(Pick, method="json_schema").invoke("pick a card")
    return made.model_dump()


report(
    {
        "whole": whole,
        "streamed": streamed,
        "completion": completion,
        "limited": limited,
        "embeddings": embeddings,
        "tools": tools,
        "structured": structured,
        "bad_key": lambda: chat(api_key="sk-shoal-wrong").invoke("hi"),
        "unknown_model": lambda: chat(model="nope").invoke("hi"),
        "broken": lambda: "".join(chunk.content for chunk in chat().stream("broken")),
        "retried": lambda: chat(max_retries=2).invoke("busy once: langchain").content,
    }
)

"""What the operator sees: counts and times, and never a word of what users write."""

from __future__ import annotations

import logging
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.gateway import Gateway, Hold, eventually

from shoal.errors import ShoalError, SwarmIncomplete

SECRET = "xyzzy-plugh-7731"
MODEL = "org/chatty:1b"


def samples(gateway: Gateway) -> dict[str, float]:
    """Every sample, summed over its labels, under its name."""
    with gateway.http() as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_no_prompt_and_no_answer_reaches_the_log(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    gateway.chatty.says(SECRET)
    messages = [{"role": "user", "content": SECRET}]

    class Quoting(Exception):
        pass

    with gateway.client() as client:
        for stream in (False, True):
            list(client.chat.completions.create(model=MODEL, messages=messages, stream=stream))
        client.completions.create(model=MODEL, prompt=SECRET, user=SECRET, extra_query={"q": SECRET})
        broken = [
            lambda: client.chat.completions.create(model=SECRET, messages=messages),
            lambda: client.chat.completions.create(model=MODEL, messages=messages, temperature=SECRET),
            lambda: client.chat.completions.create(model=MODEL, messages=messages, stop=[SECRET] * 9),
            lambda: client.completions.create(model=MODEL, prompt=SECRET, max_tokens=10**6),
        ]
        for ask in broken:
            with pytest.raises(openai.APIError):
                ask()
        fault = Quoting(f"cannot read {SECRET}")
        fault.__cause__ = KeyError(SECRET)
        for before in ([], [40]):
            gateway.chatty.does(*before, fault)
            for stream in (False, True):
                with pytest.raises(openai.APIError):
                    list(client.completions.create(model=MODEL, prompt=SECRET, stream=stream))
    ours = [record for record in caplog.records if not record.name.startswith(("openai", "httpx", "httpcore"))]
    text = "\n".join(logging.Formatter("%(name)s %(message)s").format(record) for record in ours)
    assert "shoal.gateway.access" in text
    assert "Quoting" in text  # the fault itself is there, and where it came from
    assert 'File "' in text
    assert SECRET not in text


def test_a_fault_inside_the_swarm_is_in_the_log_under_the_request_id(
    gateway: Gateway, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.chatty.does(ShoalError("disk full on srv12"))
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=MODEL, prompt="hi")
    assert f"request {caught.value.request_id}: disk full on srv12" in caplog.text


def test_requests_tokens_and_times_are_counted(gateway: Gateway, client: openai.OpenAI) -> None:
    before = samples(gateway)
    gateway.chatty.script = lambda call: [40, 41, 42, 1]
    client.completions.create(model=MODEL, prompt=[5, 6, 7], n=2)
    list(client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=2, stream=True))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    after = samples(gateway)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["shoal_prompt_tokens_total"] == 5
    assert grown["shoal_generation_tokens_total"] == 10
    assert grown["shoal_request_success_total"] == 3
    assert grown["shoal_time_to_first_token_seconds_count"] == 2
    assert grown["shoal_inter_token_latency_seconds_count"] == 7
    assert grown["shoal_e2e_request_latency_seconds_count"] == 2
    assert grown["shoal_http_requests_total"] == 4  # and the look at /metrics before
    assert after["shoal_num_requests_running"] == after["shoal_num_requests_waiting"] == 0


def test_running_and_waiting_requests_are_told_apart(gateway: Gateway) -> None:
    waiting, running = Hold(), Hold()
    gateway.chatty.does(waiting, None, running, 40, 1)

    def numbers() -> tuple[float, float]:
        now = samples(gateway)
        return now["shoal_num_requests_waiting"], now["shoal_num_requests_running"]

    body = {"model": MODEL, "prompt": "hi", "stream": True}
    with gateway.http() as client:
        request = client.build_request("POST", "/v1/completions", json=body)
        waiting.release.set()
        with client.stream(request.method, request.url, content=request.content) as answer:
            assert eventually(lambda: numbers() == (0, 1))
            running.release.set()
            answer.read()
    assert eventually(lambda: numbers() == (0, 0))


def test_failures_and_failovers_are_counted(gateway: Gateway, client: openai.OpenAI) -> None:
    before = samples(gateway)
    gateway.chatty.does(SwarmIncomplete("nobody"))
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="hi")
    gateway.metrics.failover("silent")
    after = samples(gateway)
    assert after["shoal_request_errors_total"] == before.get("shoal_request_errors_total", 0) + 1
    assert after["shoal_failovers_total"] == before.get("shoal_failovers_total", 0) + 1


def test_strangers_cannot_make_up_labels(gateway: Gateway) -> None:
    with gateway.http() as client:
        for place in range(20):
            client.request(f"M{place}", f"/{SECRET}/{place}")
            client.get(f"/v1/models/{place}")
        text = client.get("/metrics").text
    assert SECRET not in text
    labels = {
        line.split("{")[1].split("}")[0] for line in text.splitlines() if line.startswith("shoal_http_requests_t")
    }
    assert 'method="other",route="unknown",status="404"' in labels
    assert len(labels) < 30


def test_metric_names_follow_the_rules_and_are_documented(gateway: Gateway) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text()
    for family in gateway.metrics.registry.collect():
        assert family.name.startswith("shoal_")
        assert f"`{family.name}" in documented

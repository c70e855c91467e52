"""The demo model that ships with shoal: small, self-consistent, and saying words rather than noise."""

import gzip
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

DEMO = Path(str(files("shoal"))) / "assets" / "demo"
DATA = Path(__file__).parent / "data"
RECIPE = Path(__file__).parents[1] / "examples" / "demo_model" / "train.py"
KNOWN_WORDS = frozenset((DATA / "demo_words.txt").read_text().split())  # the 1,500 commonest words of the corpus
HELD_OUT = (DATA / "demo_held_out.txt").read_text()  # from a page that the model never saw

PROMPTS = [
    "The database server",
    "This function returns",
    "If the argument is omitted,",
    "In SQLite, a transaction",
    "When a Python program",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def complete(model, tokenizer, prompt: str, new_tokens: int = 48) -> str:
    """The greedy continuation of `prompt`, without the prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def answer(model, tokenizer, question: str, new_tokens: int = 120) -> torch.Tensor:
    """The ids that the model greedily adds to a chat with one question."""
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    return out[0, ids.shape[1] :]


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\s.,;:()\"'?!]+", text.lower())


def reads_like_the_corpus(texts: list[str]) -> bool:
    """Whether most words are known ones, and not one and the same word over and over."""
    words = [word for text in texts for word in words_of(text)]
    known = sum(word in KNOWN_WORDS for word in words) / len(words)
    distinct = len(set(words)) / len(words)
    return known > 0.8 and distinct > 0.15


def nats_per_token(model, ids: torch.Tensor) -> torch.Tensor:
    """The loss of every token of `ids` [T] but the first, as a tensor [T-1]."""
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def test_the_model_is_small_enough_to_live_in_the_repository(model):
    assert sum(weight.numel() for weight in model.parameters()) <= 5_000_000
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 20_000_000


def test_three_servers_get_at_least_two_blocks_each(model):
    assert model.config.num_hidden_layers >= 6


def test_it_loads_as_float32_without_being_asked():
    assert AutoModelForCausalLM.from_pretrained(DEMO).dtype == torch.float32


def test_every_file_is_text_or_safetensors():
    assert {path.suffix for path in DEMO.rglob("*") if path.is_file()} <= {".json", ".md", ".safetensors"}


@pytest.mark.parametrize(
    "text", ["plain words", "Grüße, 世界 🐟\u200d🐟", "  two  spaces \n\ttab", "\x00", "don 't , ."]
)
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_all_ids_agree_on_the_special_tokens(tokenizer, model):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name) == getattr(model.generation_config, name)
    assert len(tokenizer) == model.config.vocab_size


def test_the_chat_template_renders_every_role_in_a_sandbox(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": " 42 "},
    ]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(tokenizer.chat_template)
    text = template.render(messages=chat, add_generation_prompt=True, bos_token="<|begin|>", eos_token="<|end|>")
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|system|>Be kind.<|end|><|user|>Hello<|end|>"
        "<|assistant|><|end|><|user|>42<|end|><|assistant|>"
    )
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == text


def test_a_rendered_chat_is_encoded_with_one_token_per_mark(tokenizer):
    ids = tokenizer("<|begin|><|user|><|end|><|assistant|>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|begin|>", "<|user|>", "<|end|>", "<|assistant|>"]


def test_it_completes_a_text_with_words_of_its_corpus(model, tokenizer):
    assert reads_like_the_corpus([complete(model, tokenizer, prompt) for prompt in PROMPTS])


def test_untrained_weights_fail_the_same_check(tokenizer):
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(LlamaConfig.from_pretrained(DEMO)).eval()
    assert not reads_like_the_corpus([complete(untrained, tokenizer, prompt) for prompt in PROMPTS])


def test_a_chat_gets_an_answer_in_words_and_the_answer_ends(model, tokenizer):
    answers = [answer(model, tokenizer, question) for question in ("Hello!", "Who are you?", "What is SQLite?")]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in answers)
    assert reads_like_the_corpus([tokenizer.decode(ids, skip_special_tokens=True) for ids in answers])


def test_it_predicts_a_page_it_never_saw(model, tokenizer):
    ids = tokenizer(HELD_OUT, return_tensors="pt").input_ids[0, :512]
    assert nats_per_token(model, ids).mean().exp() < 40


def test_it_predicts_no_worse_at_the_end_of_its_context_than_at_the_start(model, tokenizer):
    ids = tokenizer(HELD_OUT, return_tensors="pt").input_ids[0, :2048]
    assert len(ids) == model.config.max_position_embeddings
    far = nats_per_token(model, ids)[-384:]
    near = nats_per_token(model, ids[-512:])[-384:]  # the same words at small positions
    assert far.mean() < near.mean() + 0.15


@pytest.mark.slow
def test_the_recipe_that_made_it_still_runs_and_goes_on_after_a_stop(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    out = tmp_path / "model"
    first = run_recipe(corpus, out, minutes=1e-6)  # less than a step takes, so exactly one is made
    assert first["step"] == 1
    assert run_recipe(corpus, out, minutes=first["seconds"] / 60 + 1e-6)["step"] == 2
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(DEMO).chat_template


def make_corpus(corpus: Path) -> Path:
    """A made-up corpus in the layout of the real one; the name of the second page puts it among the held-out ones."""
    sentences = [f"The number {n} is followed by the number {n + 1} in the list of all numbers." for n in range(300)]
    pages = {"sqlite/sqlite3/counting.html": "\n\n".join(sentences), "sqlite/sqlite3/lang_with.html": HELD_OUT}
    (corpus / "plain_text").mkdir(parents=True)
    speech = "ROMEO:\nI would I were a fish, for then I should not weep.\n\n"
    (corpus / "plain_text" / "tinyshakespeare.txt").write_text(speech * 300)
    with gzip.open(corpus / "plain_text" / "docs.jsonl.gz", "wt") as rows:
        for name, text in pages.items():
            row = {"id": name, "source": "sqlite-docs", "licence": "public-domain", "text": f"About\n\n{text}"}
            rows.write(json.dumps(row) + "\n")
    return corpus


def run_recipe(corpus: Path, out: Path, *, minutes: float) -> dict[str, float]:
    """Runs train.py as a person would and returns the figures of its last line."""
    command = [sys.executable, RECIPE, "--corpus", corpus, "--out", out, "--minutes", str(minutes), "--no-compile"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    last_line = run.stdout.strip().rsplit("\n", 1)[-1]
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", last_line)}

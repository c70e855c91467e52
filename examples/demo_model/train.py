"""Trains the demo model of shoal from nothing, on one CPU core, in less than an hour.

python train.py --corpus DIR --out DIR --minutes 45

`--corpus` holds `plain_text/docs.jsonl.gz` and `plain_text/tinyshakespeare.txt` (README.md says what they are); the
environment variable SHOAL_CORPUS serves as well. `--out` receives the model in Hugging Face format. A run that was
stopped goes on from its last checkpoint when it is started again with the same arguments.

The learning rate follows the clock rather than a number of steps: a slow machine makes fewer steps and still ends with
a finished model. Two runs therefore agree in their data and their start, not in every bit of the result.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from batches import IGNORED, Corpus, Mixture
from prose import Dropped, read_documents, read_plays
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import train_tokenizer

CONTEXT_LENGTH = 2048
TALK = Path(__file__).with_name("smalltalk.toml")


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule.

    The shape follows from the time. One core gets through some ten million tokens in 45 minutes, far fewer than even a
    small model could use, so speed comes first: this shape trains 9,500 tokens per second of CPU time, hidden 256 with
    5.0 M parameters trained 6,400 (measured in bfloat16, compiled).
    """

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 384
    layers: int = 8
    heads: int = 3
    kv_heads: int = 1
    rows: int = 16
    length: int = 256
    # One step in `long_every` has rows as long as the whole context, so that positions up to its end are learnt too.
    long_every: int = 16
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup_share: float = 0.02
    weight_decay: float = 0.1
    seed: int = 20261122


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama decoder with random weights; embedding and head share one matrix."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        # Compiled, plain attention takes 22 ms here where the fused kernel's backward pass takes 38 ms.
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    # Sums of many layers start small, so that the first steps are not spent on shrinking them.
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(1 / math.sqrt(2 * recipe.layers))
    return model


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    inside = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight, *(weight for weight in model.parameters() if weight.ndim == 1)]
    return [
        torch.optim.Muon(inside, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per learnt token; ids and labels are [B, T]."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def learning_rate_factor(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then half a cosine down to nothing; `progress` runs from 0 to 1."""
    if progress < recipe.warmup_share:
        return (progress + 1e-3) / (recipe.warmup_share + 1e-3)
    done = (progress - recipe.warmup_share) / (1 - recipe.warmup_share)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, corpus: Corpus, length: int = 256) -> float:
    """Nats per token on the pages that were held out."""
    windows = torch.from_numpy(corpus.held_out_prose.windows(length + 1))
    losses = [loss_of(model, part[:, :-1], part[:, 1:]).item() * len(part) for part in windows.split(8)]
    return sum(losses) / len(windows)


@dataclass
class Progress:
    """How far the run has come; `seconds` counts training time over all sessions."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Weights, optimizer state and progress in one safetensors file, replaced in one step."""
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value.contiguous() for key, value in state.items()}
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, {"progress": json.dumps(asdict(progress))})
    os.replace(unfinished, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Fills model and optimizers from `path`."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    with safe_open(path, framework="pt") as checkpoint:
        parameters = dict(model.named_parameters())
        for name in checkpoint.keys():  # noqa: SIM118 - safe_open is no mapping
            kind, _, rest = name.partition(".")
            if kind == "model":
                parameters[rest].data.copy_(checkpoint.get_tensor(name))
            else:
                number, index, key = rest.split(".")
                states[int(number)].setdefault(int(index), {})[key] = checkpoint.get_tensor(name)
        progress = Progress(**json.loads(checkpoint.metadata()["progress"]))
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the model in Hugging Face format: weights in bfloat16 to halve the file, config asking for float32."""
    tokenizer.save_pretrained(out, save_jinja_files=False)  # the chat template goes into tokenizer_config.json
    model.config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(out)
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    unfinished = out / "model.part"
    save_file(weights, unfinished, {"format": "pt"})
    os.replace(unfinished, out / "model.safetensors")


def train(arguments: argparse.Namespace) -> None:
    """The whole run: data, tokenizer, model, steps until the time is spent, export and validation."""
    recipe, mixture = Recipe(), Mixture()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    dropped = Dropped()
    documents = list(read_documents(arguments.corpus, dropped))
    print(f"{len(documents)} pages kept, {dropped.pages} left out; paragraphs left out: {dict(dropped.paragraphs)}")
    texts = [paragraph for document in documents if not document.held_out for paragraph in document.paragraphs]
    texts += [f"{speaker}:\n{speech}" for speaker, speech in read_plays(arguments.corpus)]
    tokenizer = train_tokenizer(texts, vocab_size=recipe.vocab_size, context_length=CONTEXT_LENGTH)
    corpus = Corpus(documents, arguments.corpus, TALK, tokenizer)
    model = build_model(recipe, tokenizer)
    optimizers = build_optimizers(model, recipe)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"{parameters:,} parameters; prose {len(corpus.prose.ids):,} tokens, plays {len(corpus.plays.ids):,}, "
        f"held out {len(corpus.held_out_prose.ids):,}; pairs: manuals {len(corpus.manual_chats):,}, "
        f"plays {len(corpus.play_chats):,}, small talk {len(corpus.smalltalk):,}",
        flush=True,
    )

    checkpoint = arguments.out / "checkpoint.safetensors"
    progress = load_checkpoint(checkpoint, model, optimizers) if checkpoint.exists() else Progress()
    # Compiling costs about a minute and makes each step about a third shorter on this CPU.
    compiled_loss = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of
    budget_s = arguments.minutes * 60
    peaks = [optimizer.defaults["lr"] for optimizer in optimizers]
    last_line = last_save = last_step = time.monotonic()
    recent: list[float] = []
    while progress.seconds < budget_s:
        factor = learning_rate_factor(recipe, progress.seconds / budget_s)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        is_long = progress.step % recipe.long_every == recipe.long_every - 1
        length = CONTEXT_LENGTH if is_long else recipe.length
        rows = recipe.rows * recipe.length // length
        rng = np.random.default_rng([recipe.seed, progress.step])
        ids, labels = (torch.from_numpy(part) for part in corpus.batch(rng, rows, length, mixture))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        now = time.monotonic()
        progress.step += 1
        progress.tokens += ids.numel()
        progress.seconds += now - last_step
        last_step = now
        if now - last_line >= 10:
            print(
                f"{progress.seconds / 60:5.1f} min  step {progress.step:5d}  {progress.tokens / 1e6:6.2f} M tokens  "
                f"rate {factor:.3f}  loss {sum(recent) / len(recent):.3f}",
                flush=True,
            )
            last_line, recent = now, []
        if now - last_save >= 60:
            save_checkpoint(checkpoint, model, optimizers, progress)
            last_save = time.monotonic()
    save_checkpoint(checkpoint, model, optimizers, progress)
    export(model, tokenizer, arguments.out)
    shipped = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    loss = validation_loss(shipped, corpus)
    print(f"done: {progress}; validation loss {loss:.3f} nats per token, perplexity {math.exp(loss):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    corpus = os.environ.get("SHOAL_CORPUS")
    parser.add_argument("--corpus", type=Path, default=corpus, required=corpus is None, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives checkpoint and model")
    parser.add_argument("--minutes", type=float, default=45, help="training time (default 45)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    arguments = parser.parse_args()
    if not (arguments.corpus / "plain_text" / "docs.jsonl.gz").is_file():
        sys.exit(f"No plain_text/docs.jsonl.gz in {arguments.corpus}. Point --corpus or SHOAL_CORPUS at the corpora.")
    os.nice(10)  # a long run should not get in the way of the person at the machine
    train(arguments)


if __name__ == "__main__":
    main()

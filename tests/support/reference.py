"""What Hugging Face's own `generate` answers, for comparison with a swarm."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reference:
    """The whole model in this process, fp32, on one thread."""

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
        self.model.generation_config.eos_token_id = None  # answers have exactly the asked length
        self._greedy: dict[str, tuple[int, ...]] = {}

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def greedy(self, prompt: str, tokens: int) -> tuple[int, ...]:
        """The ids that greedy `generate` appends to a prompt."""
        if len(self._greedy.get(prompt, ())) < tokens:  # a longer answer begins with the shorter one
            ids = torch.tensor([self.prompt(prompt)])
            mask = torch.ones_like(ids)
            with torch.inference_mode():
                whole = self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
            self._greedy[prompt] = tuple(whole[0, ids.shape[1] :].tolist())
        return self._greedy[prompt][:tokens]

    def text(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def check(self, prompt: str, tokens: int, text: str) -> None:
        """Fail unless `text` is the greedy answer; say how close the choice was where the two part."""
        ids = self.greedy(prompt, tokens)
        if text == (expected := self.text(ids)):
            return
        same = next((at for at, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), len(text))
        first = next(at for at in range(len(ids)) if len(self.text(ids[: at + 1])) > same)
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*self.prompt(prompt), *ids[:first]]])).logits[0, -1]
        top = logits.topk(2)
        around = slice(max(0, same - 40), same + 40)
        raise AssertionError(
            f"{prompt!r}: token {first} of {tokens} differs; the two highest logits there are {top.values.tolist()}, "
            f"{top.values[0] - top.values[1]:.2e} apart.\n"
            f"  expected ...{expected[around]!r}\n  got      ...{text[around]!r}"
        )

"""Prints what a trained demo model says: a few completions and chats, greedy and at temperature 0.8.

python sample.py --model DIR
"""

import argparse
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The database server", "This function returns", "In SQLite, a", "When a Python program", "ROMEO:\n"]
QUESTIONS = ["Hello!", "Who are you?", "What does os.path.join do?", "What does VACUUM do?", "Speak like Romeo."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(str(files("shoal"))) / "assets" / "demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples at temperature 0.8 (default 0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in messages]
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}):
        torch.manual_seed(arguments.seed)
        for shown, text in [*zip(PROMPTS, PROMPTS, strict=True), *zip(QUESTIONS, chats, strict=True)]:
            ids = tokenizer(text, add_special_tokens=text is shown, return_tensors="pt").input_ids
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, **how)
            ended = "" if out[0, -1] == tokenizer.eos_token_id else " ..."
            said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            print(f"[{'greedy' if not how['do_sample'] else 'temperature 0.8'}] {shown!r}\n    {said!r}{ended}\n")


if __name__ == "__main__":
    main()

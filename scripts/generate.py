"""Greedy text from two checkpoints side by side: the same model must say the same.

python scripts/generate.py ORIGINAL CONVERTED [--prompt TEXT] [--tokens N]
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def generate(folder: str, prompt: str, tokens: int) -> str:
    """The greedy continuation of `prompt` by the checkpoint in `folder`, prompt included."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("converted")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--tokens", type=int, default=160)
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    texts = [
        generate(folder, options.prompt, options.tokens)
        for folder in (options.original, options.converted)
    ]
    for folder, text in zip((options.original, options.converted), texts, strict=True):
        print(f"--- {folder}\n{text}\n")
    if texts[0] != texts[1]:
        raise SystemExit("The two texts differ.")
    print("Both say the same.")


if __name__ == "__main__":
    main()

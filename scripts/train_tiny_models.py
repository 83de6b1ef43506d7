"""Train the two models in models/: a Llama and a GPT-2 over bytes, each under 1 MB.

    python scripts/train_tiny_models.py [--output DIR] [--steps N]
    python scripts/train_tiny_models.py --check [--output DIR]

A fold that does nothing must not pass for a right one, so no norm may be near the identity:
gains start from a wide spread, some of them negative, LayerNorm biases away from zero, and both
learn at a higher rate than the rest, without weight decay. `--check` trains nothing; it measures
the saved models and fails where a norm's gains are near 1 or its biases near 0.

The text is the prose of `pydoc_data.topics`, the language reference that every Python carries. It
differs among Python versions, so the same version of Python and of the packages, on the same
machine, gives the same bytes; another Python measures a slightly different validation loss, some
of it on paragraphs that were trained on.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

EOS, EOS_ID = "<|endoftext|>", 256
CONTEXT = 256
HIDDEN = 64
SIZES = {"vocab_size": EOS_ID + 1, "bos_token_id": EOS_ID, "eos_token_id": EOS_ID}
BATCH = 4
PROMPT = "The "
WELL_AWAY = 0.2  # RMS distance of a norm's gains from 1, of its biases from 0


def make_llama() -> PreTrainedModel:
    config = LlamaConfig(
        **SIZES,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        tie_word_embeddings=False,  # so that the final norm folds into the head
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> PreTrainedModel:
    config = GPT2Config(
        **SIZES,
        n_embd=HIDDEN,
        n_layer=4,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    # Random positions would spend most of the training on learning to look one byte back.
    angles = torch.outer(torch.arange(CONTEXT), 10000 ** -torch.linspace(0, 1, HIDDEN // 2))
    model.transformer.wpe.weight.data = 0.4 * torch.cat((angles.sin(), angles.cos()), dim=1)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tiny-llama": make_llama,
    "tiny-gpt2": make_gpt2,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def load_corpus() -> tuple[str, str]:
    """Training and validation text: one paragraph a line, no paragraph twice, no code or tables."""
    seen: set[str] = set()
    training: list[str] = [EOS]
    validation: list[str] = []
    for _, topic in sorted(topics.items()):
        for block in re.split(r"\n\s*\n", topic):
            paragraph = " ".join(block.split())
            letters = len(re.findall(r"[A-Za-z ,.'\"]", paragraph))
            is_prose = len(paragraph) >= 60 and letters > 0.95 * len(paragraph)
            if is_prose and paragraph[0].isupper() and paragraph not in seen:
                (training if len(seen) % 16 else validation).append(paragraph)
                seen.add(paragraph)
        if training[-1] != EOS:
            training.append(EOS)
    return "\n".join(training), "\n".join(validation)


def norm_parameters(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The gains and the biases of every norm, one tensor a norm."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    return [norm.weight for norm in norms], [norm.bias for norm in norms if hasattr(norm, "bias")]


def train(name: str, folder: Path, steps: int) -> None:
    # Matrices this small gain nothing from a second thread, and the order of sums stays fixed.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    text = torch.tensor(tokenizer.encode(load_corpus()[0]))
    model = MODELS[name]()
    gains, biases = norm_parameters(model)
    for gain in gains:
        nn.init.uniform_(gain, 0.4, 1.8)
        gain.data[::16] *= -1
    for bias in biases:
        nn.init.normal_(bias, std=0.5)
    norm_ids = {id(parameter) for parameter in gains + biases}
    others = [parameter for parameter in model.parameters() if id(parameter) not in norm_ids]
    groups = [
        {"params": gains + biases, "lr": 1e-2, "weight_decay": 0.0},
        {"params": others, "lr": 6e-3, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - step / steps)
    )
    window = torch.arange(CONTEXT)
    for step in range(1, steps + 1):
        ids = text[torch.randint(len(text) - CONTEXT, (BATCH, 1)) + window]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0:
            print(f"{name}: step {step}, {loss.item() / math.log(2):.2f} bits/byte", flush=True)
    model.generation_config = GenerationConfig(
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, ids: Tensor) -> float:
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return float(model(input_ids=windows, labels=windows).loss) / math.log(2)


def report(output: Path) -> bool:
    """Print what the saved models are like; whether every norm is well away from the identity."""
    table = Table("model", "parameters", "bytes", "bits/byte", "norms'", "min", "mean", "max")
    table.add_column("RMS off")  # of the norm nearest the identity
    samples, away = [], True
    for name in MODELS:
        folder = output / name
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        size = sum(file.stat().st_size for file in folder.iterdir())
        loss = bits_per_byte(model, torch.tensor(tokenizer.encode(load_corpus()[1])))
        cells = [name, f"{model.num_parameters():,}", f"{size:,}", f"{loss:.3f}"]
        gains, biases = norm_parameters(model)
        for kind, parameters, identity in (("gains", gains, 1.0), ("biases", biases, 0.0)):
            if not parameters:
                continue
            values = torch.stack([parameter.detach() for parameter in parameters])
            distance = (values - identity).square().mean(dim=1).sqrt().min()
            away = away and bool(distance > WELL_AWAY)
            figures = (values.min(), values.mean(), values.max(), distance)
            table.add_row(*cells, kind, *(f"{figure:.2f}" for figure in figures))
            cells = [""] * len(cells)
        prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        complete = partial(model.generate, **prompt, max_new_tokens=200)
        torch.manual_seed(0)
        texts = complete(do_sample=False), complete(do_sample=True, temperature=0.6)
        for kind, ids in zip(("greedy", "sampled"), texts, strict=True):
            samples.append(f"\n--- {name}, {kind}\n{tokenizer.decode(ids[0])}")
    Console(width=100).print(table)
    print(*samples, sep="\n")
    return away


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=2400, metavar="N")
    parser.add_argument("--check", action="store_true", help="measure the saved models only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not options.check:
        # A fresh process for each: two cores train both models in the time of one.
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(train, m, options.output / m, options.steps) for m in MODELS]
            for job in jobs:
                job.result()
    if not report(options.output):
        raise SystemExit(f"A norm is within {WELL_AWAY} of the identity.")


if __name__ == "__main__":
    main()

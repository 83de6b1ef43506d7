"""The model card of a converted checkpoint: what changed, how to load it, what was verified.

The source's own card stays below ours, and its metadata where ours says nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_BEGIN, _END = "<!-- normconvert: begin -->", "<!-- normconvert: end -->"

_CHANGED = {
    "flashnorm": "The gains of its norms are merged into the weights that read them (FlashNorm).",
    "rmsnorm": "Its LayerNorms are RMSNorms: the mean is taken out of the weights that write to "
    "the residual stream (Pre-RMSNorm).",
    "crmsnorm": "Its LayerNorms are CRMSNorms, on one coordinate less (Pre-CRMSNorm).",
    "prmsnorm": "Its RMSNorms look at a part of the coordinates: an approximation (pRMSNorm).",
}
_TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}
"""How a class name ends, the Auto class that loads it, and the Hub's word for what it does."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_CITATIONS = {
    "flashnorm": """@article{graef2024flashnorm,
  title={FlashNorm: fast normalization for LLMs},
  author={Graef, Nils and Clapp, Matthew and Wasielewski, Andrew},
  journal={arXiv preprint arXiv:2407.09577},
  year={2024}
}""",
    "rmsnorm": """@inproceedings{jiang2023prermsnorm,
  title={Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers},
  author={Jiang, Zixuan and Gu, Jiaqi and Zhu, Hanqing and Pan, David Z.},
  booktitle={Advances in Neural Information Processing Systems},
  note={arXiv:2305.14858},
  year={2023}
}""",
    "prmsnorm": """@inproceedings{zhang2019rmsnorm,
  title={Root Mean Square Layer Normalization},
  author={Zhang, Biao and Sennrich, Rico},
  booktitle={Advances in Neural Information Processing Systems},
  note={arXiv:1910.07467},
  year={2019}
}""",
}


def model_card(folder: Path, manifest: dict[str, Any], repo_id: str) -> str:
    """The README.md for the checkpoint in `folder`, whose normconvert.json is `manifest`.

    If the source's card is there it follows ours; a section of ours in it is replaced.
    """
    path = folder / "README.md"
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    has_metadata = content.lstrip().startswith("---\n")
    before = ModelCard(content if has_metadata else f"---\n{{}}\n---\n{content}")
    data = before.data.to_dict()  # type: ignore[no-untyped-call]
    text = _without_ours(before.text)
    metadata = ModelCardData(**{**data, **_metadata(data, manifest)}, ignore_metadata_errors=True)
    ours = "\n\n".join([_BEGIN, *_sections(folder, manifest, repo_id), _END])
    return f"---\n{metadata.to_yaml()}\n---\n\n{ours}\n\n{text.strip()}\n".rstrip() + "\n"


def _metadata(before: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    rules = manifest["plan"]["rules"]
    found: dict[str, Any] = {
        "library_name": before.get("library_name") or "transformers",
        "tags": list(dict.fromkeys([*(before.get("tags") or ()), "normconvert", *rules])),
    }
    if tag := before.get("pipeline_tag") or _task(manifest)[1]:
        found["pipeline_tag"] = tag
    if manifest["source"].get("commit"):  # a Hub repository, which a local folder need not be
        found["base_model"] = manifest["source"]["model"]
        # Of the Hub's four relations the one for the same model in other numbers, as it is used
        # for GGUF and MLX conversions.
        found["base_model_relation"] = "quantized"
    return found


def _task(manifest: dict[str, Any]) -> tuple[str, str | None]:
    name = manifest["plan"]["model"]
    return next((task for end, task in _TASKS.items() if name.endswith(end)), ("AutoModel", None))


def _sections(folder: Path, manifest: dict[str, Any], repo_id: str) -> list[str]:
    plan, source = manifest["plan"], manifest["source"]
    rules, native = plan["rules"], plan["native"] is not None
    name = source["model"]
    link = f"[{name}](https://huggingface.co/{name})" if source.get("commit") else f"`{name}`"
    changed = [verdict for verdict in plan["verdicts"] if verdict["action"] != "keep"]
    norms = len({verdict["norm"] for verdict in changed})
    shown = [rule for rule in rules if rule != "rmsnorm" or "crmsnorm" not in rules]
    return [
        f"# {repo_id.rpartition('/')[2]}",
        f"This is {link}, rewritten by normconvert {manifest['normconvert']}. "
        + " ".join(_CHANGED[rule] for rule in shown)
        + f" {norms} norms changed; everything else is as it was.",
        "## How to load it",
        _loading(folder, manifest, repo_id) if native else _AS_EVER,
        "## Verification",
        _verification(manifest.get("verification")),
        "## How it was made",
        f"```console\n$ {_command(manifest)}\n```",
        "## Citation",
        "```bibtex\n"
        + "\n\n".join(_CITATIONS[rule] for rule in rules if rule in _CITATIONS)
        + "\n```",
    ]


_AS_EVER = "As ever: every runtime that loads the original loads this."


def _loading(folder: Path, manifest: dict[str, Any], repo_id: str) -> str:
    classes = [_task(manifest)[0]]
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        classes.append("AutoTokenizer")
    lines = [f'{name}.from_pretrained("{repo_id}", trust_remote_code=True)' for name in classes]
    return "\n".join(["```python", *lines, "```"]) + (
        "\n\nIt carries the one file of code for its norms. After `import normconvert` it loads "
        "without `trust_remote_code`."
    )


def _verification(report: dict[str, Any] | None) -> str:
    if report is None:
        return "This conversion was not verified."
    certificate = report.get("certificate")
    if certificate and not report["comparisons"]:
        return " ".join([_certified(certificate) + ".", *report["notes"]])
    lines = [
        "| | " + " | ".join(each["tokens"] for each in report["comparisons"]) + " |",
        "|---" * (1 + len(report["comparisons"])) + "|",
    ]
    for title, key, form in (
        ("largest difference of the logits", "max", "{:.2e}"),
        ("noise floor (rounding the weights)", "floor_max", "{:.2e}"),
        ("KL divergence", "kl", "{:.2e}"),
        ("same top token", "top1", "{:.2%}"),
    ):
        cells = [form.format(each[key]) for each in report["comparisons"]]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    verdict = "Equivalent" if report["equivalent"] else "Not equivalent"
    if certificate and certificate["problem_count"] == 0:
        verdict += f"; {_certified(certificate)}"
    return f"{verdict} (computed in {report['dtype']}).\n\n" + "\n".join(lines)


def _certified(certificate: dict[str, Any]) -> str:
    return (
        f"{certificate['rewritten']} rewritten tensors are the exact values rounded once, "
        f"{certificate['copied']} tensors are the original's"
    )


def _command(manifest: dict[str, Any]) -> str:
    """What makes this output again; several rewrites are the work of a recipe."""
    options, source = manifest["options"], manifest["source"]
    words = ["normconvert", options["rewrites"][-1], source["model"]]
    if source.get("commit"):
        words += ["--revision", source["commit"]]
    if options.get("target"):
        words += ["--target", options["target"]]
    elif options["rewrites"][-1] in ("flashnorm", "rmsnorm"):
        words += ["--format", options["format"]]
    for name in ("tied", "dtype"):
        if options[name] != "keep":
            words += [f"--{name}", options[name]]
    if options["rewrites"][-1] == "prmsnorm":
        words += ["--fraction", str(options["fraction"])]
    for name in options.get("returns", ()):
        words += ["--returns", name]
    return " ".join(words)


def _without_ours(text: str) -> str:
    return re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", "", text, flags=re.DOTALL)

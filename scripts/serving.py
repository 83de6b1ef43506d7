"""A checkpoint in an engine that serves it: from a folder to a function of token ids.

python scripts/serving.py ENGINE IDS.npy LOGITS.safetensors CHECKPOINT...

writes the logits of every checkpoint, in float32, under its path. Here is what people do who were
given a checkpoint: nothing knows normconvert.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Ids: TypeAlias = "npt.NDArray[np.int64]"  # [batch, length]
Logits: TypeAlias = "npt.NDArray[np.float32]"  # [batch, length, vocabulary]
Engine: TypeAlias = Callable[[Ids], Logits]

EXAMPLE = (2, 7)  # batch and length of the input with which a model is exported


def transformers(checkpoint: Path, work: Path, threads: int) -> Engine:
    """PyTorch, with the attention that transformers chooses."""
    import torch

    torch.set_num_threads(threads)
    model = _load(checkpoint)

    @torch.inference_mode()
    def run(ids: Ids) -> Logits:
        given = {name: torch.from_numpy(value) for name, value in _inputs(ids).items()}
        found: Logits = model(**given).logits.numpy()
        return found

    return run


def onnxruntime(checkpoint: Path, work: Path, threads: int) -> Engine:
    """ONNX Runtime, with the file that torch exports, left as model.onnx in `work`."""
    import onnxruntime as ort
    import torch

    given = _example()
    sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in given}
    with warnings.catch_warnings():
        # The exporter copies a deprecated class of torch's own.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        program: Any = torch.onnx.export(
            _load(checkpoint),
            kwargs=given,
            dynamic_shapes=sizes,
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    program.save(work / "model.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(work / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(["logits"], _inputs(ids))[0]


def openvino(checkpoint: Path, work: Path, threads: int) -> Engine:
    """OpenVINO, converted from the model in memory, left as model.xml in `work`."""
    import openvino as ov

    with warnings.catch_warnings():
        # OpenVINO traces with torch.jit, of which torch and transformers warn.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "Converting a tensor to a Python")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        program = ov.convert_model(_load(checkpoint), example_input=_example())
    ov.save_model(program, work / "model.xml", compress_to_fp16=False)
    # Where the processor has bfloat16, OpenVINO would compute in it.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = ov.compile_model(work / "model.xml", "CPU", exact)
    return lambda ids: compiled(_inputs(ids))["logits"]


def ctranslate2(checkpoint: Path, work: Path, threads: int) -> Engine:
    """CTranslate2, with the folder that its converter for transformers makes in `work`."""
    import ctranslate2 as ct2
    from ctranslate2.converters import TransformersConverter

    folder = TransformersConverter(str(checkpoint)).convert(str(work / "ctranslate2"))
    generator = ct2.Generator(folder, compute_type="float32", intra_threads=threads)

    def run(ids: Ids) -> Logits:
        return np.array(generator.forward_batch(ids.tolist(), return_log_probs=False))

    return run


# All with the same arguments: the checkpoint, an empty folder for what is made of it, threads.
ENGINES: Mapping[str, Callable[[Path, Path, int], Engine]] = {
    "transformers": transformers,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ctranslate2": ctranslate2,
}


def _load(checkpoint: Path) -> Any:
    """The model. A native checkpoint carries its norms' code; a stock one has none to trust."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="float32", trust_remote_code=True
    )
    model.config.use_cache = False
    # Nobody trains it: what is exported is what it computes without gradients.
    return model.requires_grad_(False)


def _inputs(ids: Ids) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _example() -> dict[str, Any]:
    import torch

    ids = np.arange(1, 1 + np.prod(EXAMPLE)).reshape(EXAMPLE)
    return {name: torch.from_numpy(value) for name, value in _inputs(ids).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("ids", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    ids = np.load(options.ids)
    found = {}
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as work:
            run = ENGINES[options.engine](checkpoint, Path(work), options.threads)
            found[str(checkpoint)] = run(ids)
    save_file(found, options.logits)


if __name__ == "__main__":
    main()

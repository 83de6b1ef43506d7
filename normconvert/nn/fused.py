"""The norms as one C++ kernel for the CPU: optional, compiled once by PyTorch's own tools."""

from __future__ import annotations

from pathlib import Path

import torch

from normconvert.errors import NormconvertError
from normconvert.nn.modeling_normconvert import FUSED

_SOURCE = Path(__file__).with_name("fused_norm.cpp")
# The machine's instructions, in the words of `torch.backends.cpu.get_cpu_capability()`.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
}


def load_fused_norms() -> None:
    """Let the norms of this process, those of loaded models too, use a fused kernel on the CPU.

    It takes float32, bfloat16 and float16 without gradients; all else is computed as before. The
    first call on a machine compiles it, which takes half a minute and needs a C++ compiler and
    ninja (``pip install normconvert[kernel]``); the result is kept where PyTorch keeps extensions
    (the environment variable TORCH_EXTENSIONS_DIR).

    Raises:
        NormconvertError: it cannot be compiled here.
    """
    from torch.utils import cpp_extension  # imports setuptools

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp", *_INSTRUCTIONS.get(capability, ())]
    if capability in _INSTRUCTIONS:
        flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    try:
        cpp_extension.load(FUSED, [str(_SOURCE)], extra_cflags=flags)
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NormconvertError(
            f"the fused norms cannot be compiled here: {reason}; they need a C++ compiler and "
            "ninja (pip install normconvert[kernel]), and everything works without them"
        ) from error

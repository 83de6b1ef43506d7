"""The norms, and the modeling file that native checkpoints carry.

Importing this registers the native format with transformers, as `import normconvert` does once
transformers is imported: then `from_pretrained` loads such a checkpoint without its carried code.
"""

from transformers import AutoConfig

from normconvert.nn.modeling_normconvert import (
    MODEL_TYPE,
    Compress,
    CRMSNorm,
    DeferredRMSNormLinear,
    NormconvertConfig,
    PartialRMSNorm,
    Recenter,
    RMSNorm,
    compress,
    expand,
    recenter,
)

__all__ = [
    "CRMSNorm",
    "Compress",
    "DeferredRMSNormLinear",
    "PartialRMSNorm",
    "RMSNorm",
    "Recenter",
    "compress",
    "expand",
    "recenter",
]

AutoConfig.register(MODEL_TYPE, NormconvertConfig, exist_ok=True)

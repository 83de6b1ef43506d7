"""Which class a checkpoint's config names, without running any code of the checkpoint."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from normconvert.errors import TraceError, first_line
from normconvert.source import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel


def resolve(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[type[PreTrainedModel], Any]:
    """The model class and the configuration object of `checkpoint`.

    Raises:
        TraceError: transformers does not know the type, or it needs the checkpoint's own code
            and `trust_remote_code` is not set.
    """
    import transformers
    from transformers import AutoConfig

    if checkpoint.model_class is not None:
        given = checkpoint.model_class
        return given, _config(checkpoint, given.config_class.from_pretrained)
    from normconvert.nn import modeling_normconvert as native  # and registers the format

    model_type = str(checkpoint.config.get("model_type"))
    custom = "auto_map" in checkpoint.config and model_type != native.MODEL_TYPE
    if custom and not trust_remote_code and model_type not in transformers.CONFIG_MAPPING:
        raise TraceError(
            f"{checkpoint.model} brings its own model code ({model_type!r}); read it, then run "
            "again with --trust-remote-code if you trust it."
        )
    if not custom and model_type not in transformers.CONFIG_MAPPING:
        raise TraceError(
            f"{checkpoint.folder / 'config.json'} has model_type {model_type!r}, which "
            f"transformers {transformers.__version__} does not know; install a newer transformers."
        )
    trusted = partial(AutoConfig.from_pretrained, trust_remote_code=custom and trust_remote_code)
    config = _config(checkpoint, trusted)
    if model_type == native.MODEL_TYPE:
        return native.model_class(config), config
    if custom and trust_remote_code:
        return _remote_class(checkpoint), config
    return _stock_class(checkpoint, config), config


def _config(checkpoint: Checkpoint, read: Callable[[Path], Any]) -> Any:
    try:
        return read(checkpoint.folder)
    except Exception as error:  # a config class may raise anything on wrong values
        raise TraceError(
            f"{checkpoint.folder / 'config.json'} is not a valid "
            f"{checkpoint.config.get('model_type')!r} configuration: {first_line(error)}."
        ) from error


def auto_classes(model_class: type[PreTrainedModel], config: Any) -> tuple[str, ...]:
    """The Auto classes of transformers that load `model_class` for `config`, by name."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            known = mapping[type(config)]
            if model_class in (known if isinstance(known, (tuple, list)) else (known,)):
                found.append(name)
    return tuple(name for name in found if name.startswith("AutoModel"))


def _stock_class(checkpoint: Checkpoint, config: Any) -> type[PreTrainedModel]:
    import transformers

    no_forward = getattr(transformers.PreTrainedModel, "forward", None)
    named = checkpoint.config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise TraceError(
            f"architectures in {checkpoint.folder / 'config.json'} is not a list of names; "
            "give the name of the model's class."
        )
    for name in named:
        found = getattr(transformers, name, None)
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and getattr(found, "forward", None) is not no_forward
        ):
            return found
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in mapping:
        found = mapping[type(config)]
        first: type[PreTrainedModel] = found[0] if isinstance(found, (tuple, list)) else found
        return first
    raise TraceError(
        f"{checkpoint.folder / 'config.json'} names no architecture that transformers "
        f'{transformers.__version__} has; set "architectures" to the model\'s class.'
    )


def _remote_class(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = checkpoint.config["auto_map"]
    for auto_class in ("AutoModelForCausalLM", "AutoModel"):
        if auto_class in auto_map:
            try:
                found: type[PreTrainedModel] = get_class_from_dynamic_module(
                    auto_map[auto_class], str(checkpoint.folder)
                )
            except Exception as error:  # the checkpoint's own code may raise anything
                raise TraceError(
                    f"The code that {checkpoint.folder} brings for {auto_class} "
                    f"({auto_map[auto_class]}) cannot be imported: {first_line(error)}."
                ) from error
            return found
    raise TraceError(
        f"auto_map in {checkpoint.folder / 'config.json'} names no AutoModelForCausalLM or "
        "AutoModel class."
    )

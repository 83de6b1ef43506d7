"""Importing normconvert changes no way of importing transformers, in whatever order."""

from __future__ import annotations

import subprocess
import sys

import pytest

LLAMA = "from transformers.models.llama.modeling_llama import LlamaForCausalLM"
KNOWS = (
    "from transformers import AutoConfig; "
    "assert type(AutoConfig.for_model('normconvert')).__name__ == 'NormconvertConfig'"
)
ORDERS = {
    "normconvert, a module of a model": f"import normconvert; {LLAMA}; {KNOWS}",
    "a module of a model, normconvert": f"{LLAMA}; import normconvert; {KNOWS}",
    "normconvert, transformers": f"import normconvert, transformers; {KNOWS}",
    "normconvert, a config": (
        "import normconvert; from transformers.models.gpt2.configuration_gpt2 import GPT2Config; "
        f"{KNOWS}"
    ),
    "normconvert, generation": (
        f"import normconvert; from transformers.generation import GenerationMixin; {KNOWS}"
    ),
    "normconvert, the Auto classes": (
        "import normconvert; from transformers.models.auto import modeling_auto; "
        f"{KNOWS}; import normconvert.models.openelm"
    ),
    "our runtime alone": f"import normconvert.nn; {KNOWS}",
    "in a thread": (
        "import normconvert, threading\n"
        f"def work():\n    {LLAMA}\n    {KNOWS}\n    done.append(1)\n"
        "done = []\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert len(done) == 2"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order(order: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ORDERS[order]], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_interface_stays_what_it_is_when_used() -> None:
    """A function with the name of a room would turn into the module once the room is imported."""
    code = """
import importlib, pkgutil, normconvert
for module in pkgutil.walk_packages(normconvert.__path__, "normconvert."):
    if module.name != "normconvert.__main__":
        importlib.import_module(module.name)
for name in normconvert.__all__:
    assert type(getattr(normconvert, name)).__name__ != "module", name
"""
    subprocess.run([sys.executable, "-c", code], check=True)

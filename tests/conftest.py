"""What every test process needs, set before anything imports torch or transformers."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # xdist's workers share the cores already
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

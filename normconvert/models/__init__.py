"""Models that transformers does not have, registered with its Auto classes on import.

Importing this package imports neither torch nor transformers; `normconvert.registration` loads
its modules when transformers needs them.
"""

OWN_TYPES = frozenset({"openelm"})
"""Their model_types: only a machine with normconvert knows them without the checkpoint's code."""

"""``python -m normconvert``."""

from normconvert.cli.main import main

main()

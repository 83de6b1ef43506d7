"""``python -m normconvert``."""

from normconvert.cli.app import main

main()

"""``python -m flashoptim_native`` is the command ``flashoptim-native``."""

from .cli import main

main()

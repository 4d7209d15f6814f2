"""`python -m sharedpool`: the same as the command `sharedpool`."""

from .cli import main

main()

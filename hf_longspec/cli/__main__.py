"""`python -m hf_longspec.cli` is the command `hf-longspec`."""

from . import main

main()

"""The command `hf-longspec`, run as `python -m hf_longspec.cli`."""

from . import main

main()

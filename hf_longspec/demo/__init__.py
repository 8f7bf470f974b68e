"""The demo: a real small model built from a package-index wheel, and a long prompt of real source code.

`prompt.txt` is `networkx/algorithms/planarity.py` of NetworkX 3.6.1 (3-clause BSD, see LICENSE.networkx) up to the
middle of a method, 4,383 tokens. NetworkX is held out from the training of the shipped draft.
"""

from pathlib import Path

NAME = "smollm2-135m-instruct"
PROMPT = Path(__file__).with_name("prompt.txt")
DRAFT = Path(__file__).parents[1] / "hub_configs" / NAME  # the shipped draft of the demo's model

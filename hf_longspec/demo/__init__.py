"""The demo: a real small model built from a package-index wheel, and a long prompt of real source code.

`prompt.txt` is `networkx/algorithms/planarity.py` of NetworkX 3.6.1 (3-clause BSD, see LICENSE.networkx) up to the
middle of a method, 4,383 tokens. NetworkX is held out from the training of the shipped draft.
"""

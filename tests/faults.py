"""What a seeded fault is; tests/mutants.py tries the faults of faults_core, faults_fast and faults_training."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one place in the code that some quick test has to notice.

    file: relative to the project. old: text that stands there exactly once. tests: relative to tests/, as pytest takes
    them.
    """

    name: str
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]

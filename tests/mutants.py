"""`python tests/mutants.py [NAME …]`: seed faults into a copy of the project, one at a time, and see who notices.

Each fault names the few quick tests that should notice it. First these tests must pass on the unchanged code; then
each fault is written into the copy and its own tests run there. Prints a table and one JSON line; the exit status is
1 if a fault survives, or is stale because its place in the code has changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from faults import Fault
from faults_core import CORE_FAULTS
from faults_fast import FAST_FAULTS
from faults_training import TRAINING_FAULTS

ROOT = Path(__file__).parent.parent
FAULTS = [*CORE_FAULTS, *FAST_FAULTS, *TRAINING_FAULTS]
SECONDS = 300  # that the tests of one fault may take
CAUGHT, HANGS = "caught", "hangs"
SURVIVED, STALE, UNFIT = "survived", "stale", "its tests fail without it"  # these three need a person


class Outcome(NamedTuple):
    name: str
    file: str
    verdict: str
    test: str  # the first that failed
    seconds: float


class Ran(NamedTuple):
    status: int | None  # of pytest; None: it did not end
    output: str

    @property
    def failed(self) -> list[str]:
        """The tests that failed, as pytest's short summary names them."""
        return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", self.output, re.MULTILINE)


class Copy:
    """A copy of the project's files in a folder of its own, as they lie in the working tree; links stay links."""

    def __init__(self, root: Path):
        self.root = root
        self.process: subprocess.Popen[str] | None = None
        listed = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
        )
        for name in filter(None, listed.split("\0")):
            source, target = ROOT / name, root / name
            if source.is_symlink() or source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        # no bytecode: a file that is written twice within a second would be taken for the same
        self.environment = os.environ | {
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, tests: Iterable[str], *options: str, seconds: float | None = None) -> Ran:
        """Run tests of the copy, and end them with all that they have started after so many seconds."""
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *options]
        self.process = subprocess.Popen(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            return Ran(None, self.process.communicate()[0])
        return Ran(self.process.returncode, output)

    def stop(self) -> None:
        """End the tests that run, with all that they have started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def try_fault(self, fault: Fault, seconds: float) -> Outcome:
        path = self.root / fault.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(fault.old) != 1:
            return Outcome(fault.name, fault.file, STALE, "", 0.0)
        changed = text.replace(fault.old, fault.new)
        compile(changed, fault.file, "exec")  # any test would notice a fault that is no Python
        began = time.monotonic()
        path.write_text(changed, encoding="utf-8")
        try:
            ran = self.run(fault.tests, "-x", seconds=seconds)
        finally:
            path.write_text(text, encoding="utf-8")
        verdict = {None: HANGS, 0: SURVIVED}.get(ran.status, CAUGHT)
        test = next(iter(ran.failed), "the tests cannot be collected" if verdict == CAUGHT else "")
        return Outcome(fault.name, fault.file, verdict, test.removeprefix("tests/"), time.monotonic() - began)


def tests_that_fail(copy: Copy, faults: list[Fault]) -> set[str]:
    """Run all named tests on the unchanged code; returns those of them that fail, whole files or tests as named."""
    named = sorted({test for fault in faults for test in fault.tests})
    ran = copy.run(named)
    if ran.status not in (0, 1):  # a name that is no test, or a file that cannot be read
        sys.exit(ran.output)
    failed = [name.removeprefix("tests/") for name in ran.failed]
    return {test for test in named if any(re.match(rf"{re.escape(test)}($|\[|::)", name) for name in failed)}


def try_faults(faults: list[Fault], workers: int, seconds: float) -> list[Outcome]:
    """Try faults in `workers` copies at once; prints each outcome as it comes, and returns them in the order given."""
    waiting: queue.SimpleQueue[Fault] = queue.SimpleQueue()
    outcomes: dict[str, Outcome] = {}

    def tell(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        print(row(outcome), flush=True)

    def work(copy: Copy) -> None:
        while True:
            try:
                fault = waiting.get_nowait()
            except queue.Empty:
                return
            tell(copy.try_fault(fault, seconds))

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(workers) as pool:
        copies = [Copy(Path(folder, str(number))) for number in range(workers)]
        try:
            unfit = tests_that_fail(copies[0], faults)
            for fault in faults:
                if failing := unfit & set(fault.tests):
                    tell(Outcome(fault.name, fault.file, UNFIT, ", ".join(sorted(failing)), 0.0))
                else:
                    waiting.put(fault)
            for done in [pool.submit(work, copy) for copy in copies]:
                done.result()
        except BaseException:  # also a person's Ctrl-C
            while not waiting.empty():
                waiting.get()
            for copy in copies:
                copy.stop()
            raise
    return [outcomes[fault.name] for fault in faults]


def row(outcome: Outcome) -> str:
    name, file, verdict, test, seconds = outcome
    where = file.removeprefix("hf_longspec/").removesuffix(".py").removesuffix("_longspec")
    return f"{name:32} {where:34} {verdict:8} {seconds:5.0f} s  {test}"


def main() -> int:
    parser = argparse.ArgumentParser(description="seed faults into the code and see which quick tests notice")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; all without any")
    parser.add_argument("--list", action="store_true", help="say what each fault is, and try none")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that the tests of one fault may take")
    given = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    assert len(known) == len(FAULTS), "two faults have one name"
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"no such faults: {', '.join(unknown)}")
    faults = [known[name] for name in given.names] or FAULTS
    if given.list:
        for fault in faults:
            print(f"{fault.name:32} {fault.file}: {fault.what}")
        return 0
    if importlib.util.find_spec("triton") is None:
        print("the package triton is missing: faults of its kernels cannot be noticed", file=sys.stderr)
    outcomes = try_faults(faults, given.workers, given.seconds)
    wrong = [outcome for outcome in outcomes if outcome.verdict not in (CAUGHT, HANGS)]
    print(f"\n{len(outcomes) - len(wrong)} of {len(outcomes)} faults are noticed")
    for outcome in wrong:
        print(row(outcome))
    print(json.dumps({"faults": len(outcomes), "wrong": len(wrong), "outcomes": [o._asdict() for o in outcomes]}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (the loader asks for it).
#
# A model repository's own code (`trust_remote_code=True`) is copied with the files that it imports. These are found by
# a search of the text, not of the syntax: a line of a docstring or of any string that reads like a relative import is
# taken for one, and the load fails for want of a file that nobody imports. The same file imports well as a package.
# Absolute imports are found by the syntax, and a string does no harm there; but one inside a function, for a case that may
# never come, is demanded at load time all the same unless it stands in a `try`.
# Who meets it: whoever shows usage in a docstring, or moves a helper and says so. Tests of the package do not see it.
#
# Seen on 2026-11-30:
#   no import                            loads
#   relative import, in a comment        loads
#   relative import, in a docstring      FileNotFoundError
#   absolute import, in a docstring      loads
#   absolute import, in a function       ImportError
#   absolute import, in a try            loads
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 transformers==5.24.0
cd "$room"
export HF_HOME=$room/cache
bin/python - << 'PYTHON' 2> /dev/null
import json
from pathlib import Path

from transformers import AutoConfig

CODE = "from transformers import PreTrainedConfig\nclass OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
TRIED = {
    "no import": ('"""Says nothing."""\n', None),
    "relative import, in a comment": ("# from .absent import widen\n", None),
    "relative import, in a docstring": ('"""Was once\n\n    from .absent import widen\n"""\n', FileNotFoundError),
    "absolute import, in a docstring": ('"""Was once\n\n    import absent_package\n"""\n', None),
    "absolute import, in a function": ("def seldom():\n    import absent_package\n", ImportError),
    "absolute import, in a try": ("try:\n    import absent_package\nexcept ImportError:\n    pass\n", None),
}
for number, (name, (lines, expected)) in enumerate(TRIED.items()):
    folder = Path(f"repository{number}")
    folder.mkdir()
    (folder / "own.py").write_text(lines + CODE)
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        raised = None
    except (FileNotFoundError, ImportError) as error:
        raised = type(error)
    print(f"{name:36}", "loads" if raised is None else raised.__name__)
    assert raised is expected, name
PYTHON

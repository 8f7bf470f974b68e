"""What keeps the code in few rooms: sizes, one seam between core and fast engine, private names in one file."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from structure import ROOT, Docstring, Source, Structure, structure

INTERFACE, DRAFT, FAST_ENGINE, FAST_COMPILED = (
    f"modeling/{name}_longspec.py" for name in ("interface", "modeling", "fast_engine", "fast_compiled")
)
OF_TRANSFORMERS = [
    "_assisted_decoding",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_has_unfinished_sequences",
    "_is_stateful",
    "_is_user_defined",
    "_optimize_model_for_decode",
    "_pad_token_tensor",
    "_prefill",
    "_update_model_kwargs_for_generation",
    "_validate_generation_mode",
    "past_key_values",
]


# Functions that make a tensor on the default device, and those that make it in the default format.
OF_WHOLE_NUMBERS = {"arange", "as_tensor", "tensor"}
OF_ANY_FORMAT = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}


@pytest.fixture(scope="module")
def found():
    return structure()


def test_the_core_is_small(found):
    size = found.size(found.core)
    assert size.files <= 22 and size.code <= 3260, size


def test_the_fast_engine_has_few_files(found):
    assert found.size(found.fast).files <= 14


def test_one_file_of_the_core_knows_the_fast_engine(found):
    """The draft, which chooses its engine by its config."""
    assert found.between(found.core, found.fast) == [(DRAFT, FAST_ENGINE)]


def test_the_package_knows_the_fast_engine_only_to_measure_it_and_to_compile_what_trains(found):
    others = found.part("hf_longspec/", without="hf_longspec/benchmark/")
    known = found.between(others, found.fast)
    assert all(user.startswith("hf_longspec/training/") and used == FAST_COMPILED for user, used in known)


def test_no_files_import_each_other(found):
    assert found.circles() == []


def test_every_tensor_names_its_device_and_format(found):
    """But for those of a module that is being made, which torch puts where its caller wants it."""
    loose = []
    for path in found.part("modeling/"):
        inits = [node for node in found.sources[path].nodes if getattr(node, "name", "") == "__init__"]
        own = {id(node) for init in inits if path == DRAFT for node in ast.walk(init)}
        for node in found.sources[path].nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.") and id(node) not in own:
                name, given = ast.unparse(node.func).removeprefix("torch."), {word.arg for word in node.keywords}
                needed = {"dtype"} if name in OF_ANY_FORMAT else set()
                needed |= {"device"} if name in OF_ANY_FORMAT | OF_WHOLE_NUMBERS else set()
                loose += [f"{path}:{node.lineno}: {name}"] * (not needed <= given)
    assert loose == []


def test_files_of_a_draft_say_what_they_do(found):
    silent = [path for path in found.part("modeling/") if ast.get_docstring(found.sources[path].tree) is None]
    assert silent == []


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_private_names_of_transformers_are_in_one_file(found, name):
    """A release of transformers that changes one of them is met in one place."""
    users = {path for path in found.part("modeling/") if name in found.sources[path].names}
    assert users <= {INTERFACE}


PLAIN = """
import sys
import torch
from helpers import tiny_draft, tiny_target

for backend in ("eager", "torch"):
    target = tiny_target("llama")
    draft = tiny_draft(target, attention_backend=backend, cuda_graphs=False, compile_target=False)
    prompt = torch.arange(1, 9)[None]
    options = dict(max_new_tokens=12, do_sample=False)
    text = target.generate(prompt, assistant_model=draft, **options)
    assert text.tolist() == target.generate(prompt, **options).tolist()
print(*(name for name in sys.modules if name.rpartition(".")[2].startswith("fast_") and "longspec" in name))
"""


def test_plain_engines_load_no_fast_file():
    """A whole `generate` in a process of its own, by each plain backend."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{PLAIN}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def small(**files):
    return Structure(Source(path.replace("__", "/") + ".py", text) for path, text in files.items())


def test_arrows_by_hand():
    found = small(
        modeling__a_longspec="from .b_longspec import x\n",
        modeling__b_longspec="def f():\n    from .fast_c_longspec import y\n",
        modeling__fast_c_longspec="import torch\n",
        hf_longspec__d="from hf_longspec.modeling.a_longspec import z\n",
        hf_longspec__cli__e="from .. import d\nif TYPE_CHECKING:\n    from . import g\n",
        hf_longspec__cli__g="import hf_longspec.cli.e\n",
    )
    files = {path.removesuffix(".py"): {name.removesuffix(".py") for name in to} for path, to in found.arrows.items()}
    assert files == {
        "modeling/a_longspec": {"modeling/b_longspec"},
        "modeling/b_longspec": {"modeling/fast_c_longspec"},
        "modeling/fast_c_longspec": set(),
        "hf_longspec/d": {"modeling/a_longspec"},
        "hf_longspec/cli/e": {"hf_longspec/d"},
        "hf_longspec/cli/g": {"hf_longspec/cli/e"},
    }
    assert found.size(found.part("")).floors == 6 and found.size(found.core).floors == 2
    assert found.between(found.core, found.fast) == [("modeling/b_longspec.py", "modeling/fast_c_longspec.py")]
    assert found.circles() == []


def test_circles_by_hand():
    found = small(
        modeling__a="from .b import x", modeling__b="from .c import x", modeling__c="from .a import x", modeling__d=""
    )
    assert found.circles() == [["modeling/a.py", "modeling/b.py", "modeling/c.py"]]


def test_lines_of_code_by_hand():
    text = '"""Two\nlines."""\n\n# why\nx = """\na text\n"""  # code\n\n\n'
    text += 'def f(\n    a,\n):\n    "Says."\n\n    return a\n'
    source = Source("modeling/a.py", text)
    assert source.docstrings == [Docstring(1, 2), Docstring(13, 13)]
    assert source.lines_of_code == 3 + 3 + 1
    assert source.function_lengths == [6]


def test_the_script_prints_a_table_and_a_record():
    result = subprocess.run([sys.executable, ROOT / "tests" / "structure.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["core"]["files"] + record["fast"]["files"] + 1 == record["modeling"]["files"]  # and `__init__.py`
    assert result.stdout.split()[:3] == ["files", "lines", "code"]

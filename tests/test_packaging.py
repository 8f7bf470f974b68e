"""The wheel, built and imported in an environment that has our dependencies and nothing of this folder."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because setuptools leaves build/ behind and would pick up there what has been deleted since.
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info", "models", "runs")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("hf_longspec-*.whl"))


def test_wheel_holds_every_module_once(wheel):
    names = Counter(zipfile.ZipFile(wheel).namelist())
    assert not [name for name, count in names.items() if count > 1]
    assert not [name for name in names if name.startswith(("modeling/", "hub_configs/", "tests/"))]
    # modeling/ through the link: Path.rglob does not follow it
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_longspec").rglob("*.py")]
    modules += [f"hf_longspec/modeling/{path.name}" for path in (ROOT / "modeling").glob("*.py")]
    assert sorted(modules) == sorted(name for name in names if name.endswith(".py"))
    assert {"hf_longspec/py.typed", "hf_longspec/demo/prompt.txt", "hf_longspec/demo/LICENSE.networkx"} <= set(names)
    assert "hf_longspec/hub/releases.json" in names
    drafts = [path.parent.name for path in (ROOT / "hub_configs").glob("*/config.json")]
    assert {f"hf_longspec/hub_configs/{draft}/config.json" for draft in drafts} <= set(names)


def test_wheel_works_where_only_dependencies_are(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    zipfile.ZipFile(wheel).extractall(site)  # what installing a pure wheel comes to
    # Appended to the path, so that the wheel is found before an editable install of this folder.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import hf_longspec.modeling.modeling_longspec as m, hf_longspec as p; print(m.__file__, p.LongSpecConfig())"
    )
    output = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path)
    assert output.startswith(site)
    command = [python, "-m", "hf_longspec.cli", "--help"]
    assert "generate" in subprocess.check_output(command, text=True, cwd=tmp_path)

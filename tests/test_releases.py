"""The hashes that ship with the package are those of its own files, and of a version that is out they stay."""

import json

import pytest

import hf_longspec
from hf_longspec.hub import releases


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table to write to: an older release that is out, and nothing of the present version."""
    path = tmp_path / "releases.json"
    monkeypatch.setattr(releases, "_TABLE", path)

    def holding(**entries):
        path.write_text(json.dumps(entries))
        return path

    holding(**{"0.0.1": {"released": "2026-01-01", "files": {"tree_longspec.py": "0" * 64}}})
    return holding


def test_the_present_version_is_known():
    """After any change of modeling/, run `python -m hf_longspec.hub.releases`, as `make style` does."""
    version = hf_longspec.__version__
    assert releases.known()[version].files == releases.present_files(), (
        f"modeling/ is not what releases.json has for {version}: run `python -m hf_longspec.hub.releases` and commit "
        "hf_longspec/hub/releases.json"
    )
    assert list(releases.known())[-1] == version
    assert all(release.released for version_, release in releases.known().items() if version_ != version)


def test_the_command_writes_the_present_files_once(table, capsys):
    releases.main()
    known = releases.known()
    assert list(known) == ["0.0.1", hf_longspec.__version__]
    assert known[hf_longspec.__version__] == (None, releases.present_files())
    assert known["0.0.1"].files == {"tree_longspec.py": "0" * 64}
    releases.main()
    first, second = capsys.readouterr().out.splitlines()
    assert f"{len(releases.present_files())} files are new, changed or gone" in first and "as it was" in second


def test_a_release_that_is_out_is_not_written_again(table, monkeypatch):
    entry = {"released": "2026-12-24", "files": releases.present_files()}
    path = table(**{hf_longspec.__version__: entry})
    assert releases.write() == []
    path = table(**{hf_longspec.__version__: entry | {"files": entry["files"] | {"tree_longspec.py": "0" * 64}}})
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match="was released on 2026-12-24, and tree_longspec.py differ.*raise `__version__`"
    ):
        releases.write()
    with pytest.raises(SystemExit, match="hf_longspec.hub.releases: .* was released on"):
        releases.main()
    assert path.read_bytes() == before
    monkeypatch.setattr(releases, "__version__", "99.0")
    assert "tree_longspec.py" in releases.write() and list(releases.known()) == [hf_longspec.__version__, "99.0"]

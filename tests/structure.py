"""The size of the code and its import arrows: `python tests/structure.py` prints a table and one JSON line.

Reads the files of modeling/ and hf_longspec/ without importing them. Imports inside functions count like imports at
the top of a file; imports for type checkers only do not count.
"""

from __future__ import annotations

import ast
import io
import json
import statistics
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FAST = "modeling/fast_"  # the fast engine; the other files of modeling/ are the core
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


class Docstring(NamedTuple):
    first: int  # the docstring's first line in the file, from 1
    last: int


class Size(NamedTuple):
    files: int
    lines: int
    code: int  # lines without blanks, comments and docstrings
    arrows: int  # imports between two files of this part
    floors: int  # files on the longest chain of imports below a file, itself included
    classes: int
    functions: int
    median: float  # lines of a function, from `def` to its end
    longest: int


class Source:
    """One file; `path` is relative to the project, as in `modeling/tree_longspec.py`."""

    def __init__(self, path: str, text: str):
        self.path, self.text, self.tree = path, text, ast.parse(text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def docstrings(self) -> list[Docstring]:
        scopes = [node for node in self.nodes if isinstance(node, (ast.Module, *SCOPES))]
        first = [scope.body[0] for scope in scopes if ast.get_docstring(scope, clean=False) is not None]
        return [Docstring(node.lineno, node.end_lineno or node.lineno) for node in first]

    @cached_property
    def lines_of_code(self) -> int:
        """Count the lines that hold code; a line within a string is code unless the string is a docstring."""
        code: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in NO_CODE:
                code |= set(range(token.start[0], token.end[0] + 1))
        return len(code.difference(*(range(first, last + 1) for first, last in self.docstrings)))

    @cached_property
    def function_lengths(self) -> list[int]:
        functions = (node for node in self.nodes if isinstance(node, SCOPES[:2]))
        return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]

    @cached_property
    def names(self) -> set[str]:
        """Collect every name that the code uses: of variables, attributes, keywords, and strings that are one word."""
        found: set[str | None] = set()
        for node in self.nodes:
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=name) | ast.arg(arg=name):
                    found.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                    found.add(name)
                case ast.Constant(value=str(name)):
                    found.add(name)
        return found - {None}

    def imports(self) -> Iterator[str]:
        """Yield the dotted names that are imported, relative ones made absolute, `from a import b` as `a.b`."""
        typing_only = {
            id(node)
            for test in self.nodes
            if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
            for statement in test.body
            for node in ast.walk(statement)
        }
        here = self.path.removesuffix(".py").split("/")
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
                above = here[: len(here) - node.level] if node.level else []
                base = [*above, *([node.module] if node.module else [])]
                yield from (".".join([*base, alias.name]) for alias in node.names)


class Structure:
    """Files and their arrows: `arrows[path]` are the paths of the files that the file at `path` imports."""

    def __init__(self, sources: Iterable[Source]):
        self.sources = {source.path: source for source in sources}
        self.arrows = {
            path: {found for name in source.imports() if (found := self._file_of(name)) and found != path}
            for path, source in self.sources.items()
        }

    def _file_of(self, dotted: str) -> str | None:
        """Find the file that an imported name is, or lies in."""
        parts = dotted.split(".")
        if parts[:2] == ["hf_longspec", "modeling"]:
            parts = parts[1:]
        for names in (parts, parts[:-1]):
            for path in ("/".join(names) + ".py", "/".join([*names, "__init__.py"])):
                if path in self.sources:
                    return path
        return None

    def part(self, *starts: str, without: str | None = None) -> list[str]:
        """List the paths that begin with one of `starts`, but not with `without`."""
        return [
            path for path in self.sources if path.startswith(starts) and not (without and path.startswith(without))
        ]

    @property
    def core(self) -> list[str]:
        """List the files of a draft but the fast engine's; `__init__.py` is a docstring, and no draft carries it."""
        return [path for path in self.part("modeling/", without=FAST) if not path.endswith("/__init__.py")]

    @property
    def fast(self) -> list[str]:
        return self.part(FAST)

    def size(self, paths: Iterable[str]) -> Size:
        paths = sorted(paths)
        inside = {path: self.arrows[path].intersection(paths) for path in paths}
        sources = [self.sources[path] for path in paths]
        lengths = [length for source in sources for length in source.function_lengths]
        return Size(
            files=len(sources),
            lines=sum(source.text.count("\n") for source in sources),
            code=sum(source.lines_of_code for source in sources),
            arrows=sum(map(len, inside.values())),
            floors=max(floors(inside).values(), default=0),
            classes=sum(isinstance(node, ast.ClassDef) for source in sources for node in source.nodes),
            functions=len(lengths),
            median=statistics.median(lengths) if lengths else 0,
            longest=max(lengths, default=0),
        )

    def circles(self) -> list[list[str]]:
        """List the groups of files that import each other, directly or through others."""
        below = {path: reached(self.arrows, path) for path in self.arrows}
        groups = {frozenset({other for other in below[path] if path in below[other]}) for path in below}
        return sorted(sorted(group) for group in groups if group)

    def between(self, importers: Iterable[str], imported: Iterable[str]) -> list[tuple[str, str]]:
        """List the arrows from the first files to the second."""
        imported = set(imported)
        return [(path, other) for path in importers for other in sorted(self.arrows[path] & imported)]


def reached(arrows: Mapping[str, set[str]], start: str) -> set[str]:
    """Collect the files below `start`; it is one of them only if a circle leads back to it."""
    found: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += arrows[path]
    return found


def floors(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Count the files on the longest chain of imports that begins at each file; a circle is walked once."""
    height: dict[str, int] = {}

    def of(path: str, above: frozenset[str]) -> int:
        if path not in height:
            below = arrows[path] - above - {path}
            height[path] = 1 + max((of(other, above | {path}) for other in below), default=0)
        return height[path]

    return {path: of(path, frozenset()) for path in arrows}


def structure(root: Path = ROOT) -> Structure:
    """Read the files of modeling/ and hf_longspec/, files behind links left out."""
    paths = [*(root / "modeling").glob("*.py"), *(root / "hf_longspec").rglob("*.py")]
    links = [path for path in (root / "hf_longspec").iterdir() if path.is_symlink()]
    own = sorted(path for path in paths if not any(link in path.parents for link in links))
    return Structure(Source(path.relative_to(root).as_posix(), path.read_text()) for path in own)


def main() -> None:
    found = structure()
    parts = {
        "core": found.core,
        "fast": found.fast,
        "modeling": found.part("modeling/"),
        "hf_longspec": found.part("hf_longspec/"),
        "all": found.part(""),
    }
    sizes = {name: found.size(paths) for name, paths in parts.items()}
    print(" " * 12, *(f"{field:>9}" for field in Size._fields))
    for name, size in sizes.items():
        print(f"{name:12}", *(f"{value:>9g}" for value in size))
    to_fast = {name: found.between(parts[name], found.fast) for name in ("core", "hf_longspec")}
    for name, arrows in to_fast.items():
        for importer, imported in arrows:
            print(f"from {name} to fast: {importer} imports {imported}")
    circles = found.circles()
    for circle in circles:
        print("circle:", ", ".join(circle))
    record = {name: size._asdict() for name, size in sizes.items()}
    print(json.dumps(record | {"circles": circles} | {f"{name}_to_fast": arrows for name, arrows in to_fast.items()}))


if __name__ == "__main__":
    main()

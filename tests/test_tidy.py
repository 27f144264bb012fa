"""The hard limits of STYLE.md on size and form, checked on every source file that git knows.

Style that ruff, mypy or import-linter can see is theirs; here is only what none of them checks.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("ctxstore", "daemon", "client", "tests", "bench")

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
POSITIONAL_MAX = 5

# Put together from halves, so that this file does not break its own rules.
_LEFTOVERS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
_PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
_MACHINE_PATH = re.compile(
    r"(?<![\w.$}~-])/(" + "|".join(("wor" + "k", "roo" + "t", "hom" + "e", "User" + "s")) + r")/\w"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[str, ast.Module], Iterator[str]]


def _functions(tree: ast.Module) -> Iterator[Function]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def file_size(text: str, tree: ast.Module) -> Iterator[str]:
    lines = text.count("\n")
    if lines > FILE_LINES_MAX:
        yield f"1: {lines} lines, at most {FILE_LINES_MAX}"


def function_size(text: str, tree: ast.Module) -> Iterator[str]:
    for node in _functions(tree):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES_MAX:
            yield f"{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}"


def positional_parameters(text: str, tree: ast.Module) -> Iterator[str]:
    for node in _functions(tree):
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        if names[:1] in (["self"], ["cls"]):
            del names[0]
        # pytest passes fixtures by name, so a test or a fixture has no positional callers.
        by_name = node.name.startswith("test_") or any(
            "fixture" in ast.dump(decorator) for decorator in node.decorator_list
        )
        if len(names) > POSITIONAL_MAX and not by_name:
            yield (
                f"{node.lineno}: {node.name} takes {len(names)} positional parameters, "
                f"at most {POSITIONAL_MAX}; make the rest keyword-only"
            )


def module_docstring(text: str, tree: ast.Module) -> Iterator[str]:
    if tree.body and not ast.get_docstring(tree):
        yield "1: no module docstring (what it owns, what it must not do)"


def no_print(text: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id == "print":
            yield f"{called.lineno}: print"


def no_leftovers(text: str, tree: ast.Module) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _LEFTOVERS.search(line):
            yield f"{number}: {found.group()}"


def no_pickle(text: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            names = [] if refused else ["pickle"]
        for name in names:
            if name.split(".")[0] in _PICKLES:
                yield f"{getattr(node, 'lineno', 1)}: import of {name}"


def no_machine_paths(text: str, tree: ast.Module) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _MACHINE_PATH.search(line):
            yield f"{number}: a path of one machine: {found.group()}..."


RULES: tuple[Rule, ...] = (
    file_size,
    function_size,
    positional_parameters,
    module_docstring,
    no_print,
    no_leftovers,
    no_pickle,
    no_machine_paths,
)


def _known_files(*patterns: str) -> list[Path]:
    """Files that git tracks, and new ones that it does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = (ROOT / name for name in sorted(set(listing.split("\0"))) if name)
    return [path for path in paths if path.is_file()]


def _violations(rule: Rule, paths: list[Path]) -> list[str]:
    found: list[str] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        found += (f"{path.relative_to(ROOT)}:{line}" for line in rule(text, tree))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule: Rule) -> None:
    paths = [p for p in _known_files(*SOURCE_ROOTS) if p.suffix in {".py", ".pyi"}]
    assert paths, "no source files found: is this a git checkout?"
    violations = _violations(rule, paths)
    assert not violations, "\n" + "\n".join(violations)


def test_no_other_file_names_a_machine_path() -> None:
    texts = [p for p in _known_files() if p.suffix in {".md", ".toml", ".yaml", ".yml", ".txt"}]
    violations = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (*texts, ROOT / "Makefile", ROOT / ".ci" / "run")
        for line in no_machine_paths(path.read_text(encoding="utf-8"), ast.Module([], []))
    ]
    assert not violations, "\n" + "\n".join(violations)


def test_source_roots_are_no_packages() -> None:
    for name in ("daemon", "client"):
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/ is a source root"


BROKEN: tuple[tuple[Rule, str], ...] = (
    (file_size, '"""Doc."""\n' + "\n" * FILE_LINES_MAX),
    (function_size, "def f():\n" + "    pass\n" * FUNCTION_LINES_MAX),
    (function_size, "class A:\n  async def f(self):\n" + "    pass\n" * FUNCTION_LINES_MAX),
    (positional_parameters, "def f(a, b, c, d, e, g): ..."),
    (positional_parameters, "class A:\n  def f(self, a, b, /, c, d, e, g): ..."),
    (module_docstring, "import os"),
    (no_print, "def f():\n    print(1)"),
    (no_leftovers, "x = 1  # TO" + "DO later"),
    (no_pickle, "from pickle import loads"),
    (no_pickle, "def f():\n    import cloudpickle.x"),
    (no_pickle, "np.load(p, allow_pickle=True)"),
    (no_machine_paths, 'p = "/wor' + 'k/data"'),
)


@pytest.mark.parametrize(("rule", "source"), BROKEN)
def test_each_rule_finds_its_breach(rule: Rule, source: str) -> None:
    assert list(rule(source, ast.parse(source)))


KEPT: tuple[tuple[Rule, str], ...] = (
    (file_size, '"""Doc."""\n' + "\n" * (FILE_LINES_MAX - 1)),
    (function_size, "def f():\n" + "    pass\n" * (FUNCTION_LINES_MAX - 1)),
    (positional_parameters, "class A:\n  def f(self, a, b, c, d, e, *, g, h): ..."),
    (positional_parameters, "def test_f(a, b, c, d, e, g): ..."),
    (positional_parameters, "@pytest.fixture\ndef f(a, b, c, d, e, g): ..."),
    (module_docstring, ""),
    (no_print, "reprint(1); out.print(2)"),
    (no_pickle, "np.load(p, allow_pickle=False)"),
    (no_machine_paths, 'p = "/proc/self/fd"; q = base / "net" + "wor' + 'k/x"'),
)


@pytest.mark.parametrize(("rule", "source"), KEPT)
def test_no_rule_cries_wolf(rule: Rule, source: str) -> None:
    assert not list(rule(source, ast.parse(source)))

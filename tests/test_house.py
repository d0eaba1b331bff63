"""The house: which package may import which, and that importing is cheap."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {
    "spaces": {"spaces"},
    "estimators": {"spaces", "estimators"},
    "compressors": {"spaces", "compressors"},
    "search": {"spaces", "estimators", "compressors", "search"},
}
FILES = [file for package in BELOW for file in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, relative ones with their dots, and how relative they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module or ''}.{alias.name}", node.level) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__"):
            yield from ((a.value, 0) for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down_and_are_absolute(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    for name, level in imports(ast.parse(file.read_text(encoding="utf-8"))):
        assert level == 0, f"relative import of {name}"
        parts = name.split(".")
        assert parts[0] not in BELOW, f"import tightrope.{parts[0]}: `import {parts[0]}` would load a second copy"
        assert parts[0] not in ("tests", "benchmarks", "examples")
        if parts[0] == "tightrope" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in BELOW[package], f"{package} must not import {name}"


def test_the_rule_sees_every_way_to_import() -> None:
    text = """
import tightrope.search.study
from tightrope import search
from tightrope.search import agent
from . import x
def late():
    import importlib
    importlib.import_module("tightrope.estimators.device")
"""
    found = list(imports(ast.parse(text)))
    assert found == [
        ("tightrope.search.study", 0), ("tightrope.search", 0), ("tightrope.search.agent", 0), (".x", 1), ("importlib", 0),
        ("tightrope.estimators.device", 0),
    ]  # fmt: skip


def test_spaces_need_numpy_and_the_standard_library_alone() -> None:
    allowed = {"numpy", "tightrope", *sys.stdlib_module_names}
    for file in (ROOT / "spaces").glob("*.py"):
        assert {name.split(".")[0] for name, _ in imports(ast.parse(file.read_text(encoding="utf-8")))} <= allowed


@pytest.mark.parametrize(
    "module", ["tightrope", "tightrope.spaces", "tightrope.search", "tightrope.estimators", "tightrope.compressors"]
)
def test_importing_is_light(module: str) -> None:
    heavy = ["torch", "ray", "optuna", "tensorboard", "onnxruntime", "pandas", "transformers"]
    code = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


PACKAGES = ["tightrope", *sorted(
    "tightrope." + ".".join(file.parent.relative_to(ROOT).parts)
    for package in BELOW for file in (ROOT / package).rglob("__init__.py") if "__all__" in file.read_text(encoding="utf-8")
)]  # fmt: skip


@pytest.mark.parametrize("module", PACKAGES)
def test_all_lists_what_there_is_sorted(module: str) -> None:
    loaded = importlib.import_module(module)
    names = loaded.__all__
    assert len(set(names)) == len(names)
    assert list(names) == sorted(names)
    for name in names:
        assert getattr(loaded, name) is not None
        assert not name.startswith("_")


@pytest.mark.parametrize("module", ["tightrope", "tightrope.spaces"])
def test_what_a_package_imports_for_its_users_is_in_all(module: str) -> None:
    path = ROOT / module.replace("tightrope.", "") if module != "tightrope" else ROOT / "tightrope"
    tree = ast.parse((path / "__init__.py").read_text(encoding="utf-8"))
    given = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tightrope")
        for alias in node.names
    }
    assert given == set(importlib.import_module(module).__all__)


def test_paths_and_import_names_agree() -> None:
    for package in BELOW:
        link = ROOT / "tightrope" / package
        assert link.is_symlink() and link.resolve() == ROOT / package
    assert (ROOT / "tightrope" / "py.typed").exists()

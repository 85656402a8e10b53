"""Imports go one way (recipes -> models -> ops -> _C), and importing the package brings in nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lt2_ext

PACKAGE = Path(lt2_ext.__file__).parent

# What a part may import of the package, and of other people.
PARTS = {
    "reference": ({"reference"}, {"torch"}),
    "testing": ({"testing", "reference"}, {"torch"}),
    "ops": ({"ops", "_C"}, {"torch"}),
    "integrations": ({"ops", "build_info"}, {"torch"}),
    "models": ({"models", "ops"}, {"torch", "numpy", "safetensors"}),
}
EXTRA = {"models/hf.py": {"transformers"}}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if part_of(p) in PARTS)


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """Absolute names of all that a file imports, wherever in the file."""
    package = ["lt2_ext", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check():
    assert {"ops", "reference", "testing"} <= {part_of(p) for p in modules()}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own, foreign = PARTS[part_of(path)]
    foreign = foreign | EXTRA.get(str(path.relative_to(PACKAGE)), set()) | sys.stdlib_module_names
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "lt2_ext":
            assert rest.split(".")[0] in own, f"{path} imports {name}"
        else:
            assert top in foreign, f"{path} imports {name}"


def test_importing_brings_in_nothing_heavy():
    """Beyond what torch itself imports."""
    parts = ["lt2_ext.ops", "lt2_ext.models", "lt2_ext.testing", "lt2_ext.cli"]
    there = [p for p in parts if any((PACKAGE / p[8:]).with_suffix(s).exists() for s in ("", ".py"))]
    code = f"""
import sys, torch
before = set(sys.modules)
import {", ".join(there)}
print(*{{"transformers", "matplotlib", "tqdm", "yaml", "tokenizers", "triton", "pytest"}} & (set(sys.modules) - before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.split()


def lines_of_code(path):
    """Those that are not blank, and not of a comment or a docstring alone."""
    text = path.read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in prose for n, line in lines)


def test_the_python_layer_stays_small():
    layer = [path for path in PACKAGE.rglob("*.py") if part_of(path) != "recipes"]
    assert 1000 < sum(map(lines_of_code, layer)) < 4000
    assert len((PACKAGE / "models/lt2.py").read_text().splitlines()) <= 400

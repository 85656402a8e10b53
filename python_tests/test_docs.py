"""What the pages in docs/ say is so."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from lt2_ext import ops
from lt2_ext.models import mixers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def sources() -> str:
    """Of everything that speaks to users, with strings that go over a line end joined."""
    files = [*ROOT.glob("lt2_ext/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"]
    return re.sub(r'"\s*\n\s*"', "", "\n".join(f.read_text() for f in files))


def messages() -> list[str]:
    table, _, _ = page("troubleshooting").partition("From elsewhere")
    return re.findall(r"^\| `([^`]+)` \|", table, re.M)


def test_troubleshooting_has_messages():
    assert len(messages()) > 20


@pytest.mark.parametrize("message", messages())
def test_messages_exist(message):
    text = message.removeprefix("q ").removeprefix("must ").removeprefix("cu_seqlens ")
    assert text in sources() or message in sources()


def test_every_operator_is_in_layout_and_support():
    for name in ops.__all__:
        assert f"`{name}`" in page("support"), name
        assert name in page("layout"), name


def test_the_mixer_of_adding_a_mixer():
    """Its code is short and does what the page says."""
    before, scope = dict(mixers.MIXERS), {}
    definition, use = re.findall(r"```python\n(.*?)```", page("adding_a_mixer"), re.S)
    assert len(definition.splitlines()) < 100
    try:
        exec(definition + use, scope)
    finally:
        mixers.MIXERS.clear()
        mixers.MIXERS.update(before)
    assert all(p.grad is not None for p in scope["model"].parameters())


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def load_numerics():
    spec = importlib.util.spec_from_file_location("numerics", ROOT / "bench" / "numerics.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["numerics"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


numerics = load_numerics()


@pytest.mark.parametrize("case", numerics.cases(), ids=lambda c: f"{c.op}-{c.regime}-{numerics.NAMES[c.dtype]}")
def test_errors_are_those_of_the_page(case):
    """Not above twice what it says (another processor rounds differently), and within the tolerance."""
    rows = [line.split(" | ") for line in page("numerics").splitlines() if line.startswith(f"| `{case.op}`")]
    (row,) = [r for r in rows if r[1:3] == [case.regime, numerics.NAMES[case.dtype]]]
    cells = [c for c in (cell.strip(" |") for cell in row[3:]) if c]
    errors = numerics.measure(case)
    assert len(cells) == len(errors)
    for cell, error in zip(cells, errors, strict=True):
        assert error.ours <= 2 * float(cell.split()[0])
        assert error.ours <= error.tolerance

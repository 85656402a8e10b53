"""What the pages in docs/ say is so."""

import fnmatch
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from test_build import load_script

from lt2_ext import ops
from lt2_ext.cli import COMMANDS
from lt2_ext.models import LT2, LT2Config, mixers
from lt2_ext.models.presets import PRESETS

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


def test_every_operator_is_in_the_readme_layout_and_support():
    readme = (ROOT / "README.md").read_text()
    for name in ops.__all__:
        assert f"`{name}`" in readme, name
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


PAGES = sorted(ROOT.glob("*.md")) + sorted(DOCS.rglob("*.md"))
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)


def links(path: Path) -> list[Path]:
    """Files that a page links to."""
    targets = re.findall(r"\]\(([^)#]+)", path.read_text())
    return [(path.parent / target).resolve() for target in targets if "://" not in target]


@every_page
def test_links_lead_somewhere(path):
    for target in links(path):
        assert target.exists(), target


def test_every_page_is_linked_from_the_readme_or_a_page_that_is():
    found, new = set(), {ROOT / "README.md"}
    while new:
        found |= new
        new = {target for page in new for target in links(page) if target.suffix == ".md"} - found
    assert found >= set(PAGES)


def sources_of_the_tree() -> list[str]:
    folders = ("csrc", "lt2_ext", "python_tests", "bench", "docs", ".ci")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    return [f"/{f.relative_to(ROOT)}" for f in files]


@every_page
def test_files_of_the_tree_that_a_page_names_exist(path):
    """`csrc/..`, `lt2_ext/..` and names with the suffix of a source; those may leave out the folder."""
    tree = sources_of_the_tree()
    in_full, suffixed = r"(?:csrc|lt2_ext|python_tests|docs|\.ci)/[\w./*]+", r"[\w./*]+\.(?:cuh|cu|h|cpp|py|md)"
    for name in re.findall(f"`({in_full}|{suffixed})`", path.read_text()):
        assert fnmatch.filter(tree, f"*/{name.rstrip('/')}"), name


def commands(path: Path) -> list[str]:
    """What a page says in `..` or on a line of a block that is no Python."""
    blocks = re.findall(r"```\n(.*?)```", text := path.read_text(), re.S)
    return re.findall(r"`([^`\n]+)`", text) + [line for block in blocks for line in block.splitlines()]


@every_page
def test_commands_that_a_page_names_exist(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(path):
        for word in re.findall(r"^make ([a-z-]+(?: [a-z-]+)*)", command):
            assert set(word.split()) <= set(targets), command
        for word in re.findall(r"^lt2 ([a-z]+)", command):
            assert word in COMMANDS, command
        for module in re.findall(r"python -m (lt2_ext[\w.]+)", command):
            assert importlib.util.find_spec(module), command
        for script in re.findall(r"python (\w+/\w+\.py)", command):
            assert (ROOT / script).exists(), command


@every_page
def test_presets_that_a_page_names_exist(path):
    for name in re.findall(r"\blt2-[\d.]+b-[a-z-]*[a-z]", path.read_text()):
        assert name in PRESETS, name


def test_examples_of_the_readme_run(capsys):
    examples = re.findall(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(examples) == 2
    for example in examples:
        exec(example, {})
    assert "tensor" in capsys.readouterr().out


numerics = load_script(ROOT / "bench" / "numerics.py")


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


def test_the_engine_of_loop_state():
    """Its code, with two prompts of a small model."""
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    scope = {
        "model": LT2(LT2Config(**shape, layer_pattern="gdn,full")),
        "prompt": torch.arange(9),
        "other": torch.arange(3),
    }
    (use,) = re.findall(r"```python\n(.*?)```", page("loop_state"), re.S)
    exec(use, scope)
    assert not scope["engine"].running

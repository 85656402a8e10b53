"""What was built: the facts, every instruction set, and that their objects do not leak into each other."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lt2_ext
from lt2_ext import _C

ROOT = Path(__file__).parents[1]
ISAS = lt2_ext.build_info()["cpu_isas"].split(";")
CORE = "test_gates or test_equal_keys or test_exactly_representable or test_tokens or test_the_instruction_set"


def usable(isa):
    """Built, and not above what this process runs with."""
    return isa in ISAS and ISAS.index(isa) <= ISAS.index(lt2_ext.build_info()["cpu_isa"])


def test_build_info():
    info = lt2_ext.build_info()
    assert set(info) == {"torch", "cpu_isa", "cpu_isas", "cuda_archs"}
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in ISAS


def test_the_instruction_set_is_the_one_asked_for():
    asked = os.environ.get("LT2_CPU_ISA")
    if asked is None:
        pytest.skip("LT2_CPU_ISA is not set")
    assert lt2_ext.build_info()["cpu_isa"] == asked


def run_tests(isa, *arguments):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments],
        env=os.environ | {"LT2_CPU_ISA": isa, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert re.search(r"\d+ passed", run.stdout)


def test_the_lowest_instruction_set():
    if not usable("scalar"):
        pytest.skip("no scalar kernels in this build")
    tests = ["python_tests/test_gdn.py", "python_tests/test_gdn_step.py", "python_tests/test_build.py"]
    run_tests("scalar", "-k", CORE, *tests)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if not usable(isa):
        pytest.skip(f"this machine or process is below {isa}")
    families = ["gdn", "gdn_step", "causal_conv1d", "dsa_indexer", "dsa_attention", "loop_state", "block_ops"]
    tests = [ROOT / "python_tests" / f"test_{family}.py" for family in families]
    run_tests(isa, *(str(t) for t in tests if t.exists()))
    run_tests(isa, "-k", "test_the_instruction_set", "python_tests/test_build.py")


def kernel_objects():
    return sorted((ROOT / "build").glob("cmake-*/CMakeFiles/lt2_cpu.dir/csrc/*/cpu/*.o"))


@pytest.mark.skipif(not kernel_objects(), reason="no build directory")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("isa", ISAS)
def test_objects_of_an_instruction_set_export_only_their_own(isa):
    """A weak function (an inline one of a shared header) compiled for AVX-512 could be the copy that the linker keeps
    for every machine."""
    objects = [o for o in kernel_objects() if o.name == f"{o.parts[-3]}_{isa}.cpp.o"]
    assert objects
    for path in objects:
        listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
        exported = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
        exported = [(kind, symbol) for kind, symbol in exported if kind.isupper() or kind in "uvw"]
        assert exported, path
        for kind, symbol in exported:
            assert kind not in "WVuvw", f"{path}: weak symbol {symbol}"
            assert f"::{isa}::" in symbol, f"{path}: {symbol} is outside of {isa}"


def load_script(path):
    """The module that a script outside of the package is."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("readelf"), reason="no binutils")
def test_the_module_brings_no_cpp_runtime_of_its_own():
    """With a second one, as of a compiler that finds only the archive, errors of operators end the process."""

    def lines(*command):
        return subprocess.run([*command, _C.__file__], capture_output=True, text=True, check=True).stdout.splitlines()

    assert any("(NEEDED)" in line and "[libstdc++.so.6]" in line for line in lines("readelf", "-d"))
    assert not [line for line in lines("nm", "-D", "--defined-only") if "__cxa_throw" in line]


def test_every_mutant_has_its_place():
    """In the sources as they are; ``make mutants`` takes minutes."""
    for mutant in load_script(ROOT / ".ci" / "mutants.py").MUTANTS:
        assert (ROOT / mutant.path).read_text().count(mutant.old) == 1, mutant.name
        assert all((ROOT / "python_tests" / test).exists() for test in mutant.tests.split()), mutant.name

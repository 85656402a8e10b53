"""The ``lt2`` command and the helpers of make."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt2_ext import cli, ops
from lt2_ext.recipes import doctor

ROOT = Path(__file__).resolve().parents[1]


def test_doctor_passes_here_and_names_every_operator(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "OK"
    for name in ops.__all__:
        assert any(line.startswith(f"{name} on cpu ") and " ok, error " in line for line in lines), name


def test_every_operator_has_a_self_test():
    assert set(doctor.SELF_TESTS) == set(ops.__all__)


@pytest.mark.parametrize("name", ops.__all__)
def test_a_wrong_result_is_a_problem(name, monkeypatch):
    def wrong(device):
        (out, ref), *rest = doctor_test(device)
        return [(out.double() * 1.001, ref), *rest]  # 16 bits would round it away

    doctor_test = doctor.SELF_TESTS[name]
    monkeypatch.setitem(doctor.SELF_TESTS, name, wrong)
    problems: list[str] = []
    doctor.test_operator(name, "cpu", problems)
    assert len(problems) == 1
    assert name in problems[0]
    assert ". Fix: " in problems[0]


def test_doctor_counts_problems(monkeypatch, capsys):
    def crash(device):
        raise RuntimeError("it broke")

    monkeypatch.setattr(ops, "__all__", ["chunk_gated_delta_rule"])
    monkeypatch.setitem(doctor.SELF_TESTS, "chunk_gated_delta_rule", crash)
    assert cli.main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    devices = 1 + torch.cuda.is_available()
    if devices == 1:
        assert last.startswith("1 problem: chunk_gated_delta_rule on cpu: RuntimeError: it broke. Fix: ")


def test_optional_package_that_is_absent(monkeypatch, capsys):
    monkeypatch.setattr(ops, "__all__", [])
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": ("nothing", "no-such-package>=1")})
    assert cli.main(["doctor"]) == 0
    assert "not installed (nothing): pip install 'no-such-package>=1'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("archs", "words"), [("90a-real;80-virtual", "sm_90a, compute_80"), ("90a", "sm_90a"), ("80-real", "sm_80")]
)
def test_architectures_in_words(archs, words):
    assert doctor.describe_archs(archs) == words


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_shows_an_example(argv, capsys):
    if argv[0] in ("demo", "train"):
        pytest.importorskip("tqdm")
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 0
    example = capsys.readouterr().out.split("example: ")[1]
    assert " ".join(["lt2", *argv[:-1]]) in example


def test_five_verbs():
    assert list(cli.COMMANDS) == ["doctor", "demo", "plan", "train", "generate"]


def test_arguments_reach_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "main", lambda argv: seen.append(argv))
    assert cli.main(["doctor", "a", "--help"]) == 0
    assert seen == [["a", "--help"]]


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    assert "usage: lt2" in capsys.readouterr().err


class TestVerdict:
    @pytest.fixture
    def ci(self):
        spec = importlib.util.spec_from_file_location("ci_test", ROOT / ".ci/test.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @pytest.fixture
    def tally(self, ci):
        tally = ci.Tally()
        tally.passed = 7
        return tally

    def test_failed(self, ci, tally):
        assert ci.verdict(1, tally) == "FAIL: pytest ended with status 1, 7 tests passed."

    def test_nothing_ran(self, ci):
        assert ci.verdict(0, ci.Tally()).startswith("FAIL: ")

    @pytest.mark.parametrize("archs", ["", "90a-real;80-virtual"])
    def test_passed_without_cuda_tests(self, ci, tally, archs, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr("lt2_ext.build_info", lambda: {"cpu_isa": "avx2", "cuda_archs": archs})
        cuda = "CUDA compiled for sm_90a, compute_80, not run (no GPU)." if archs else "CUDA not compiled."
        assert ci.verdict(0, tally) == f"PASS: CPU verified (avx2). {cuda}"

    def test_passed_on_a_gpu(self, ci, tally, monkeypatch):
        tally.passed_cuda = 3
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
        monkeypatch.setattr("lt2_ext.build_info", lambda: {"cpu_isa": "avx2", "cuda_archs": "90a-real"})
        assert ci.verdict(0, tally) == "PASS: CPU verified (avx2). CUDA compiled for sm_90a, verified on GPU."


@pytest.mark.skipif(not (ROOT / ".ci/setup").is_file(), reason="not a source tree")
class TestSetup:
    def run(self, tmp_path, *tools, **environment):
        """.ci/setup with nothing on PATH but ``tools`` and what it runs before it checks."""
        for tool in ("bash", "dirname", "sed", "uname", *tools):
            (tmp_path / tool).symlink_to(shutil.which(tool))
        command = [str(tmp_path / "bash"), str(ROOT / ".ci/setup")]
        done = subprocess.run(command, env={"PATH": str(tmp_path), **environment}, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    def test_everything_is_missing(self, tmp_path):
        message = self.run(tmp_path, PYTHON="no-python")
        assert "Missing: no-python >= 3.10 (found: none); a C++ compiler." in message
        assert "Install: apt-get install -y python3 python3-venv python3-dev g++" in message

    def test_the_compiler_is_missing(self, tmp_path):
        message = self.run(tmp_path, PYTHON=sys.executable)
        assert message.startswith("Missing: a C++ compiler.\nInstall: apt-get install -y g++ ")

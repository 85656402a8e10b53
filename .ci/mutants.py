"""Plant known bugs in a copy of the sources, one at a time, and see whether the quick tests notice each of them.

    make mutants
    make mutants ARGS="--only gate --keep build/mutants"

The copy is built for one instruction set, so a bug in a kernel costs one or two compilations. A bug is killed when a
test fails or the process dies; a build that breaks, or a place that is no longer in the sources, is an error. Exit
status 1 if any bug survives or cannot be planted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds of tests; a bug may also hang


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str  # occurs once
    new: str
    tests: str  # arguments of pytest


GDN, STEP, CONV = "test_gdn.py", "test_gdn_step.py", "test_causal_conv1d.py"
LOOP, CACHE, MODELS = "test_loop_state.py", "test_loop_cache.py", "test_models.py"
KDA, INDEXER, LOSS = "test_kda.py", "test_dsa_indexer.py", "test_dsa_loss.py"
BLOCK, LINEAR = "test_block_ops.py", "test_linear_step.py"
GDN_CPU, CONV_CPU, LOOP_CPU = "csrc/gdn/cpu/", "csrc/causal_conv1d/cpu/", "csrc/loop_state/cpu/"
KDA_CPU, DSA_CPU, BLOCK_CPU = "csrc/kda/cpu/", "csrc/dsa/cpu/", "csrc/block_ops/cpu/"
MUTANTS = [
    Mutant("causal mask dropped inside a vector", GDN_CPU + "chunk.h",
           "lane + static_cast<float>(column) <= splat(static_cast<float>(i)) ? exp(d) : Vec{}", "exp(d)", GDN),
    Mutant("rows shifted by one", GDN_CPU + "rows.h",
           "token_row<T const>(x, row, c.begin + i, head) + column",
           "token_row<T const>(x, row, c.begin + (i > 0 ? i - 1 : 0), head) + column", GDN),
    Mutant("grouped value heads mapped by modulo", GDN_CPU + "chunk.h",
           "int const qk_head = head / (p.value_heads / p.heads);", "int const qk_head = head % p.heads;", GDN),
    Mutant("last row of the inverse forgotten", GDN_CPU + "rows.h",
           "for (int j = panel * kPanel; j < i; ++j) {", "for (int j = panel * kPanel; j < i - 1; ++j) {", GDN),
    Mutant("beta not doubled for negative eigenvalues", GDN_CPU + "rows.h",
           "(p.neg_eigval ? 2.f : 1.f) * sigmoid(x) : x", "sigmoid(x) : x", GDN),
    Mutant("partial last chunk forgotten", GDN_CPU + "forward.h",
           "c.begin < span.end; c.begin +=", "c.begin + kForwardChunk <= span.end; c.begin +=", GDN),
    Mutant("state not decayed between chunks", GDN_CPU + "forward.h",
           "c.rows, c.last_decay, c.ahead);", "c.rows, 1.f, c.ahead);", GDN),
    Mutant("one state for all heads that walk together", GDN_CPU + "forward.h",
           "s = b.states[head - heads.begin];", "s = b.states[0];", GDN),
    Mutant("output not scaled", GDN_CPU + "forward.h", "p.scale * c.gamma[i]", "c.gamma[i]", GDN),
    Mutant("offsets of a packed sequence swapped", GDN_CPU + "kernels.h",
           "return {0, cu_seqlen(p, n), cu_seqlen(p, n + 1)};", "return {0, cu_seqlen(p, n + 1), cu_seqlen(p, n)};",
           GDN),
    Mutant("gradient of the initial state is that of the final one", GDN_CPU + "backward.h",
           "multiply<true>(c.q, b.d_o, ds, ds.rows, c.rows, c.last_decay);", "", GDN),
    Mutant("gradient through the l2norm skipped for keys", GDN_CPU + "backward.h",
           "normalise_backward(b.dk, c.k, c.k_norm, b.dot, c.rows);", "", GDN),
    Mutant("decode without the gate", GDN_CPU + "step.h",
           "tokens[t] = {q[t], k[t], v[t], o[t], decay,", "tokens[t] = {q[t], k[t], v[t], o[t], 1.f,", STEP),
    Mutant("step without the delta rule erases", GDN_CPU + "step.h",
           "o[t], decay, p.delta ? decay : 0.f", "o[t], decay, decay", "test_linear_attention.py"),
    Mutant("slot -1 taken for slot 0", GDN_CPU + "step.h",
           "p.slot_ids == nullptr ? row : p.slot_ids[row];",
           "p.slot_ids == nullptr ? row : p.slot_ids[row] < 0 ? 0 : p.slot_ids[row];", STEP),
    Mutant("value columns beyond the vectors forgotten", GDN_CPU + "step.h",
           "for (; column < value_dim; ++column) {", "for (; column < value_dim - kLanes; ++column) {", STEP),
    Mutant("a channel's decay over the first block forgotten", KDA_CPU + "chunk.h",
           "store(head, near * behind[0]);", "store(head, near);", KDA),
    Mutant("a token's own score not scaled", KDA_CPU + "chunk.h",
           "c.attention.at(i, i) = scale * self[i];", "c.attention.at(i, i) = self[i];", KDA),
    Mutant("a reset channel has a gradient", KDA_CPU + "backward.h",
           "log_decay <= splat(kNoDecay) ? Vec{} : load(b.dG.row(i, panel) + j)", "load(b.dG.row(i, panel) + j)", KDA),
    Mutant("one of the equal scores lost", DSA_CPU + "indexer.h",
           "int equals = apart ? 0 : k -", "int equals = apart ? 0 : k - 1 -", INDEXER),
    Mutant("-0 below 0", DSA_CPU + "indexer.h",
           "reinterpret_cast<VecI>(score + 0.f)", "reinterpret_cast<VecI>(score)", INDEXER),
    Mutant("a query sees the next key", DSA_CPU + "kernels.h", "d.position + t + 1;", "d.position + t + 2;", INDEXER),
    Mutant("attention weights added up over heads", DSA_CPU + "loss.h",
           "load(out) * (1.f / static_cast<float>(p.query_heads))", "load(out)", LOSS),
    Mutant("derivative of the ReLU forgotten", DSA_CPU + "loss.h",
           "dot > 0.f ? load(scores + r / HI * width + i) : Vec{}", "load(scores + r / HI * width + i)", LOSS),
    Mutant("derivative of SwiGLU's gate without its second term", BLOCK_CPU + "rows.h",
           "load_some(up + c, n) * s * (g * (1.f - s) + 1.f)", "load_some(up + c, n) * s", BLOCK),
    Mutant("rotation with the wrong sign", BLOCK_CPU + "rope.h", "b * u + a * v", "b * u - a * v", BLOCK),
    Mutant("norm before a projection without its mean square", BLOCK_CPU + "linear.h",
           "load_some(to + c, n) * rstd * load_some(weight + c, n)", "load_some(to + c, n) * load_some(weight + c, n)",
           LINEAR),
    Mutant("convolution sees the next token", CONV_CPU + "causal_conv1d_kernels.h",
           "  for (int i = 0; i < kTokens + taps.width - 1; ++i) rows[i] = window.row(t - taps.width + 1 + i);",
           "  for (int i = 0; i < kTokens + taps.width - 1; ++i) rows[i] = window.row(t - taps.width + 2 + i);", CONV),
    Mutant("derivative of SiLU without its second term", CONV_CPU + "causal_conv1d_kernels.h",
           "dz[i] *= s * (1.f + z[i] * (1.f - s));", "dz[i] *= s;", CONV),
    Mutant("convolution leaks into the next packed sequence", CONV_CPU + "causal_conv1d_kernels.h",
           ".first = chunk.first,", ".first = 0,", CONV),
    Mutant("decode attention sees one key too many", LOOP_CPU + "decode.h",
           "keys - tokens + i / g.group + 1 - block", "keys - tokens + i / g.group + 2 - block", LOOP),
    Mutant("loop_map ignored", LOOP_CPU + "kernels.h",
           "p.loop_map == nullptr ? 0 : p.loop_map[row]", "0", LOOP),
    Mutant("partial softmax sums merged without their maxima", LOOP_CPU + "decode.h",
           "total += exp(max_of(s) - max) *", "total +=", LOOP),
    Mutant("slots copied while others are still read", LOOP_CPU + "dispatch.cpp",
           "plan.staged |= writer[p.src[i]] >= 0;", "", LOOP),
    Mutant("gradient of the final state dropped", "lt2_ext/ops/gdn.py",
           "dfinal_state if ctx.output_final_state else None", "None", GDN),
    Mutant("invalid cu_seqlens not seen", "lt2_ext/ops/gdn.py",
           "offsets == sorted(offsets) and", "", GDN),
    Mutant("one cache shared by all loops", "lt2_ext/models/lt2.py",
           "states[loop][i], shared[i]", "states[0][i], shared[i]", CACHE),
    Mutant("a reset leaves the memory", "lt2_ext/models/loop_state.py",
           "ops.loop_state_zero_(self.arena, index)", "pass", CACHE),
    Mutant("state of the convolution not kept", "lt2_ext/models/mixers/_linear.py",
           '({"conv": conv} if self.short_conv and conv is not None else {})', "{}", CACHE),
    Mutant("rho of the first loop used in every loop", "lt2_ext/models/lt2.py",
           "h, h_in, rho[loop])", "h, h_in, rho[0])", MODELS),
    Mutant("first token of a packed document is a label", "lt2_ext/models/lt2.py", ", -100)[:, 1:]", ", 0)[:, 1:]",
           MODELS),
]  # fmt: skip


class Tree:
    """A copy of the tracked files, built for the first instruction set of its processor family."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            if (ROOT / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, path / name)
        self.replace("CMakeLists.txt", r"set\(isas scalar .*\)", "set(isas scalar)")
        self.replace("CMakeLists.txt", r"if\(lt2_has_amx\)", "if(FALSE)")
        self.replace("csrc/common/cpu_isa.h", r"X\(scalar, kScalar\) X\(avx2.*", "X(scalar, kScalar)")
        flags = {"LT2_CUDA": "OFF", "LT2_STRICT": "OFF", "LT2_CPU_ISA": "scalar", "PYTHONPATH": str(path)}
        self.environment = os.environ | flags

    def replace(self, name: str, pattern: str, new: str) -> None:
        text, count = re.subn(pattern, new, (self.path / name).read_text())
        if count != 1:
            raise SystemExit(f"mutants: {name} must have one {pattern!r}, has {count}")
        (self.path / name).write_text(text)

    def run(self, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=self.path, env=self.environment, timeout=timeout,
                              capture_output=True, text=True)  # fmt: skip

    def build(self) -> bool:
        return self.run("setup.py", "-q", "build_ext", "--inplace").returncode == 0

    def test(self, tests: str) -> tuple[int, str]:
        """Status of pytest, and what failed first."""
        files = [f"python_tests/{t}" for t in tests.split()]
        try:
            run = self.run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files,
                           timeout=TIMEOUT)  # fmt: skip
        except subprocess.TimeoutExpired:
            return 1, f"more than {TIMEOUT} s"
        failed = re.search(r"^(?:FAILED|ERROR) python_tests/(\S+)", run.stdout, re.M)
        what = failed[1] if failed else f"exit status {run.returncode}" if run.returncode else ""
        return run.returncode, what


def try_mutant(tree: Tree, mutant: Mutant) -> tuple[str, str]:
    """``killed``, ``SURVIVED`` or ``ERROR``, and by what."""
    file = tree.path / mutant.path
    text = file.read_text()
    if text.count(mutant.old) != 1:
        return "ERROR", f"{mutant.path} has {text.count(mutant.old)} places for it"
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        if mutant.path.startswith("csrc") and not tree.build():
            return "ERROR", "does not compile"
        status, what = tree.test(mutant.tests)
    finally:
        file.write_text(text)
    if status == 0:
        return "SURVIVED", mutant.tests
    return ("killed", what) if status == 1 or status < 0 else ("ERROR", what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if options.only in m.name]
    if not mutants:
        parser.error(f"--only {options.only}: no mutant has that in its name")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        return check(mutants, Tree(options.keep.resolve()))
    with tempfile.TemporaryDirectory() as folder:
        return check(mutants, Tree(Path(folder)))


def check(mutants: list[Mutant], tree: Tree) -> int:
    start = time.monotonic()
    if not tree.build():
        raise SystemExit("mutants: the sources do not build")
    found = tree.run("-c", "import lt2_ext; print(lt2_ext.__path__[0])").stdout.strip()
    if Path(found) != tree.path / "lt2_ext":
        raise SystemExit(f"mutants: the copy's package is not the one imported, but {found}")
    status, what = tree.test(" ".join(sorted({m.tests for m in mutants})))
    if status != 0:
        raise SystemExit(f"mutants: the tests fail without a bug: {what}")
    print(f"without a bug: all pass ({time.monotonic() - start:.0f} s with the build)", flush=True)
    outcomes = []
    for mutant in mutants:
        began = time.monotonic()
        outcome, what = try_mutant(tree, mutant)
        outcomes.append(outcome)
        print(f"{outcome:8}  {time.monotonic() - began:4.0f} s  {mutant.name}  [{what}]", flush=True)
    killed = outcomes.count("killed")
    print(f"{killed} of {len(mutants)} killed in {(time.monotonic() - start) / 60:.1f} minutes")
    return int(killed != len(mutants))


if __name__ == "__main__":
    sys.exit(main())

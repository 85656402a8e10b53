"""The tables of times in README.md, out of bench/results: python bench/readme.py writes them anew."""

from __future__ import annotations

from pathlib import Path

from report import Result, Run

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
PEERS = {"flash_qla": "FlashQLA", "flashinfer": "FlashInfer", "flex_attention": "FlexAttention"}

OVERVIEW = "| | lt2_ext | others | plain PyTorch |"
RULE, WINDOW, XEON = "h100-80gb-hbm3", "h100-80gb-hbm3-operators", "xeon-amx-2c"
FIRST = "H=16 K=V=128 g=mix bf16"
# what, in which file, operator, shape
ROWS = [
    ("**H100, bf16**: gated delta rule, 8192 tokens, 16 heads", RULE, "gdn fwd", f"B=1 T=8192 {FIRST}"),
    ("the same, forward and backward", RULE, "gdn fwd+bwd", f"B=1 T=8192 {FIRST}"),
    ("its decode step, 32 sequences", RULE, "gdn decode step", "B=32 H=16 K=V=128 bf16"),
    ("window attention, 8192 tokens, window 512, forward and backward", WINDOW, "window_attention fwd+bwd",
     "T=8192 HQ=16 H=4 D=128 window=512 bf16"),
    ("a token of `lt2-1.3b-full-gdn`: 21 layers, 4 loops, 8192 tokens of context", "h100-80gb-hbm3-models",
     "decode step", "lt2-1.3b-full-gdn B=1 context=8192 bf16"),
    ("**two cores of a Xeon**: gated delta rule, 2048 tokens, 8 heads, bf16", XEON, "gdn fwd",
     "B=1 T=2048 H=8 K=V=128 bf16"),
    ("the same, forward and backward", XEON, "gdn fwd+bwd", "B=1 T=2048 H=8 K=V=128 bf16"),
]  # fmt: skip

SHAPES = "| B x T | forward, ours | FlashInfer | FlashQLA | fla | forward + backward, ours | FlashQLA | fla |"
# operator, in which file, whose
CELLS = [
    ("gdn fwd", "h200", "lt2_ext"),
    ("gdn fwd", "h200-flashinfer", "flashinfer"),
    ("gdn fwd", "h200", "flash_qla"),
    ("gdn fwd", "h200", "fla"),
    ("gdn fwd+bwd", "h200", "lt2_ext"),
    ("gdn fwd+bwd", "h200", "flash_qla"),
    ("gdn fwd+bwd", "h200", "fla"),
]
LENGTHS = [(1, 8192), (1, 32768), (8, 4096), (4, 8192)]


def case(file: str, op: str, shape: str) -> tuple[Run, list[Result]]:
    run = Run.load(RESULTS / f"{file}.json")
    return run, next(c for c in run.cases() if (c[0].op, c[0].shape) == (op, shape))


def number(seconds: float | None, scale: float) -> str:
    return "" if seconds is None else f"{seconds * scale:#.3g}".rstrip(".")


def overview() -> str:
    lines = [OVERVIEW, "|---|---|---|---|"]
    for what, file, op, shape in ROWS:
        run, (ours, plain, *others) = case(file, op, shape)
        seconds = run.seconds(ours) or 0.0
        unit, scale = ("ms", 1e3) if seconds >= 1e-4 else ("us", 1e6)
        times = sorted((s, r.name) for r in others if " in " not in r.name and (s := run.seconds(r)))
        peers = ", ".join(f"{PEERS.get(name, name)} {number(s, scale)}" for s, name in times)
        torch = number(run.seconds(plain), scale)
        lines.append(f"| {what} | **{number(seconds, scale)} {unit}** | {peers} | {torch} |")
    return "\n".join(lines)


def shapes() -> str:
    lines = [SHAPES, "|---|---|---|---|---|---|---|---|"]
    for B, T in LENGTHS:
        cells = []
        for op, file, name in CELLS:
            run, results = case(file, op, f"B={B} T={T} {FIRST}")
            cells.append(number(run.seconds(next(r for r in results if r.name == name)), 1e3))
        lines.append(f"| {B} x {T} | {' | '.join(cells)} |")
    return "\n".join(lines)


def current() -> str:
    """README.md with its tables as the results have them."""
    text = README.read_text()
    for table in (overview(), shapes()):
        start = text.index(table.splitlines()[0])
        text = text[:start] + table + text[text.index("\n\n", start) :]
    return text


if __name__ == "__main__":
    README.write_text(current())

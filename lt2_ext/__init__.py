"""Fused operators and models for looped linear-time transformers (LT2).

Here: the build facts and the package's switches. ``lt2_ext.ops`` are the operators, ``lt2_ext.models`` the looped
models, ``lt2_ext.reference`` the oracles. Imports go one way: recipes -> models -> ops -> _C.
"""

import torch  # loads libtorch, which _C resolves its symbols from

try:
    from . import _C
except ImportError as e:
    raise ImportError(
        f"lt2_ext is imported from {__path__[0]}, which has no usable compiled module ({e}). "
        "Run `pip install .` and import it from outside the source tree, or `pip install -e .`."
    ) from e
from . import ops
from .ops._common import set_checks

__version__ = "0.1.0"
__all__ = ["build_info", "ops", "set_checks"]


def build_info() -> dict[str, str]:
    """What this build contains and what it will use here.

    Returns:
        ``torch`` (running version), ``cpu_isa`` (instruction set in use), ``cpu_isas`` (those built, ``;``-separated),
        ``cuda_archs`` (CUDA architectures built, ``""`` for a CPU-only build).
    """
    return {"torch": torch.__version__, "cpu_isa": _C.cpu_isa(), "cpu_isas": _C.cpu_isas, "cuda_archs": _C.cuda_archs}

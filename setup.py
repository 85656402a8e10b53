"""Build lt2_ext: this file finds things, CMakeLists.txt compiles them.

torch is not a static build requirement. The extension must be compiled against the torch it will be used
with, and pip's isolated build environment would otherwise download a second one of several GB. Only headers
and link libraries are needed, so torch is located on disk and never imported; it is requested as a *dynamic*
build requirement only when the target environment has none.

Environment: LT2_CUDA=ON|OFF|AUTO, LT2_CUDA_ARCHS, LT2_CUTLASS_DIR, LT2_TORCH_DIR, LT2_STRICT=ON, CUDACXX, CXX,
MAX_JOBS.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

BUILD_TOOLS = "pip install 'setuptools>=77' cmake ninja pybind11"
ROOT = Path(__file__).resolve().parent
TORCH_MIN = (2, 11)
NVCC_MIN = (12, 0)  # the first that knows sm_90a
CUTLASS = "nvidia-cutlass==4.2.0.0"


def site_dirs() -> list[Path]:
    """Where packages may be: this process's path, then the target environment's (pip's build isolation
    hides it from sys.path, but not from sysconfig)."""
    dirs = [p for p in sys.path if p]
    dirs += [sysconfig.get_path(k) for k in ("purelib", "platlib")] + site.getsitepackages()
    if site.ENABLE_USER_SITE:
        dirs.append(site.getusersitepackages())
    return [Path(d) for d in dict.fromkeys(dirs)]


def find_torch() -> Path | None:
    explicit = os.environ.get("LT2_TORCH_DIR")
    for d in [Path(explicit)] if explicit else [d / "torch" for d in site_dirs()]:
        if (d / "include/torch/csrc/stable/library.h").is_file():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (d / "version.py").read_text())
            if version and (int(version[1]), int(version[2])) >= TORCH_MIN:
                return d
    return None


def find_cutlass() -> Path | None:
    explicit = os.environ.get("LT2_CUTLASS_DIR")
    for d in [Path(explicit)] if explicit else [d / "cutlass_library/source" for d in site_dirs()]:
        if (d / "include/cutlass/cutlass.h").is_file():
            return d
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for c in (os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc"):
        if c and Path(c).is_file():
            return c
    return None


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise SystemExit(f"lt2_ext: {nvcc} --version names no release. Set CUDACXX, or build with LT2_CUDA=OFF.")
    return int(release[1]), int(release[2])


def cuda_wanted() -> bool:
    mode = os.environ.get("LT2_CUDA", "AUTO").upper()
    if mode not in ("ON", "OFF", "AUTO"):
        raise SystemExit(f"lt2_ext: LT2_CUDA must be ON, OFF or AUTO, got {mode!r}.")
    return mode == "ON" or (mode == "AUTO" and find_nvcc() is not None)


def jobs() -> int:
    """MAX_JOBS, else bounded by cores and by ~4 GB of memory per nvcc process."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gb // 4)))


def require_tools() -> None:
    """One sentence for each thing that a compilation would trip over later with a page of output."""

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise SystemExit(f"lt2_ext: {sentence}")

    compiler = os.environ.get("CXX", "g++").split()[0]
    require(shutil.which(compiler) is not None or ("CXX" not in os.environ and shutil.which("c++") is not None),
            f"no C++ compiler ({compiler}) found. Install one (Debian: apt-get install g++).")
    require((Path(sysconfig.get_path("include")) / "Python.h").is_file(),
            "no Python headers (Python.h) found. Install them (Debian: apt-get install python3-dev).")
    absent = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    absent += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    require(not absent, f"{', '.join(absent)} not found. Without build isolation, first: {BUILD_TOOLS}.")
    require(find_torch() is not None,
            f"no torch>={'.'.join(map(str, TORCH_MIN))} found. Install torch first, or point LT2_TORCH_DIR at it.")
    if cuda_wanted():
        nvcc = find_nvcc()
        require(nvcc is not None, "LT2_CUDA=ON but no nvcc found. Set CUDACXX or CUDA_HOME, or LT2_CUDA=OFF.")
        require(nvcc_version(nvcc) >= NVCC_MIN,
                f"{nvcc} is older than CUDA {'.'.join(map(str, NVCC_MIN))}. Set CUDACXX, or build with LT2_CUDA=OFF.")
        require(find_cutlass() is not None,
                f"no CUTLASS headers for the CUDA kernels found. First: pip install --no-deps {CUTLASS}, "
                "or set LT2_CUTLASS_DIR, or build with LT2_CUDA=OFF.")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # tools of an environment that is not active
        require_tools()
        import pybind11  # a build requirement: importable here, not when pip only asks for the metadata

        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        strict = os.environ.get("LT2_STRICT", "OFF").upper() == "ON"
        kind = f"{'cuda' if cuda_wanted() else 'cpu'}{'-strict' if strict else ''}"
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{kind}"
        # The build directory outlives pip's throw-away environments, so every path that points into one is
        # passed again on each configure instead of being left to the CMake cache.
        args = [
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLT2_TORCH_DIR={find_torch()}",
            f"-DLT2_STRICT={'ON' if strict else 'OFF'}",
            f"-DLT2_CUDA={'ON' if cuda_wanted() else 'OFF'}",
        ]
        if cuda_wanted():
            args += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DLT2_CUTLASS_DIR={find_cutlass()}",
                     f"-DLT2_CUDA_ARCHS={os.environ.get('LT2_CUDA_ARCHS', '90a-real;80-virtual')}"]
        if shutil.which("ccache"):
            args += [f"-DCMAKE_{lang}_COMPILER_LAUNCHER=ccache" for lang in ("CXX", "CUDA")]
        for command in (["-GNinja", "-S", ROOT, "-B", build, *args],
                        ["--build", build, "--target", "_C", "-j", str(jobs())]):
            if subprocess.run(["cmake", *command]).returncode:
                raise SystemExit("lt2_ext: the compilation failed, the messages above say why.")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.glob("_C.*.so")), out)


if int(__version__.split(".")[0]) < 77:
    raise SystemExit(f"lt2_ext: setuptools {__version__} is too old. Without build isolation, first: {BUILD_TOOLS}.")

# Only where a PEP 517 frontend asks: under a direct `python setup.py` setuptools would go and download them.
dynamic_build_requires = []
if "setuptools.build_meta" in sys.modules:
    if find_torch() is None:
        dynamic_build_requires.append("torch>=" + ".".join(map(str, TORCH_MIN)))
    if cuda_wanted() and find_cutlass() is None:
        dynamic_build_requires.append(CUTLASS)

csrc = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())
setup(
    # `depends` puts the sources into the sdist.
    ext_modules=[Extension("lt2_ext._C", sources=[], depends=["CMakeLists.txt", *csrc])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=dynamic_build_requires,
)

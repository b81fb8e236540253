"""Builds flute_vllm/_C.abi3.so, one library on torch's stable ABI for every Python and torch.

FLUTE_BUILD       auto (default: cuda when nvcc is found, else cpu) | cpu | cuda | none
FLUTE_CUDA_ARCHS  default "8.0 8.6 8.9 9.0a", plus PTX of 8.0
MAX_JOBS          compilers at a time, default the number of processors
"""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OBJECTS = Path("build") / "objects"
MIN_TORCH = (2, 10)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
INCLUDES = ["-Ikernels", "-Ikernels/include"]
# -ffp-contract=off: a product that is rounded on purpose must not become part of an FMA.
# -Wno-*uninitialized: GCC 12 reports its own AVX-512 headers.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"]
# No instruction set, but what lets GCC make vectors of a loop with comparisons of floats.
VECTOR_FLAGS = {"gated.cpp": ["-fno-trapping-math"]}
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": AVX512,
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi"],
}


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = [shutil.which(f"{home}/bin/nvcc") for home in homes if home]
    return next(filter(None, found), shutil.which("nvcc"))


def choose_build() -> str:
    wish = os.environ.get("FLUTE_BUILD", "auto")
    if wish not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"flute: FLUTE_BUILD={wish!r} is unknown\n  fix: use auto, cpu, cuda or none")
    if wish == "cuda" and not find_nvcc():
        sys.exit(
            "flute: FLUTE_BUILD=cuda, but there is no nvcc\n"
            "  why: looked in $CUDA_HOME/bin, /usr/local/cuda/bin and PATH\n"
            "  fix: install the CUDA toolkit, or use FLUTE_BUILD=cpu"
        )
    build = wish if wish != "auto" else "cuda" if find_nvcc() else "cpu"
    print(f"flute: FLUTE_BUILD={wish}: building {build}", file=sys.stderr)
    return build


def torch_paths() -> tuple[Path, Path]:
    try:
        import torch
    except ImportError:
        sys.exit(
            "flute: torch is missing, and the kernels are built against its headers\n"
            "  fix: install torch >= 2.10 first, then pip install --no-build-isolation .\n"
            "       or set FLUTE_BUILD=none for the slow pure-torch ops"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
        sys.exit(
            f"flute: torch {torch.__version__} is too old\n"
            "  why: the stable ABI that the kernels use begins with torch 2.10\n"
            "  fix: pip install 'torch>=2.10'"
        )
    return Path(torch.__file__).parent / "include", Path(torch.__file__).parent / "lib"


def cuda_arch_flags() -> list[str]:
    archs = os.environ.get("FLUTE_CUDA_ARCHS", "8.0 8.6 8.9 9.0a").replace(".", "").split()
    # Hopper's kernels exist only in code for sm_90a, which every GPU of capability 9.0 runs.
    archs = ["90a" if arch == "90" else arch for arch in archs]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    # For GPUs newer than any of them the driver compiles PTX: 8.9's, as the tables of 8.0's need
    # more shared memory than 12.x has. 8.0's is for builds that leave 8.0 out.
    return [*flags, *(f"-gencode=arch=compute_{a},code=compute_{a}" for a in ("80", "89"))]


def compile_command(source: Path, include: Path) -> list[str]:
    if source.suffix == ".cu":  # never sees torch
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags = ["-std=c++17", "-O3", "--cudart=static", "--expt-relaxed-constexpr", *host]
        return [find_nvcc() or "nvcc", *flags, *cuda_arch_flags(), *INCLUDES, "-c", str(source)]
    compiler = os.environ.get("CXX", "g++")
    isa = ISA_FLAGS.get(source.name, []) if os.uname().machine == "x86_64" else []
    flags = [*CXX_FLAGS, *isa, *VECTOR_FLAGS.get(source.name, []), *INCLUDES]
    if source.name.startswith("bindings"):
        flags += [*STABLE_ABI, "-isystem", str(include)]
    return [compiler, *flags, "-c", str(source)]


def versions(sources: list[str]) -> bytes:
    """What else an object depends on: the compilers and torch's headers."""
    import torch

    commands = {compile_command(Path(source), Path())[0] for source in sources}
    told = [subprocess.run([c, "--version"], capture_output=True).stdout for c in sorted(commands)]
    return b"\0".join([torch.__version__.encode(), *told])


class BuildKernels(build_ext):
    """Compiles in parallel; an object is reused when command, source, headers, compilers and torch
    are the same."""

    def build_extension(self, ext: Extension) -> None:
        include, lib = torch_paths()
        # Not build_temp, which an editable install sets to a new folder each time: the wheel after
        # it would compile all CUDA sources again (benchmarks/results/cpu/setup.json).
        OBJECTS.mkdir(parents=True, exist_ok=True)
        headers = sorted(p for ends in ("*.h", "*.cuh") for p in Path("kernels").rglob(ends))
        common = versions(ext.sources) + b"".join(path.read_bytes() for path in headers)

        def compile_one(name: str) -> str:
            command = compile_command(Path(name), include)
            key = "\0".join(command).encode() + common + Path(name).read_bytes()
            target = OBJECTS / f"{Path(name).stem}-{hashlib.sha256(key).hexdigest()[:16]}.o"
            if not target.exists():
                print(f"flute: compiling {name}", file=sys.stderr)
                partial = target.with_suffix(f".{os.getpid()}.tmp.o")
                subprocess.run([*command, "-o", str(partial)], check=True)
                partial.replace(target)
            return str(target)

        jobs = int(os.environ.get("MAX_JOBS") or max(2, os.cpu_count() or 2))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # libtorch.so pulls in libtorch_cuda.so where there is one, for the weak stream symbol.
        torch_libs = [f"-L{lib}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
        linker = [os.environ.get("CXX", "g++"), "-shared"]
        if any(name.endswith(".cu") for name in ext.sources):
            linker = [find_nvcc() or "nvcc", "-shared", "--cudart=static"]
        partial = target.with_suffix(f".{os.getpid()}.tmp")  # a reader never sees half a library
        subprocess.run([*linker, *objects, *torch_libs, "-o", str(partial)], check=True)
        partial.replace(target)


CUDA_BINDINGS = ("kernels/bindings_cuda.cpp", "kernels/bindings_norm.cpp")


def extensions(build: str) -> list[Extension]:
    if build == "none":
        return []
    patterns = ["*.cpp", "cpu/*.cpp", *(["cuda/*.cu"] if build == "cuda" else [])]
    found = [path for pattern in patterns for path in (ROOT / "kernels").glob(pattern)]
    sources = sorted(str(path.relative_to(ROOT)) for path in found)
    if build != "cuda":
        sources = [source for source in sources if source not in CUDA_BINDINGS]
    return [Extension("flute_vllm._C", sources, py_limited_api=True)]


DATA = ["flute_vllm.kernels", "flute_vllm.configs"]  # plain folders beside the package in git
setup(
    packages=[*find_packages(include=["flute_vllm", "flute_vllm.*"]), *DATA],
    package_dir={"flute_vllm.kernels": "kernels", "flute_vllm.configs": "configs"},
    package_data=dict.fromkeys(DATA, ["*", "**/*"]),
    ext_modules=extensions(choose_build()),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

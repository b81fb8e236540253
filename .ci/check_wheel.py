"""Checks a built wheel: tags, exact content, entry points, CUDA architectures, import elsewhere.

python .ci/check_wheel.py dist/flute_vllm-*.whl
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIRED_ARCHITECTURES = {"sm_80", "sm_90a"}
SIZE_LIMIT = 40 << 20


def expected_files() -> set[str]:
    """Every tracked Python file of the package and every kernel and config file."""
    tracked = subprocess.run(
        ["git", "ls-files", "flute_vllm", "kernels", "configs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return {name if name.startswith("flute_vllm/") else f"flute_vllm/{name}" for name in tracked}


def fail(message: str) -> None:
    sys.exit(f"check_wheel: {message}")


def check_content(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = expected_files() | {"flute_vllm/_C.abi3.so"}
    if found != expected:
        fail(f"missing {sorted(expected - found)}, unexpected {sorted(found - expected)}")
    metadata = {Path(name).name for name in wheel.namelist() if ".dist-info/" in name}
    if not {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"} <= metadata:
        fail(f"incomplete metadata: {sorted(metadata)}")
    entries = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entries).decode()
    for line in ("flute-vllm = flute_vllm.cli:app", "flute = flute_vllm:register"):
        if line not in text:
            fail(f"entry point {line!r} is missing")
    print(f"content: {len(found)} files, as tracked; metadata and entry points present")


def find_cuobjdump() -> str:
    """CUDA's own, or the copy that Triton ships; some CUDA images have nvcc alone."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def check_library(library: Path) -> None:
    size = library.stat().st_size
    if size > SIZE_LIMIT:
        fail(f"the extension has {size >> 20} MiB, more than {SIZE_LIMIT >> 20}")
    print(f"extension: {size / 2**20:.1f} MiB")
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    for forbidden in ("libpython", "libtorch_python", "libc10_cuda", "libtorch_cuda"):
        if forbidden in needed:
            fail(f"the extension links {forbidden}; it must load under any Python and CPU torch")
    if shutil.which("nvcc") is None:
        print("CUDA: no nvcc here, so there are no kernels to check")
        return
    listing = subprocess.run(
        [find_cuobjdump(), "--list-elf", str(library)], capture_output=True, text=True, check=True
    ).stdout
    missing = {name for name in REQUIRED_ARCHITECTURES if f".{name}." not in listing}
    if missing:
        fail(f"no machine code for {sorted(missing)} in the extension")
    print(f"CUDA: {len(listing.splitlines())} images, {sorted(REQUIRED_ARCHITECTURES)} among them")


def check_import(folder: Path) -> None:
    """The unpacked wheel works from a folder of its own, away from the checkout."""
    program = (
        "import flute_vllm, torch\n"
        "from flute_vllm import ops, format as f\n"
        "from flute_vllm.quantize.codebooks import normal_float\n"
        "from pathlib import Path\n"
        f"expected = Path({str(folder)!r})\n"
        "found = Path(flute_vllm.__file__)\n"
        "if expected not in found.parents: raise SystemExit(f'imported {found}')\n"
        "table = normal_float(4).values.to(torch.bfloat16)\n"
        "codes = torch.arange(64, dtype=torch.uint8).remainder(16).reshape(1, 64)\n"
        "q, s = f.pack(codes, 4), torch.ones(1, 1, dtype=torch.bfloat16)\n"
        "ops.load()\n"
        "y = torch.ops.flute.gemm(torch.eye(64), q, s, table[None], [1], 4, 64)\n"
        "expect = f.dequantize(q, s, table, 4, torch.float32).T\n"
        "if not torch.equal(y, expect): raise SystemExit('wrong result')\n"
        "print('import: works from the unpacked wheel, CPU kernels:', ops.cpu_isa())\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True, cwd=folder, env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    if "-cp310-abi3-" not in path.name:
        fail(f"{path.name} is not tagged cp310-abi3")
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as scratch:
        check_content(wheel)
        wheel.extractall(scratch)
        folder = Path(scratch).resolve()
        check_library(folder / "flute_vllm" / "_C.abi3.so")
        check_import(folder)


if __name__ == "__main__":
    main()

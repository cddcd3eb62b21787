"""What a computation ran on and what it took, for reports that are compared across machines."""

import os
import platform
import sys
from pathlib import Path

import torch


def describe_machine() -> dict[str, str | int | None]:
    """The processor, its cores and how many threads torch uses of them, and the first GPU, if there is one."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_memory() -> dict[str, int | None]:
    """Bytes that this process has had at most: of main memory (None on Windows), and of the GPU if there is one."""
    process = None
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        process = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process": process, "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}

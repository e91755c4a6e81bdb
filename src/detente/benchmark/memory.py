"""How much memory a piece of work takes at its highest."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Peak memory above its level at the start of the block, in MB: resident, or PyTorch's own on a CUDA device."""

    peak_mb = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
            return self
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # no glibc, or no right to reset the peak
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory of earlier jobs back first
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read()[0]
        return self

    def __exit__(self, *_: object) -> None:
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else self._read()[1]
        self.peak_mb = max(peak - self.before, 0.0)

    @staticmethod
    def _read() -> tuple[float, float]:
        """Current and peak resident memory in MB."""
        if sys.platform == "linux":
            lines = Path("/proc/self/status").read_text().splitlines()
            fields = {k: v for k, _, v in (line.partition(":") for line in lines)}
            return int(fields["VmRSS"].split()[0]) / 1024, int(fields["VmHWM"].split()[0]) / 1024
        if sys.platform == "win32":
            return 0.0, 0.0
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return peak, peak

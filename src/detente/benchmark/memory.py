"""How much memory a piece of work takes at its highest."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

__all__ = ["PeakMemory"]


class PeakMemory:
    """Peak resident memory of this process above its level at the start of the block, in MB."""

    peak_mb = 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # no glibc, or no right to reset the peak
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory of earlier jobs back first
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read()[0]
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_mb = max(self._read()[1] - self.before, 0.0)

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

"""What both benchmarks share: one thread, quiet peers, Markdown, and the header with machine and versions."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy: two threads under contention are slower than one

import datetime
import platform
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent / "tests"))  # the independent float64 references

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module=r"torchjd|cvxpy|qpsolvers|scipy|quadprog|torch")
# the peer's own, raised in its code or in its solvers' but reported at other places
warnings.filterwarnings(
    "ignore", message=r".*(Solution may be inaccurate|overflow|invalid value|divide by zero|ECOS|DPP).*"
)
warnings.filterwarnings("ignore", message=r".*the solver stopped short.*")  # detente says so itself; the tables show it

Array = np.ndarray


class NotThereYet(Exception):
    """A method, or an option of it, that the registry does not have."""


def ours(name: str, **options: Any) -> Any:
    """A method of detente by its registered name."""
    import detente

    try:
        return detente.get_method(name, **options)
    except (ValueError, TypeError) as error:
        raise NotThereYet(str(error)) from error


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(call: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The result, or in words why there is none."""
    try:
        with limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except TimeoutError:
        return f"no answer in {seconds:g} s"
    except NotThereYet:
        return "not there yet"
    except Exception as error:
        return f"raises {type(error).__name__}"


def processor() -> str:
    """Model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _driver() -> str:
    """Version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def header(title: str, device: torch.device | None = None) -> str:
    """Title, and everything needed to tell what was measured where."""
    import detente  # which may run from its source, without being installed

    gpu = device is not None and device.type == "cuda"
    packages = ("torch", "numpy", "numba", "scipy", "cvxpy", "clarabel", "ecos", "quadprog")
    lines = [
        f"# {title}",
        "",
        f"- command: `python {shlex.join([os.path.relpath(sys.argv[0], HERE.parent), *sys.argv[1:]])}`",
        f"- date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- machine: {processor()}, {os.cpu_count()} cores, of which one thread is used; {platform.system()}",
        *(
            [f"- GPU: {torch.cuda.get_device_name(device)}, driver {_driver()}, CUDA {torch.version.cuda}"]
            if gpu
            else []
        ),
        f"- detente {detente.__version__}, torchjd {_version('torchjd')}, LibMTL {_version('LibMTL')}, conflictfree "
        f"{_version('conflictfree')}, Python {platform.python_version()}, "
        + ", ".join(f"{p} {_version(p)}" for p in packages),
        "",
    ]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def shown(ms: list[float] | str) -> str:
    """Median, quartiles and number."""
    if isinstance(ms, str):
        return ms
    if not ms:
        return "failed"
    low, middle, high = np.quantile(ms, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.3g} to {high:.3g}; {len(ms)})"


def publish(name: str, text: str) -> None:
    """Print, and write to ``results`` unless the name is "-"."""
    if name == "-":
        print(text)
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text.rstrip("\n") + "\n")
    print(text)
    print(f"written to {os.path.relpath(RESULTS / name)}")


def distance(found: Array, wanted: Array) -> float:
    """||found - wanted|| / ||wanted||, in float64; infinite where an entry is not finite."""
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

"""What a recorder costs: on the small U-Net of `scenes`, beside a plain loop and CAGrad, and the size of its file.

``python benchmarks/recorder.py`` prints the table and writes benchmarks/results/recorder.md. Steps with and without a
record alternate in one run, so that a busy machine slows both down alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

import detente
from detente.benchmark.problem import load_problem

RESULTS = Path(__file__).parent / "results"
EVERY = 100
BATCH = 16
NEVER = 10**9


def setup():
    torch.manual_seed(0)
    problem = load_problem("scenes")
    tasks = tuple(problem.tasks)
    model = problem.make_model(tasks, problem.settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(BATCH, 3, 64, 64, generator=generator)
    labels = torch.randint(8, (BATCH, 64, 64), generator=generator)
    depth = 1 + torch.rand(BATCH, 1, 64, 64, generator=generator)
    normals = torch.nn.functional.normalize(torch.randn(BATCH, 3, 64, 64, generator=generator), dim=1)
    batch = (image, labels, depth, normals)

    def closure(tasks_=None):
        return problem.losses(model, batch, tasks_ or tasks)

    return model, optimizer, closure, tasks


def plain(model, optimizer, closure, recorder, again):
    losses = closure()
    with recorder.observe(losses, again=closure if again else None):
        sum(losses.values()).backward()
        optimizer.step()
    optimizer.zero_grad()


def cagrad(model, optimizer, closure, recorder, again):
    with recorder:
        detente.step(closure, optimizer, detente.CAGrad())


def measured(step, pairs: int, again: bool, directory: str):
    """Milliseconds of a step that is not recorded, and of one that is, alternating; bytes of a record; tasks."""
    model, optimizer, closure, tasks = setup()
    recorder = detente.Recorder(
        model, Path(directory) / f"{step.__name__}-{again}.jsonl", every=2, realised_every=1 if again else NEVER
    )
    times: list[list[float]] = [[], []]
    for k in range(2 * pairs + 4):
        start = time.perf_counter()
        step(model, optimizer, closure, recorder, again)
        if k >= 4:
            times[k % 2].append(1000 * (time.perf_counter() - start))
    lines = recorder.path.read_text().splitlines(keepends=True)
    size = sum(map(len, lines[1:])) / (pairs + 2)
    recorded, quiet = map(statistics.median, times)
    ratios = [r / q for r, q in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return quiet, recorded, low, high, size, len(tasks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| loop | step ms | recorded ms | ratio, quartiles | of step time at every=100 | bytes a record |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    shares = {}
    with tempfile.TemporaryDirectory() as directory:
        for step, again, name in (
            (plain, False, "plain sum, without realised changes"),
            (plain, True, "plain sum, with them"),
            (cagrad, False, "CAGrad by detente.step, without"),
            (cagrad, True, "CAGrad by detente.step, with"),
        ):
            quiet, recorded, low, high, size, count = measured(step, arguments.pairs, again, directory)
            shares[step, again] = (recorded / quiet - 1) / EVERY
            lines.append(
                f"| {name} | {quiet:.0f} | {recorded:.0f} | {low:.2f} to {high:.2f} | {shares[step, again]:.2%} | "
                f"{size:.0f} |"
            )
            if step is plain:
                day = 86400e3 / (quiet * EVERY) * size / 1e6
                lasts = f"A day of plain steps ({quiet:.0f} ms) with every=100 is {day:.1f} MB"
    text = "\n".join(lines) + "\n\nWith the defaults one record in four has realised changes: "
    mixed = {step: 0.75 * shares[step, False] + 0.25 * shares[step, True] for step in (plain, cagrad)}
    text += f"{mixed[plain]:.2%} of step time beside the plain sum, {mixed[cagrad]:.2%} beside CAGrad.\n\n"
    text += f"{lasts}. Whatever the speed, the file stays below limit_mb (50): every second record is dropped then.\n"
    head = (
        "# What a recorder costs\n\n`python benchmarks/recorder.py`: the small U-Net of `scenes`, "
        f"{count} tasks, batches of {BATCH} images of 64 x 64, one thread; torch {torch.__version__}, "
        f"{platform.machine()}, {platform.system()}. Recorded and other steps alternate; medians of "
        f"{arguments.pairs} each.\n\n"
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recorder.md").write_text(head + text)


if __name__ == "__main__":
    main()

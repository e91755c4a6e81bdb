"""Draw one picture per method into docs/images/methods: ``python scripts/pictures.py [NAME ...]``.

Left: two conflicting task gradients and the update that the method makes of them. Right: the method on the toy problem
of the CAGrad paper. All numbers come from the methods themselves. The same machine draws the same files every time; on
another one trajectories can differ, because methods that walk along the ridge of the toy are chaotic there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, Wedge
from torch import Tensor

import detente
from detente.benchmark.problems import toy
from detente.method import Context, GramianMethod, LossWeighting, Method, Update, registry

OUT = Path(__file__).parents[1] / "docs/images/methods"
STEPS, RATE = 30_000, 3e-3  # the toy itself takes 100,000 with 1e-3
KEPT = 400  # points of a trajectory
EPOCH = 1000  # steps
SHIFT = 21.0  # no loss of the toy is below -20; methods that need positive losses see loss + 21

FIRST, SECOND, PATH, INK, GREY = "#0072b2", "#c86400", "#a03c78", "#111111", "#777777"
G = torch.tensor([[2.0, 0.4], [-0.7, 0.9]], dtype=torch.float64)
LOSSES = [2.0, 0.5]

# ---------------------------------------------------------------------------------------------------------------------
# Left: gradients and update

Arrows = list[tuple[str, Tensor]]


def once(method: Method, losses: Sequence[float] | None = None) -> Arrows:
    return [("d", detente.aggregate(G, method, losses=losses))]


def draws(method: Method, count: int) -> Arrows:
    found = {tuple(np.round(detente.aggregate(G, method).tolist(), 9).tolist()) for _ in range(count)}
    return [("", torch.tensor(d, dtype=torch.float64)) for d in sorted(found)]


def repeated(
    method: Method, steps: Sequence[int], after: Callable[[], None] = lambda: None, first: Tensor = G
) -> Arrows:
    """The update in some of many steps with the same gradients (those of the first step may differ) and losses."""
    arrows = []
    for k in range(1, max(steps) + 1):
        d = detente.aggregate(first if k == 1 else G, method, losses=LOSSES)
        after()
        if k in steps:
            arrows.append((f"step {k}", d))
    return arrows


def after_epochs(method: Any, *epochs: Sequence[float]) -> Arrows:
    for losses in epochs:
        method.weights(torch.tensor(losses, dtype=torch.float64))
        method.next_epoch()
    return once(method, LOSSES)


def auto_lambda() -> Arrows:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1e-6)

    def closure(tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {t: LOSSES[int(t)] + (G[int(t)] * x).sum() for t in tasks or "01"}

    arrows, method = [], detente.AutoLambda(lr=0.01)
    for k in range(1, 101):
        detente.step(closure, optimizer, method)
        assert x.grad is not None
        if k in (1, 100):
            arrows.append((f"step {k}", x.grad.clone()))
    return arrows


def dtp() -> Arrows:
    method = detente.DTP()
    method.observe_metrics({"0": 0.7, "1": 0.5})
    return once(method, LOSSES)


def famo() -> Arrows:
    method = detente.FAMO()
    return repeated(method, (1, 100), lambda: method.after_step([0.99 * LOSSES[0], 0.95 * LOSSES[1]]))


def left(name: str) -> tuple[Arrows, str]:
    """The updates of a method for ``G``, and what has to be known of them."""
    losses = f"losses {LOSSES[0]:g} and {LOSSES[1]:g}"
    same = f"the same gradients in every step, {losses}"
    special: dict[str, tuple[Callable[[], Arrows], str]] = {
        "auto_lambda": (auto_lambda, "learning rate of the weights 0.01, the same gradients in every step"),
        "cdtt": (lambda: repeated(detente.CDTT(), (1, 12)), same),
        "db_mtl": (lambda: repeated(detente.DBMTL(), (1, 100)), same),
        "dtp": (dtp, "performance figures 0.7 and 0.5"),
        "dwa": (
            lambda: after_epochs(detente.DWA(), [2.2, 1.0], [2.0, 0.5]),
            "losses of the last two epochs 2.2, 2.0 and 1.0, 0.5",
        ),
        "excess_mtl": (
            lambda: repeated(detente.ExcessMTL(), (1, 100), first=G * torch.tensor([[1.0], [3.0]])),
            "g2 three times as long in step 1, the same gradients after it",
        ),
        "famo": (famo, f"{losses}, which fall by 1% and 5% in every step"),
        "gls": (lambda: once(detente.GLS(), LOSSES), losses),
        "graddrop": (lambda: draws(detente.GradDrop(), 100), "the updates of 100 draws"),
        "gradnorm": (lambda: repeated(detente.GradNorm(), (1, 100)), same),
        "gradvac": (lambda: repeated(detente.GradVac(), (1, 2, 10)), "the same gradients in every step"),
        "imtl": (lambda: repeated(detente.IMTL(), (1, 100)), same),
        "imtl_l": (lambda: repeated(detente.IMTLL(), (1, 100)), same),
        "loss_power": (lambda: after_epochs(detente.LossPower(), LOSSES), f"{losses} in the last epoch"),
        "moco": (lambda: repeated(detente.MoCo(), (1, 100)), "the same gradients in every step"),
        "modo": (lambda: repeated(detente.MoDo(), (1, 100)), "the same gradients in every step"),
        "rlw": (lambda: draws(detente.RLW(), 12), "the updates of 12 draws"),
        "si": (lambda: once(detente.SI(), LOSSES), losses),
        "stch": (
            lambda: after_epochs(detente.STCH(warmup=0), [4.0, 0.6]),
            f"{losses}, nadirs 4 and 0.6",
        ),
        "uw": (lambda: repeated(detente.UW(), (1, 100)), same),
        "wpcgrad": (lambda: draws(detente.WPCGrad(), 20), "the updates of 20 draws"),
    }
    arrows, note = special.get(name, (lambda: once(detente.get_method(name)), ""))
    return arrows(), note


# ---------------------------------------------------------------------------------------------------------------------
# Right: the toy problem


def build(name: str) -> Method:
    """The method with its defaults; epochs end after ``EPOCH`` steps."""
    options: dict[str, dict[str, Any]] = {
        "dwa": {"window": EPOCH},
        "loss_power": {"window": EPOCH},
        "stch": {"window": EPOCH},
    }
    return detente.get_method(name, **options.get(name, {}))


def update(method: Method, jacobian: Tensor, losses: Tensor) -> Tensor:
    """What :func:`detente.aggregate` does, without its checks."""
    context = Context(toy.NAMES, losses=losses)
    if isinstance(method, LossWeighting):
        return method.weights(losses, context) @ jacobian
    assert isinstance(method, GramianMethod)
    rows = jacobian.clone()
    if method.own_weighting is not None:
        rows *= method.own_weighting.weights(losses, context)[:, None]
    if method.transforms:
        method.transform([rows], context)
    return method.weights(rows @ rows.T, context) @ rows


class Runner:
    """A method on all starts: one instance for all where starts cannot mix, else one per start."""

    def __init__(self, name: str) -> None:
        self.method = build(name)
        self.alone = self.method.needs <= {"gramian"} and not (
            isinstance(self.method, GramianMethod) and (self.method.transforms or self.method.own_weighting)
        )
        self.each = [] if self.alone else [build(name) for _ in toy.STARTS]
        self.first: Tensor | None = None
        self.steps = 0

    def __call__(self, jacobian: Tensor, losses: Tensor, moving: np.ndarray) -> Tensor:
        """Updates ``[starts, 2]`` from gradients ``[starts, losses, 2]``, of the starts that are ``moving``."""
        if self.alone:
            gramian = jacobian @ jacobian.transpose(-1, -2)
            if isinstance(self.method, GramianMethod):
                weights = self.method.weights(gramian, Context(toy.NAMES))
            else:
                assert isinstance(self.method, LossWeighting)
                weights = self.method.weights(torch.ones(2).double()).expand(len(jacobian), -1)
            return (weights[:, None] @ jacobian)[:, 0]
        self.first = losses if self.first is None else self.first
        found = torch.zeros_like(losses)
        for k in np.flatnonzero(moving):
            method = self.each[k]
            if isinstance(method, detente.FAMO) and self.steps:
                method.after_step(losses[k])
            elif isinstance(method, detente.DTP) and self.steps % EPOCH == 0 and self.steps:
                done = (1 - losses[k] / self.first[k]).clamp(0, 1)
                method.observe_metrics(dict(zip(toy.NAMES, done.tolist(), strict=True)))
            found[k] = update(method, jacobian[k], losses[k])
        self.steps += 1
        return found


def trajectories(names: Sequence[str], steps: int) -> dict[str, np.ndarray]:
    """Paths ``[points, starts, 2]``; a point that has arrived and rests is not computed further."""
    runners = [Runner(name) for name in names]
    starts = torch.tensor(toy.STARTS, dtype=torch.float64)
    x = starts.expand(len(names), -1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=RATE, foreach=False)
    paths, before = [], x.detach().numpy().copy()
    moving = np.ones(before.shape[:2], dtype=bool)
    for step in range(steps):
        where = x.detach().numpy()
        if step % EPOCH == 0 and step:
            moving &= ~rests(before, where)
            before = where.copy()
        if step % max(steps // KEPT, 1) == 0:
            paths.append(where.copy())
        jacobian = torch.from_numpy(toy.gradients_at(where))
        losses = torch.from_numpy(toy.losses_at(where)) + SHIFT
        x.grad = torch.zeros_like(x)
        for m, runner in enumerate(runners):
            if moving[m].any():
                x.grad[m] = runner(jacobian[m], losses[m], moving[m])
        optimizer.step()
    paths.append(x.detach().numpy().copy())
    return {name: np.stack([path[m] for path in paths]) for m, name in enumerate(names)}


def rests(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Which points lie on the Pareto set and have hardly moved in an epoch."""
    arrived = (np.abs(now[..., 0]) <= 7.05) & (np.abs(now[..., 1] + 8.395) <= 0.05)
    return arrived & (np.abs(now - before).max(-1) < 5e-3)


class ToySession:
    """The toy as a method with steps of its own sees it: see :class:`detente.method.Session`."""

    tasks = toy.NAMES

    def __init__(self, start: Sequence[float]) -> None:
        self.x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.x], lr=RATE, foreach=False)

    def losses(self) -> dict[str, Tensor]:
        return dict(zip(toy.NAMES, torch.from_numpy(toy.losses_at(self.x.detach().numpy())), strict=True))

    def values(self) -> dict[str, float]:
        return {task: float(loss) for task, loss in self.losses().items()}

    def gradients(self, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[Tensor | None]:
        rows = torch.from_numpy(toy.gradients_at(self.x.detach().numpy()))
        return [torch.tensor([weights[task] for task in toy.NAMES], dtype=torch.float64) @ rows]

    def virtual_step(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [-RATE * g for g in gradients]

    def rates(self) -> list[float]:
        return [RATE]

    @contextmanager
    def moved(self, directions: Sequence[Tensor], length: float = 1.0) -> Iterator[None]:
        before = self.x.detach().clone()
        with torch.no_grad():
            self.x.add_(directions[0], alpha=length)
        yield
        with torch.no_grad():
            self.x.copy_(before)

    def resolve(self) -> Update:
        values = torch.stack(list(self.losses().values()))
        weights = self.method.weights(values, Context(toy.NAMES))
        self.x.grad = weights @ torch.from_numpy(toy.gradients_at(self.x.detach().numpy()))
        return Update(dict(zip(toy.NAMES, weights, strict=True)), None, {})

    def descend(self) -> None:
        self.optimizer.step()

    def run(self, method: LossWeighting, steps: int) -> np.ndarray:
        self.method = method
        path, before, moving = [], self.x.detach().numpy().copy(), True
        for step in range(steps):
            now = self.x.detach().numpy().copy()
            if step % max(steps // KEPT, 1) == 0:
                path.append(now)
            if step % EPOCH == 0 and step:
                moving, before = moving and not rests(before, now), now
            if moving:
                method.take_step(self)  # type: ignore[arg-type]
        return np.stack([*path, self.x.detach().numpy().copy()])


def all_trajectories(names: Sequence[str], steps: int) -> dict[str, np.ndarray]:
    plain = [name for name in names if name not in ("auto_lambda", "connection_strength")]
    found = trajectories(plain, steps) if plain else {}
    if "auto_lambda" in names:
        found["auto_lambda"] = np.stack(
            [ToySession(start).run(detente.AutoLambda(), steps) for start in toy.STARTS], axis=1
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Connection strength works on the channels of a model


def protected() -> Tensor:
    """``[owner, 2]``: the updates of two channels with the gradients ``G``, the first owned by task 1."""
    trunk = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2)).double()
    trunk = detente.nn.convert_task_norm(trunk, ["1", "2"])
    norms: Any = trunk[1]
    with torch.no_grad():
        trunk[0].weight.fill_(1.0)
        norms["1"].weight.copy_(torch.tensor([2.0, 1.0]))
        norms["2"].weight.copy_(torch.tensor([1.0, 2.0]))
    weight = trunk[0].weight
    detente.backward({t: (weight @ G[int(t) - 1]).sum() for t in "12"}, detente.ConnectionStrength(trunk, phase=2))
    assert weight.grad is not None
    return weight.grad


def strengths() -> Tensor:
    """``[tasks, channels]`` after 300 steps of phase 1 on two regressions, each on half of the inputs."""
    torch.manual_seed(1)
    trunk = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.BatchNorm1d(12), torch.nn.ReLU())
    trunk = detente.nn.convert_task_norm(trunk, ["1", "2"])
    heads = torch.nn.ModuleDict({task: torch.nn.Linear(12, 1) for task in "12"})
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.01)
    method = detente.ConnectionStrength(trunk, phase=1)
    for _ in range(300):
        x = torch.randn(64, 8)
        targets = {"1": x[:, :4].sin().sum(1), "2": x[:, 4:].sin().sum(1)}

        def closure(tasks: Any = None, x: Tensor = x, targets: Any = targets) -> dict[str, Tensor]:
            losses = {}
            for task in tasks or "12":
                with detente.nn.active_task(task):
                    losses[task] = (heads[task](trunk(x))[:, 0] - targets[task]).square().mean()
            return losses

        detente.step(closure, optimizer, method)
    return method.pairs[0].strengths(["1", "2"])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def arrow(ax: Axes, tip: Any, color: str, width: float, start: Any = (0, 0), **style: Any) -> None:
    head = {"head_length": 2.2 + 1.6 * width, "head_width": 1.1 + 0.8 * width}
    options = ",".join(f"{key}={value}" for key, value in head.items())
    properties = {"arrowstyle": f"-|>,{options}", "mutation_scale": 1, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", tip, start, arrowprops=properties | {"color": color, "linewidth": width} | style)


def label(ax: Axes, tip: Any, text: str, color: str, size: float = 9, side: str = "") -> None:
    """A text beyond the tip of an arrow from 0; beside 0 where the arrow is too short."""
    tip = np.asarray(tip, dtype=float)
    length = float(np.hypot(*tip))
    if length < 0.4:
        ax.text(-0.1, -0.17, text, color=color, fontsize=size, ha="right", va="center")
        return
    away = tip / length
    side = side or ("left" if away[0] > 0.3 else "right" if away[0] < -0.3 else "center")
    ax.text(*(tip + 0.17 * away), text, color=color, fontsize=size, ha=side, va="center")


def plane(ax: Axes, room: Sequence[float] = (-1.45, 2.75, -0.85, 2.82)) -> None:
    """The two gradients, the mean, and the directions that help both tasks."""
    angles = np.degrees(np.arctan2(*G.numpy().T[::-1]))
    ax.add_patch(Wedge((0, 0), 9, angles[1] - 90, angles[0] + 90, facecolor="#e8f1ea", edgecolor="none", zorder=0))
    ax.plot(0, 0, "o", color=INK, markersize=2.5)
    for g, color in zip(G.numpy(), (FIRST, SECOND), strict=True):
        arrow(ax, g, color, 1.8)
    ax.text(2.1, 0.16, "g1", color=FIRST, fontsize=10)  # below the tip: updates are labelled above
    label(ax, G[1].numpy(), "g2", SECOND, 10)
    ax.set_aspect("equal", anchor="N")
    ax.set_xlim(*room[:2])
    ax.set_ylim(*room[2:])
    ax.axis("off")


def draw_left(ax: Axes, arrows: Arrows) -> str:
    """Draw the updates; say how their length is drawn."""
    plane(ax)
    ax.text(-0.44, 2.62, "helps both", color="#3c7a4c", fontsize=8)
    mean = G.mean(0).numpy()
    hidden = any(float(torch.cosine_similarity(d, G.mean(0), dim=0)) > 0.998 for _, d in arrows)
    beside = 0.1 * np.array([mean[1], -mean[0]]) / np.hypot(*mean) if hidden else np.zeros(2)
    arrow(ax, mean + beside, GREY, 0.8, beside, linestyle=(0, (3, 2)))
    ax.text(-1.4, -0.75, "dashed: mean of g1 and g2", color=GREY, fontsize=8)
    longest = max(float(d.norm()) for _, d in arrows)
    factor = 1.0 if 0.6 < longest < 2.6 else 1.7 / longest
    named = len(arrows) == 1 or bool(arrows[0][0])
    placed: list[tuple[np.ndarray, list[str]]] = []
    for k, (text, d) in enumerate(arrows):
        tip = factor * d.numpy()
        faint = named and k < len(arrows) - 1
        arrow(ax, tip, "#555555" if faint else INK, 1.2 if faint or not named else 2.2)
        near = [texts for place, texts in placed if np.hypot(*(place - tip)) < 0.16]
        if near:
            near[0].append(text.replace("step ", ""))
        elif text:
            placed.append((tip, [text]))
    for tip, texts in placed:
        joined = ", ".join(texts)
        crowded = any(0 < np.hypot(*(other - tip)) < 0.5 and other[0] > tip[0] for other, _ in placed)
        words = joined if len(texts) == 1 else joined.replace("step", "steps", 1)
        label(ax, tip, words, INK, side="right" if crowded else "")
    return "" if factor == 1 else f", drawn {factor:.2g} times as long"


OUTCOMES = {"optimum": "best mean", "front": "Pareto set", "under way": "under way", "stuck": "stuck", "nan": "NaN"}


def ends(path: np.ndarray) -> str:
    """``ends: 2 best mean, 3 stuck``."""
    found = [toy.outcome(x) if np.isfinite(x).all() else "nan" for x in path[-1]]
    return "ends: " + ", ".join(f"{found.count(o)} {words}" for o, words in OUTCOMES.items() if o in found)


def draw_toy(ax: Axes, path: np.ndarray) -> None:
    from contourpy import contour_generator

    axis = np.linspace(-11, 11, 181)
    mean = toy.losses_at(np.stack(np.meshgrid(axis, axis), axis=-1)).mean(-1)
    lines = contour_generator(axis, axis, mean)
    for level in np.linspace(-19, 6, 11):
        for line in lines.lines(level):
            ax.plot(*np.asarray(line).T, color="#b9c6d3", linewidth=0.6, zorder=1)
    ax.plot([-7, 7], [toy.OPTIMUM[1]] * 2, color="#8f8f8f", linewidth=4, solid_capstyle="round", zorder=2)
    for k in range(path.shape[1]):
        ax.plot(*path[:, k].T, color=PATH, linewidth=1.5, zorder=3)
        ax.plot(*path[0, k], "o", color=INK, markersize=4, zorder=4)
        sound = path[np.isfinite(path[:, k]).all(-1), k]
        if len(sound) < len(path):
            ax.plot(*sound[-1], "x", color=INK, markersize=7, markeredgewidth=2, zorder=5)
        else:
            ax.plot(*sound[-1], "s", color=PATH, markeredgecolor=INK, markersize=5.5, zorder=5)
    ax.plot(*toy.OPTIMUM, "*", color="#f0e442", markeredgecolor=INK, markeredgewidth=0.7, markersize=10, zorder=6)
    ax.text(-6.2, -10.2, "Pareto set", color="#5f5f5f", fontsize=8, ha="center")
    ax.text(0, -10.2, "best mean", color=INK, fontsize=8, ha="center")
    ax.text(9, 9.7, "start", color=INK, fontsize=8, ha="center")
    frame(ax)


def frame(ax: Axes) -> None:
    ax.set_xlim(-11, 11)
    ax.set_ylim(-11, 11)
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_color("#c8c8c8")


def panels() -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(7, 3.45))
    return figure, figure.add_axes((0.01, 0.02, 0.49, 0.87)), figure.add_axes((0.545, 0.02, 0.445, 0.87))


def heading(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=9.5 if len(text) < 44 else 8, color=INK, pad=5)


def draw(name: str, path: np.ndarray) -> tuple[Figure, str]:
    """The picture of a method, and its caption."""
    figure, one, two = panels()
    arrows, note = left(name)
    length = draw_left(one, arrows)
    drawn = note if not arrows[0][0] else "the update d" if len(arrows) == 1 else "the updates"
    heading(one, f"two gradients and {drawn}")
    draw_toy(two, path)
    heading(two, ends(path))
    seen = [] if np.isfinite(path).all() else ["crosses: the update became NaN"]
    if not Runner(name).alone and name not in ("auto_lambda", "excess_mtl", "graddrop", "moco"):
        seen.append(f"the method sees losses + {SHIFT:g}")
    if name == "dtp":
        seen.append("its figures are 1 - loss / first loss")
    if name in ("dtp", "dwa", "loss_power", "stch"):
        seen.append(f"an epoch is {EPOCH:,} steps")
    caption = (
        f"Left: two conflicting gradients and what {registry()[name].__name__} makes of them"
        f"{length}{f' ({note})' if note else ''}; the update is subtracted. "
        f"Right: {STEPS:,} steps of Adam at rate {RATE:g} on the toy of the CAGrad paper (there 100,000 at 0.001) over "
        f"the mean loss; dots: starts, squares: ends{''.join(f'; {text}' for text in seen)}."
    )
    return figure, caption


def draw_connection_strength() -> tuple[Figure, str]:
    figure, one, two = panels()
    one.remove()
    figure.text(0.255, 0.91, "the same two gradients on two channels", color=INK, fontsize=9.5, ha="center")
    for k, d in enumerate(protected().numpy()):
        ax = figure.add_axes((0.005, 0.46 - 0.45 * k, 0.28, 0.42))
        plane(ax, (-1.35, 2.95, -0.35, 2.9))
        arrow(ax, d, INK, 2.2)
        label(ax, d, "d", INK)
        ax.text(-0.1, 2.5, "helps both", color="#3c7a4c", fontsize=8)
        words = f"channel of task {k + 1}:\ng{k + 1} stays whole,\ng{2 - k} loses what\nconflicts with it"
        figure.text(0.3, 0.67 - 0.45 * k, words, color=(FIRST, SECOND)[k], fontsize=9, va="center", linespacing=1.5)
    ax = two
    found = strengths()
    order = (found[0] - found[1]).argsort(descending=True)
    places = np.arange(len(order))
    for task, color in enumerate((FIRST, SECOND)):
        heights = found[task, order].numpy()
        for p, height in zip(places, heights, strict=True):
            ax.add_patch(Rectangle((p - 0.38 + 0.38 * task, 0), 0.36, height, facecolor=color, edgecolor="none"))
    top = float(found.max())
    first = int((found[0] >= found[1]).sum())
    ax.axvline(first - 0.5, ymax=0.88, color=GREY, linewidth=0.8, linestyle=(0, (3, 2)))
    ax.text((first - 1) / 2, 1.06 * top, "owned by task 1", color=FIRST, fontsize=9, ha="center")
    ax.text((first + len(order) - 1) / 2, 1.06 * top, "owned by task 2", color=SECOND, fontsize=9, ha="center")
    ax.set_xlim(-0.7, len(order) - 0.3)
    ax.set_ylim(0, 1.16 * top)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("channels of a layer", fontsize=8.5, labelpad=4)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.set_position((0.545, 0.09, 0.445, 0.80))
    heading(ax, "strength of each channel for both tasks")
    caption = (
        "Left: the update d of two channels with the same conflicting gradients in phase 2: the owner's gradient stays "
        "whole; shaded: directions that help both tasks. Right: connection strengths of the twelve channels of a small "
        "layer after 300 steps of phase 1 on two regressions; the larger bar owns the channel."
    )
    return figure, caption


def save(figure: Figure, caption: str, path: Path) -> None:
    """An SVG without dates, with two decimals, and with its caption as title."""
    settings = {"svg.hashsalt": "detente", "svg.fonttype": "none", "path.simplify_threshold": 0.5}
    with matplotlib.rc_context(settings):
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Title": caption})
    head, mark, body = path.read_text().partition("</metadata>")
    # points of lines to a tenth of a unit, all else to a hundredth
    body = re.sub(r"^([ML]) (-?\d+\.?\d*) (-?\d+\.?\d*) *$", short, body, flags=re.MULTILINE)
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body).replace("\nL", "L")
    path.write_text("\n".join(line.strip() for line in (head + mark + body).splitlines()) + "\n")


def short(found: re.Match[str]) -> str:
    return f"{found[1]}{float(found[2]):.1f} {float(found[3]):.1f}"


def main() -> int:
    names = sys.argv[1:] or sorted(registry())
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    paths = all_trajectories(names, STEPS)
    for name in names:
        figure, caption = draw(name, paths[name]) if name in paths else draw_connection_strength()
        save(figure, caption, OUT / f"{name}.svg")
    for path in OUT.glob("*.svg"):
        if path.stem not in registry():
            path.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

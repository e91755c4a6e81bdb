"""Bad input: every row says what is raised and which words the message must hold, and that nothing was written.

Each row is a call on a fresh world: a small network with gradients in ``.grad``, an optimizer with momentum, and
methods that have seen a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import detente
from detente.method import Context
from states import plain

TASKS = ("a", "b", "c")


class World:
    """What a wrong call could damage, with a snapshot of all of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        detente.nn.convert_task_norm(self.trunk, TASKS)
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in TASKS})
        self.net = nn.ModuleDict({"trunk": self.trunk, "heads": self.heads})
        self.x, self.y = torch.randn(9, 4), torch.randn(9, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.kept: list[nn.Module | detente.Sampled] = []
        self.before: Any = None
        sum(self.losses().values()).backward()
        self.optimizer.step()

    def losses(self, **changes: Any) -> dict[str, Any]:
        losses: dict[str, Any] = {}
        for t in TASKS:
            with detente.nn.active_task(t):
                losses[t] = (self.heads[t](self.trunk(self.x)) - self.y).square().mean()
        return losses | {t: change(losses.get(t)) for t, change in changes.items()}

    def keep(self, method: Any, steps: int = 3) -> Any:
        """``method`` with some steps behind it, and under watch."""
        G = torch.randn(3, 5, dtype=torch.float64) @ torch.randn(5, 3, dtype=torch.float64)
        for _ in range(steps):
            values = torch.rand(3, dtype=torch.float64) + 0.1
            if isinstance(method, detente.GramianMethod) and "model" not in method.needs:
                method.weights(G @ G.T, Context(TASKS, losses=values))
            elif isinstance(method, detente.LossWeighting):
                method.weights(values, Context(TASKS))
        self.kept.append(method)
        return method

    def stepped(self, method: Any, **options: Any) -> Any:
        """``method`` with a real step behind it, and under watch: for those that keep gradients or blocks."""
        detente.backward(self.losses(), method, **options)
        self.kept.append(method)
        return method

    def snapshot(self, gradients: bool) -> Any:
        # running statistics of the norms follow the forward pass, which is the caller's own
        values = dict(self.net.named_parameters())
        grads = {name: p.grad for name, p in values.items()} if gradients else None
        states = [plain(kept.state_dict()) for kept in self.kept]
        return copy.deepcopy((plain(values), plain(grads), states, plain(self.optimizer.state_dict())))


class Row(NamedTuple):
    call: Callable[[World], Any]
    error: type[Exception]
    words: tuple[str, ...]  # the offending thing, and the fix


def backward(w: World, losses: Any = None, method: Any = None, **options: Any) -> Any:
    losses = w.losses() if losses is None else losses
    method = w.keep(detente.CAGrad()) if method is None else method
    w.before = w.snapshot(gradients=True)
    return detente.backward(losses, method, **options)


def step(w: World, closure: Any, method: Any, **options: Any) -> Any:
    w.before = w.snapshot(gradients=False)  # a step begins with zero_grad
    return detente.step(closure, w.optimizer, method, **options)


def aggregate(w: World, jacobian: Any, method: Any, **options: Any) -> Any:
    w.before = w.snapshot(gradients=True)
    return detente.aggregate(jacobian, method, **options)


def build(w: World, call: Callable[..., Any], *kept: Any) -> Any:
    w.before = w.snapshot(gradients=True)
    return call(*kept)


def load(w: World, method: detente.Method, state: Any) -> Any:
    w.before = w.snapshot(gradients=True)
    return method.load_state_dict(state)


def worth(value: float) -> Callable[[Tensor], Tensor]:
    return lambda loss: loss * 0 + value


J = torch.arange(6.0).reshape(2, 3)
V, T, R, F = ValueError, TypeError, RuntimeError, FloatingPointError

ROWS: dict[str, Row] = {
    # losses
    "vector loss": Row(
        lambda w: backward(w, w.losses(b=lambda loss: loss.expand(8))), V, ("losses['b']", "scalar", "(8,)", ".mean()")
    ),
    "empty tensor as loss": Row(
        lambda w: backward(w, w.losses(b=lambda _: torch.zeros(0))), V, ("losses['b']", "(0,)")
    ),
    "loss without graph": Row(
        lambda w: backward(w, w.losses(b=Tensor.detach)), V, ("losses['b']", "no autograd graph", "no_grad")
    ),
    "loss as a number": Row(
        lambda w: backward(w, w.losses(b=lambda loss: loss.detach().item())), T, ("losses['b']", "float", ".item()")
    ),
    "loss is None": Row(lambda w: backward(w, w.losses(c=lambda _: None)), T, ("losses['c']", "NoneType")),
    "integer loss": Row(
        lambda w: backward(w, w.losses(a=lambda _: torch.tensor(3))), T, ("losses['a']", "floating", "torch.int64")
    ),
    "complex loss": Row(
        lambda w: backward(w, w.losses(a=lambda loss: loss * 1j)), T, ("losses['a']", "real", "complex64")
    ),
    "NaN loss": Row(
        lambda w: backward(w, w.losses(b=worth(math.nan))),
        F,
        ("losses['b']", "nan", "Nothing was written", "get_scale()"),
    ),
    "infinite loss": Row(
        lambda w: backward(w, w.losses(b=worth(math.inf))), F, ("losses['b']", "inf", "learning rate")
    ),
    "NaN loss for a loss weighting": Row(
        lambda w: backward(w, w.losses(b=worth(math.nan)), w.keep(detente.UW())), F, ("losses['b']", "nan")
    ),
    "NaN loss before a history": Row(
        lambda w: backward(w, w.losses(b=worth(math.nan)), w.keep(detente.CDTT()), weighting=w.keep(detente.DWA())),
        F,
        ("losses['b']", "nan"),
    ),
    "NaN loss before a draw": Row(
        lambda w: backward(
            w,
            w.losses(b=worth(math.nan)),
            w.keep(detente.CAGrad(preference=detente.UW())),
            source=w.keep(detente.Sampled(1)),
        ),
        F,
        ("losses['b']", "nan"),
    ),
    "no losses": Row(lambda w: backward(w, {}), V, ("losses is empty", "at least one")),
    "an empty list of losses": Row(lambda w: backward(w, []), V, ("losses is empty",)),
    "the sum instead of the losses": Row(
        lambda w: backward(w, sum(w.losses().values())), T, ("Tensor", "dict", "not their sum")
    ),
    "stacked losses": Row(lambda w: backward(w, torch.stack([*w.losses().values()])), T, ("Tensor", "separately")),
    "a generator of losses": Row(lambda w: backward(w, iter(w.losses().values())), T, ("losses", "sequence")),
    "task names that are not strings": Row(
        lambda w: backward(w, dict(enumerate(w.losses().values()))), T, ("task names must be strings", "0")
    ),
    # method
    "method class instead of an instance": Row(
        lambda w: backward(w, method=detente.CAGrad), T, ("CAGrad", "forget to build it", "CAGrad()")
    ),
    "method by name": Row(lambda w: backward(w, method="cagrad"), T, ("'cagrad'", "method of detente")),
    "class given to step": Row(
        lambda w: step(w, lambda tasks=None: w.losses(), detente.CAGrad), T, ("CAGrad", "build it")
    ),
    "class given to aggregate": Row(lambda w: aggregate(w, J, detente.CAGrad), T, ("CAGrad", "build it")),
    "name given to aggregate": Row(lambda w: aggregate(w, J, "cagrad"), T, ("'cagrad'", "method of detente")),
    "unknown method": Row(
        lambda w: build(w, lambda: detente.get_method("cagard")), V, ("'cagard'", "'cagrad'", "pcgrad")
    ),
    "unknown option": Row(
        lambda w: build(w, lambda: detente.get_method("cagrad", d=1)), T, ("cagrad", "no option 'd'", "rescale")
    ),
    "cite an unknown method": Row(
        lambda w: build(w, lambda: detente.cite("nashmtl")), V, ("'nashmtl'", "Known methods")
    ),
    # options of the methods
    "negative c": Row(lambda w: build(w, lambda: detente.CAGrad(c=-0.1)), V, ("c must be", ">= 0", "-0.1")),
    "c is NaN": Row(lambda w: build(w, lambda: detente.CAGrad(c=math.nan)), V, ("c must be", "nan")),
    "rescale 3": Row(lambda w: build(w, lambda: detente.CAGrad(rescale=3)), V, ("rescale", "1 or 2", "3")),
    "negative alpha": Row(lambda w: build(w, lambda: detente.CDTT(alpha=-1)), V, ("alpha must be", ">= 0", "-1")),
    "window 0": Row(lambda w: build(w, lambda: detente.CDTT(window=0)), V, ("window must be", ">= 1", "0")),
    "temperature 0": Row(lambda w: build(w, lambda: detente.DWA(temperature=0)), V, ("temperature", "> 0")),
    "learning rate 0": Row(lambda w: build(w, lambda: detente.UW(lr=0)), V, ("lr", "> 0")),
    "momentum 2": Row(lambda w: build(w, lambda: detente.DTP(momentum=2)), V, ("momentum", "2")),
    "metric out of range": Row(
        lambda w: build(w, lambda method: method.observe_metrics({"a": 0.5, "b": 40.0}), w.keep(detente.DTP())),
        V,
        ("'b'", "[0, 1]", "40", "Normalise"),
    ),
    "unknown mode": Row(
        lambda w: build(w, lambda: detente.WPCGrad(mode="sequenz")), V, ("mode", "'sequenz'", "'sequence'", "'anchor'")
    ),
    "unknown reduction": Row(
        lambda w: build(w, lambda: detente.PCGrad(reduction="max")), V, ("reduction", "'sum'", "'max'")
    ),
    "unknown zero_rows": Row(
        lambda w: build(w, lambda: detente.EDM(zero_rows="no")), V, ("zero_rows", "'drop'", "'no'")
    ),
    "unknown heads": Row(lambda w: build(w, lambda: detente.EDM(heads="both")), V, ("heads", "'own'", "'both'")),
    "priority that does not sum to 1": Row(
        lambda w: build(w, lambda: detente.WPCGrad(priority=[0.5, 0.6])), V, ("priority", "sum to 1", "1.1", "Divide")
    ),
    "negative preference": Row(
        lambda w: build(w, lambda: detente.CAGrad(preference=[1.5, -0.5])), V, ("preference", "non-negative", "-0.5")
    ),
    "negative weight": Row(
        lambda w: build(w, lambda: detente.GD(weights=[1, -1])), V, ("weights", "non-negative", "-1")
    ),
    # tasks
    "unknown task in a priority mapping": Row(
        lambda w: backward(w, method=w.keep(detente.WPCGrad(priority={"a": 0.5, "depth": 0.5}), 0)),
        V,
        ("priority", "'b'", "['a', 'depth']", "Add"),
    ),
    "unknown task in a preference mapping": Row(
        lambda w: backward(w, method=w.keep(detente.CAGrad(preference={"a": 1.0}), 0)),
        V,
        ("preference", "'b'", "['a']"),
    ),
    "unknown task in a weights mapping": Row(
        lambda w: backward(w, method=w.keep(detente.GD(weights={"a": 1.0}), 0)), V, ("weights", "'b'", "['a']")
    ),
    "unknown task with sampling": Row(
        lambda w: backward(
            w, method=w.keep(detente.CAGrad(preference={"a": 1.0}), 0), source=w.keep(detente.Sampled(1))
        ),
        V,
        ("preference", "'b'"),
    ),
    "preference of the wrong length": Row(
        lambda w: backward(w, method=w.keep(detente.CAGrad(preference=[0.5, 0.5]), 0)),
        V,
        ("preference", "2 entries", "3 tasks", "mapping by task name"),
    ),
    "weighting of the wrong length": Row(
        lambda w: backward(w, method=w.keep(detente.CDTT()), weighting=w.keep(detente.GD(weights=[1.0, 2.0]), 0)),
        V,
        ("weights", "2 entries", "3 tasks"),
    ),
    "a bad method behind a good weighting": Row(
        lambda w: backward(w, method=detente.CAGrad(preference=[1.0]), weighting=w.keep(detente.DWA())),
        V,
        ("preference",),
    ),
    # losses that a method cannot take
    "negative loss for GLS": Row(
        lambda w: backward(w, w.losses(b=worth(-1.0)), w.keep(detente.GLS())),
        V,
        ("gls", "losses['b']", "-1", "Add a constant"),
    ),
    "zero loss for GLS": Row(
        lambda w: backward(w, w.losses(b=worth(0.0)), w.keep(detente.GLS())), V, ("gls", "losses['b']", "0")
    ),
    "negative loss for LossPower": Row(
        lambda w: backward(w, w.losses(c=worth(-2.0)), w.keep(detente.LossPower())),
        V,
        ("loss_power", "losses['c']", "-2"),
    ),
    "negative loss for LossPower in wPCGrad": Row(
        lambda w: backward(w, w.losses(c=worth(-2.0)), w.keep(detente.WPCGrad(priority=detente.LossPower()))),
        V,
        ("loss_power", "losses['c']", "-2"),
    ),
    "negative loss for LossPower as weighting": Row(
        lambda w: backward(w, w.losses(c=worth(-2.0)), w.keep(detente.CDTT()), weighting=w.keep(detente.LossPower())),
        V,
        ("losses['c']", "-2"),
    ),
    "negative loss for CDTT": Row(
        lambda w: backward(w, w.losses(b=worth(-1.0)), w.keep(detente.CDTT())),
        V,
        ("cdtt", "losses['b']", "-1", "Add a constant"),
    ),
    "other blocks for CDTT": Row(
        lambda w: backward(w, method=w.keep(detente.CDTT()), granularity="layer"),
        V,
        ("cdtt", "'a'", "blocks", "reset()"),
    ),
    "other blocks for CDTT after a new task": Row(
        lambda w: backward(w, {"new": w.losses()["a"] * 2} | w.losses(), w.keep(detente.CDTT()), granularity="layer"),
        V,
        ("cdtt", "'a'", "blocks", "reset()"),
    ),
    "other blocks for CDTT behind a weighting": Row(
        lambda w: backward(w, method=w.keep(detente.CDTT()), granularity="layer", weighting=w.keep(detente.UW())),
        V,
        ("cdtt", "'a'", "blocks"),
    ),
    "negative loss for GradNorm": Row(
        lambda w: backward(w, w.losses(b=worth(-1.0)), w.stepped(detente.GradNorm())),
        V,
        ("gradnorm", "losses['b']", "-1", "Add a constant"),
    ),
    "negative loss for MGDA normalised by losses": Row(
        lambda w: backward(w, w.losses(b=worth(-1.0)), detente.MGDA("loss"), weighting=w.keep(detente.DWA())),
        V,
        ("mgda", "losses['b']", "-1", "'l2'"),
    ),
    "negative loss for DB-MTL": Row(
        lambda w: backward(w, w.losses(c=worth(-2.0)), w.stepped(detente.DBMTL())), V, ("losses['c']", "-2")
    ),
    "negative loss for IMTL": Row(
        lambda w: backward(w, w.losses(c=worth(-2.0)), w.stepped(detente.IMTL())), V, ("losses['c']", "-2")
    ),
    "loss below the minimum for FAMO": Row(
        lambda w: backward(w, w.losses(b=worth(0.2)), w.keep(detente.FAMO(minimum={"b": 0.5}), 0)),
        V,
        ("famo", "losses['b']", "0.2", "0.5", "minimum="),
    ),
    # histories that do not fit
    "other blocks for GradVac behind a weighting": Row(
        lambda w: backward(
            w, method=w.stepped(detente.GradVac()), granularity="layer", weighting=w.keep(detente.DWA(window=2))
        ),
        V,
        ("gradvac", "blocks", "reset()"),
    ),
    "other blocks for MoDo behind a weighting": Row(
        lambda w: backward(
            w,
            method=w.stepped(detente.MoDo(heads="own")),
            granularity="layer",
            weighting=w.keep(detente.DWA(window=2)),
        ),
        V,
        ("modo", "blocks", "reset()"),
    ),
    **{
        f"other blocks for {name}": Row(
            lambda w, method=method: backward(w, method=w.stepped(method()), granularity="layer"), V, (name, "blocks")
        )
        for name, method in {
            "gradvac": detente.GradVac,
            "modo": lambda: detente.MoDo(heads="own"),
            "moco": lambda: detente.MoCo(heads="own"),
        }.items()
    },
    **{
        f"other shared parameters for {method.name}": Row(
            lambda w, method=method: backward(w, method=w.stepped(method()), shared=[w.trunk[0].weight]),
            V,
            (method.name, "30 shared parameters", "step has 24", "method.reset()"),
        )
        for method in (detente.MoCo, detente.DBMTL, detente.ExcessMTL)
    },
    "other shared parameters for MoCo behind a weighting": Row(
        lambda w: backward(
            w, method=w.stepped(detente.MoCo()), shared=[w.trunk[0].weight], weighting=w.keep(detente.DWA(window=2))
        ),
        V,
        ("moco", "shared parameters"),
    ),
    "layer of GradNorm that is not shared": Row(
        lambda w: backward(w, method=w.keep(detente.GradNorm(layer=w.heads["a"].weight), 0)),
        V,
        ("gradnorm", "`layer`", "model.trunk"),
    ),
    # options of backward
    "unknown granularity": Row(
        lambda w: backward(w, granularity="filter"), V, ("granularity", "'filter'", "layer", "channel")
    ),
    "unknown granularity with one task": Row(
        lambda w: backward(w, {"a": w.losses()["a"]}, granularity="filter"), V, ("granularity", "'filter'")
    ),
    "granularity for a loss weighting": Row(
        lambda w: backward(w, method=w.keep(detente.UW()), granularity="layer"), V, ("uw", "granularity")
    ),
    "sampling for a loss weighting": Row(
        lambda w: backward(w, method=w.keep(detente.UW()), source=w.keep(detente.Sampled(1))), V, ("uw", "source")
    ),
    "weighted heads with blocks": Row(
        lambda w: backward(w, method=w.keep(detente.MGDA()), granularity="layer"),
        V,
        ("mgda", "heads='own'", "granularity='model'"),
    ),
    "shared that is no leaf": Row(
        lambda w: backward(w, shared=[w.trunk[0].weight * 2]), V, ("shared[0]", "leaf", "trunk.parameters()")
    ),
    "shared that is frozen": Row(
        lambda w: backward(w, shared=[w.trunk[0].weight, w.x]), V, ("shared[1]", "requires a gradient", "frozen")
    ),
    "shared that is no tensor": Row(lambda w: backward(w, shared=w.net.named_parameters()), V, ("shared[0]", "tuple")),
    "scale 0": Row(lambda w: backward(w, scale=0.0), V, ("scale", "positive", "0.0")),
    "negative scale": Row(lambda w: backward(w, scale=-2.0), V, ("scale", "positive", "-2.0")),
    "infinite scale": Row(lambda w: backward(w, scale=math.inf), V, ("scale", "inf")),
    "unknown source": Row(lambda w: backward(w, source="feature"), V, ("source", "'feature'", "Sampled")),
    "a number as source": Row(lambda w: backward(w, source=2), V, ("source", "2", "Sampled")),
    "Sampled class": Row(lambda w: backward(w, source=detente.Sampled), V, ("source", "Sampled(n)")),
    "Sampled(0)": Row(lambda w: build(w, lambda: detente.Sampled(0)), V, ("n >= 1", "0")),
    "Sampled with a method without a mean": Row(
        lambda w: backward(w, method=w.keep(detente.PCGrad()), source=w.keep(detente.Sampled(1))),
        V,
        ("Sampled", "pcgrad", "cagrad"),
    ),
    "Sampled with a weighting": Row(
        lambda w: backward(w, source=w.keep(detente.Sampled(1)), weighting=w.keep(detente.DWA())),
        V,
        ("Sampled", "weighting", "preference"),
    ),
    "Sampled over tasks without preference": Row(
        lambda w: backward(
            w,
            method=w.keep(detente.CAGrad(preference={"a": 1.0, "b": 0.0, "c": 0.0}), 0),
            source=w.keep(detente.Sampled(1, seed=next(s for s in range(50) if drawn(s) == 0))),
        ),
        V,
        ("Sampled", "positive preference"),
    ),
    "a method as weighting": Row(
        lambda w: backward(w, weighting=w.keep(detente.PCGrad())), T, ("weighting", "loss weighting", "PCGrad")
    ),
    "sparse shared embedding": Row(lambda w: sparse(w), V, ("sparse", "(5, 6)", "sparse=False")),
    "a weighting for a method that has its own": Row(
        lambda w: backward(w, method=w.stepped(detente.DBMTL()), weighting=w.keep(detente.DWA())),
        V,
        ("db_mtl", "(si)", "`weighting`"),
    ),
    "features and listed parameters": Row(
        lambda w: backward(w, source="features", shared=w.trunk.parameters()), V, ("features", "`shared`")
    ),
    "features for a method that follows parameters": Row(
        lambda w: backward(w, method=w.stepped(detente.MoCo()), source="features"), V, ("moco", "source='parameters'")
    ),
    # aggregate and weights
    "jacobian with one dimension": Row(
        lambda w: aggregate(w, J[0], detente.CAGrad()), V, ("jacobian", "[T, P]", "(3,)")
    ),
    "integer jacobian": Row(lambda w: aggregate(w, J.long(), detente.CAGrad()), V, ("jacobian", "floating", "int64")),
    "jacobian without rows": Row(lambda w: aggregate(w, J[:0], detente.CAGrad()), V, ("jacobian", "(0, 3)")),
    "jacobian as a list": Row(lambda w: aggregate(w, J.tolist(), detente.CAGrad()), (T, V), ("jacobian", "list")),
    "losses of the wrong length": Row(
        lambda w: aggregate(w, J, w.keep(detente.CDTT()), losses=[1.0, 2.0, 3.0]), V, ("losses", "(2,)", "(3,)")
    ),
    "losses missing in aggregate": Row(lambda w: aggregate(w, J, w.keep(detente.CDTT())), V, ("cdtt", "losses=[...]")),
    "losses missing for a weighting": Row(lambda w: aggregate(w, J, w.keep(detente.DWA())), V, ("dwa", "losses=[...]")),
    "losses missing for a preference": Row(
        lambda w: aggregate(w, J, w.keep(detente.CAGrad(preference=detente.DWA()))), V, ("dwa", "losses")
    ),
    "gramian that is not square": Row(
        lambda w: build(w, lambda method: method.weights(torch.zeros(2, 3)), w.keep(detente.EDM())),
        V,
        ("gramian", "[*blocks, T, T]", "(2, 3)"),
    ),
    "losses as a matrix": Row(
        lambda w: build(w, lambda method: method.weights(torch.ones(2, 2)), w.keep(detente.DWA())),
        V,
        ("losses", "[T]", "(2, 2)"),
    ),
    # state
    "state of another method": Row(
        lambda w: load(w, w.keep(detente.PCGrad()), detente.RLW().state_dict()),
        V,
        ("pcgrad", "generator", "another method"),
    ),
    "state of a method with other entries": Row(
        lambda w: load(w, w.keep(detente.CDTT()), detente.UW().state_dict()), V, ("cdtt", "history", "log_variances")
    ),
    "state that is none": Row(lambda w: load(w, w.keep(detente.UW()), {"_extra_state": 3}), V, ("uw", "int")),
    # connection strength
    "no task norm in the model": Row(
        lambda w: build(
            w, lambda: detente.ConnectionStrength(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), phase=2)
        ),
        V,
        ("task norm", "convert_task_norm", "pairs="),
    ),
    "no number of epochs": Row(
        lambda w: build(w, lambda: detente.ConnectionStrength(w.trunk)), V, ("epochs=None", "epochs=...", "phase=2")
    ),
    "phase 3": Row(
        lambda w: build(w, lambda: detente.ConnectionStrength(w.trunk, phase=3)), V, ("phase", "1 or 2", "3")
    ),
    "unknown draw": Row(
        lambda w: build(w, lambda: detente.ConnectionStrength(w.trunk, epochs=3, draw="step")),
        V,
        ("draw", "'epoch'", "'step'"),
    ),
    "pair that the model does not have": Row(
        lambda w: build(w, lambda: detente.ConnectionStrength(w.trunk, phase=2, pairs=[("conv", "1")])),
        V,
        ("'conv'", "does not have"),
    ),
    "pair of the wrong kinds": Row(
        lambda w: build(w, lambda: detente.ConnectionStrength(w.trunk, phase=2, pairs=[("1", "0")])),
        V,
        ("pairs", "TaskBatchNorm1d", "Linear"),
    ),
    "pair that does not fit": Row(
        lambda w: build(
            w,
            lambda: detente.ConnectionStrength(
                nn.Sequential(nn.Linear(2, 3), detente.nn.TaskBatchNorm1d(4, TASKS)), phase=2, pairs=[("0", "1")]
            ),
        ),
        V,
        ("0 with 1", "width", "output channels"),
    ),
    "task without a norm": Row(
        lambda w: backward(
            w, w.losses(depth=lambda _: w.losses()["a"] * 2), w.keep(detente.ConnectionStrength(w.trunk, phase=2))
        ),
        V,
        ("'depth'", "no norm", "['a', 'b', 'c']"),
    ),
    "unknown granularity of connection strength": Row(
        lambda w: backward(w, method=w.keep(detente.ConnectionStrength(w.trunk, phase=2)), granularity="filter"),
        V,
        ("granularity", "'filter'", "'layer'"),
    ),
    "connection strength needs step": Row(
        lambda w: backward(w, method=w.keep(detente.ConnectionStrength(w.trunk, epochs=5))),
        R,
        ("detente.step", "phase=2"),
    ),
    "connection strength on a matrix": Row(
        lambda w: aggregate(w, J, w.keep(detente.ConnectionStrength(w.trunk, phase=2))),
        V,
        ("connection_strength", "model"),
    ),
    "connection strength on a Gramian": Row(
        lambda w: build(w, lambda m: m.weights(torch.eye(3)), w.keep(detente.ConnectionStrength(w.trunk, phase=2))),
        V,
        ("connection_strength", "model"),
    ),
    # step
    "closure that ignores tasks": Row(
        lambda w: step(w, lambda tasks=None: w.losses(), w.keep(detente.ConnectionStrength(w.trunk, phase=1))),
        V,
        ("closure(tasks=('a',))", "['a', 'b', 'c']", "named in `tasks`"),
    ),
    "closure that ignores tasks in a drawn phase": Row(
        lambda w: step(
            w, lambda tasks=None: w.losses(), w.keep(detente.ConnectionStrength(w.trunk, epochs=9, draw="batch"))
        ),
        V,
        ("closure(tasks=('a',))",),
    ),
    "closure that returns the sum": Row(
        lambda w: step(w, lambda tasks=None: sum(w.losses().values()), w.keep(detente.CAGrad())),
        T,
        ("Tensor", "not their sum"),
    ),
    "closure with a vector loss": Row(
        lambda w: step(w, lambda tasks=None: w.losses(b=lambda v: v.expand(4)), w.keep(detente.CDTT())),
        V,
        ("losses['b']", "(4,)"),
    ),
    "closure with a NaN loss": Row(
        lambda w: step(w, lambda tasks=None: w.losses(b=worth(math.nan)), w.keep(detente.CDTT())),
        F,
        ("losses['b']", "nan"),
    ),
    "closure with a NaN loss, one task at a time": Row(
        lambda w: step(
            w,
            lambda tasks=None: {t: w.losses(a=worth(math.nan))[t] for t in tasks},
            w.keep(detente.ConnectionStrength(w.trunk, phase=1)),
        ),
        F,
        ("losses['a']", "nan"),
    ),
    "Auto-Lambda without a primary task": Row(
        lambda w: step(w, lambda tasks=None: w.losses(), w.keep(detente.AutoLambda(primary=["depth"]))),
        V,
        ("auto_lambda", "['depth']", "['a', 'b', 'c']"),
    ),
    "step with an unknown source": Row(
        lambda w: step(w, lambda tasks=None: w.losses(), w.keep(detente.CAGrad()), source="all"), V, ("source", "'all'")
    ),
}


def drawn(seed: int) -> int:
    """The task that Sampled(1, seed) takes of three."""
    return detente.Sampled(1, seed).rows(torch.full((3,), 1 / 3))[0].tasks[0]


def sparse(w: World) -> Any:
    table = nn.Embedding(5, 6, sparse=True)
    w.net["table"] = table
    table.weight.grad = torch.ones(5, 6)
    h = table(torch.tensor([1, 3]))
    return backward(w, {t: w.heads[t](h).square().mean() for t in TASKS}, w.keep(detente.PCGrad()))


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_says_what_is_wrong_and_writes_nothing(name):
    row, world = ROWS[name], World()
    with pytest.raises(row.error) as caught:
        row.call(world)
    message = str(caught.value)
    assert all(word in message for word in row.words), message
    assert world.snapshot(gradients=world.before[1] is not None) == world.before


def test_one_process_in_a_group_of_one_is_fine(tmp_path):
    world = World()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert backward(world).stats["backwards"] == 3
    finally:
        dist.destroy_process_group()


def test_a_good_call_does_write():
    """The snapshots see a change where there is one, or the table above would prove nothing."""
    world = World()
    backward(world, method=world.keep(detente.CDTT()), weighting=world.keep(detente.UW()))
    after = world.snapshot(gradients=True)
    assert after[1] != world.before[1]
    assert all(new != old for new, old in zip(after[2], world.before[2], strict=True))
    world = World()
    step(world, lambda tasks=None: world.losses(), world.keep(detente.PCGrad()))
    after = world.snapshot(gradients=False)
    assert (after[0] != world.before[0], after[2] != world.before[2], after[3] != world.before[3]) == (True,) * 3

"""Mixtures of experts: MMoE, and CGC, whose stack is PLE.

Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018; Tang et
al., "Progressive Layered Extraction (PLE)", RecSys 2020. Experts are the user's modules; gates are linear layers
without bias and a softmax, as in both papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detente.nn.task_norm import module_key, task_names

Experts = Sequence[nn.Module] | nn.ModuleList | Callable[[], nn.Module]

SHARED = "shared"
"""The name of CGC's shared stream, which no task may have."""


class MMoE(nn.Module):
    """Multi-gate mixture of experts: the tasks share all experts, each weighs them by its own gate (Ma et al. 2018).

    ``features_k = sum_e softmax(W_k x)_e expert_e(x)``.

    Args:
        experts: the experts, modules that take the input and return one shape; or a function that makes one, and
            ``count``.
        tasks: distinct task names.
        inputs: width of the gates' input.
        count: number of experts, where ``experts`` is a function.
        gate_input: makes the gates' ``[N, inputs]`` from the input; None flattens an input of ``inputs`` numbers per
            sample, and averages ``[N, inputs, ...]`` over the dimensions after the channels.

    Raises:
        TypeError: ``experts`` is a single module.
        ValueError: no experts, one module given twice, no task or a duplicate; in the forward an input that the gates
            cannot read, or experts that return different shapes.

    Example:
        >>> import torch, detente
        >>> model = detente.nn.MMoE(lambda: torch.nn.Linear(3, 4), ["a", "b"], inputs=3, count=5)
        >>> x = torch.randn(6, 3)
        >>> {task: tuple(features.shape) for task, features in model(x).items()}
        {'a': (6, 4), 'b': (6, 4)}
        >>> model.gate_weights(x)["a"].shape
        torch.Size([6, 5])
    """

    def __init__(
        self,
        experts: Experts,
        tasks: Iterable[str],
        inputs: int,
        count: int | None = None,
        *,
        gate_input: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        self.experts = _experts(experts, count, "experts", "count")
        self.gates = nn.ModuleDict(
            {module_key(task): _Gate(inputs, len(self.experts), gate_input) for task in self.tasks}
        )

    def gate_weights(self, x: Tensor) -> dict[str, Tensor]:
        """``{task: [N, E]}``, each row the weights of the experts, summing to 1."""
        return {task: self.gates[module_key(task)](x) for task in self.tasks}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``{task: [N, ...]}`` from an input ``[N, ...]``; the shape is the experts' own."""
        outputs = [expert(x) for expert in self.experts]
        return {task: _mixture(weights, outputs) for task, weights in self.gate_weights(x).items()}


class CGC(nn.Module):
    """Customized gate control: shared experts, and experts of one task that no other task sees (Tang et al. 2020).

    A task's gate weighs its own experts and the shared ones. A stack is PLE: every level but the last is built with
    ``keep_shared=True`` and hands a shared stream on, for which one more gate weighs the experts of all tasks.

    Args:
        shared_experts: modules, or a function that makes one, and ``shared_count``.
        task_experts: ``{task: modules}``, or a function that makes one, and ``task_count``, the number per task.
        tasks: distinct task names; ``"shared"`` is taken by the shared stream.
        inputs: width of the gates' input.
        shared_count, task_count: numbers of experts, where these are made by a function.
        keep_shared: return the shared stream too, under ``"shared"``, for the next level.
        gate_input: as in :class:`MMoE`.

    Raises:
        TypeError: the experts are a single module.
        ValueError: no experts, one module given twice, experts of other tasks, a task named ``"shared"``, no task or
            a duplicate; in the forward a stream is missing, and as in :class:`MMoE`.

    Example:
        >>> import torch, detente
        >>> def level(inputs, keep_shared):
        ...     expert = lambda: torch.nn.Sequential(torch.nn.Linear(inputs, 4), torch.nn.ReLU())
        ...     return detente.nn.CGC(
        ...         expert, expert, ["a", "b"], inputs, shared_count=2, task_count=1, keep_shared=keep_shared)
        >>> ple = torch.nn.Sequential(level(3, True), level(4, False))
        >>> {task: tuple(features.shape) for task, features in ple(torch.randn(6, 3)).items()}
        {'a': (6, 4), 'b': (6, 4)}
    """

    def __init__(
        self,
        shared_experts: Experts,
        task_experts: Mapping[str, Experts] | Callable[[], nn.Module],
        tasks: Iterable[str],
        inputs: int,
        *,
        shared_count: int | None = None,
        task_count: int | None = None,
        keep_shared: bool = False,
        gate_input: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        self.keep_shared = keep_shared
        if SHARED in self.tasks:
            raise ValueError(f"{SHARED!r} names the shared stream; give the task another name.")
        if not isinstance(task_experts, Mapping):
            task_experts = dict.fromkeys(self.tasks, task_experts)
        if set(task_experts) != set(self.tasks):
            raise ValueError(
                f"task_experts must have experts for the tasks {list(self.tasks)}; it has them for "
                f"{list(task_experts)}."
            )
        self.shared_experts = _experts(shared_experts, shared_count, "shared_experts", "shared_count")
        self.task_experts = nn.ModuleDict(
            {
                module_key(task): _experts(task_experts[task], task_count, f"task_experts[{task!r}]", "task_count")
                for task in self.tasks
            }
        )
        groups = {task: self._own(task) for task in self.tasks}
        everyone = [*self.shared_experts, *(expert for group in groups.values() for expert in group)]
        _distinct(everyone, "shared_experts and task_experts")
        shared = len(self.shared_experts)
        self.gates = nn.ModuleDict(
            {module_key(task): _Gate(inputs, len(group) + shared, gate_input) for task, group in groups.items()}
        )
        self.shared_gate = _Gate(inputs, len(everyone), gate_input) if keep_shared else None

    def _own(self, task: str) -> nn.ModuleList:
        group = self.task_experts[module_key(task)]
        assert isinstance(group, nn.ModuleList)
        return group

    def gate_weights(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of weights that sum to 1, ``[N, experts]``.

        For a task: of its own experts, then of the shared ones. With ``keep_shared`` also ``"shared"``: of the shared
        experts, then of each task's in turn.
        """
        streams = self._streams(x)
        weights = {task: self.gates[module_key(task)](streams[task]) for task in self.tasks}
        if self.shared_gate is not None:
            weights[SHARED] = self.shared_gate(streams[SHARED])
        return weights

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of every task.

        Args:
            x: ``[N, ...]`` for all streams, or what the level below returned: ``{task: [N, ...], "shared": ...}``.

        Returns:
            ``{task: [N, ...]}``, with ``keep_shared`` also ``"shared"``; the shape is the experts' own.
        """
        streams = self._streams(x)
        shared = [expert(streams[SHARED]) for expert in self.shared_experts]
        own = {task: [expert(streams[task]) for expert in self._own(task)] for task in self.tasks}
        weights = self.gate_weights(streams)
        features = {task: _mixture(weights[task], [*own[task], *shared]) for task in self.tasks}
        if self.keep_shared:
            features[SHARED] = _mixture(weights[SHARED], [*shared, *(f for fs in own.values() for f in fs)])
        return features

    def _streams(self, x: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        names = [*self.tasks, SHARED]
        if not isinstance(x, Mapping):
            return dict.fromkeys(names, x)
        if missing := [name for name in names if name not in x]:
            raise ValueError(
                f"CGC expected the streams {names}; {missing} are missing, got {list(x)}. Build every level but the "
                "last with keep_shared=True."
            )
        return x


class _Gate(nn.Module):
    """Weights ``[N, E]`` of experts from an input ``[N, ...]``."""

    def __init__(self, inputs: int, count: int, gate_input: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        if not isinstance(inputs, int) or inputs < 1:
            raise ValueError(f"inputs must be the width of the gates' input, at least 1; got {inputs!r}.")
        self.linear = nn.Linear(inputs, count, bias=False)
        self.gate_input = gate_input

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.linear.in_features
        if self.gate_input is not None:
            rows = self.gate_input(x)
            if rows.dim() != 2 or rows.shape[1] != inputs:
                raise ValueError(f"gate_input must return [N, {inputs}]; got {tuple(rows.shape)}.")
        elif x.dim() > 1 and math.prod(x.shape[1:]) == inputs:
            rows = x.flatten(1)
        elif x.dim() > 2 and x.shape[1] == inputs:
            rows = x.flatten(2).mean(2)
        else:
            raise ValueError(
                f"the gates expected [N, {inputs}], {inputs} numbers per sample, or [N, {inputs}, ...] to average; got "
                f"{tuple(x.shape)}. Pass the right inputs=..., or gate_input=..., a function to [N, inputs]."
            )
        return torch.softmax(self.linear(rows), dim=1)


def _mixture(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """``sum_e weights[:, e] outputs[e]``, ``[N, ...]``."""
    shapes = [tuple(output.shape) for output in outputs]
    if len(set(shapes)) > 1 or len(shapes[0]) < 1 or shapes[0][0] != len(weights):
        raise ValueError(
            f"experts must all return one shape, with {len(weights)} samples in front; they return {shapes}."
        )
    return torch.einsum("ne,en...->n...", weights, torch.stack(list(outputs)))


def _experts(given: Any, count: int | None, name: str, count_name: str) -> nn.ModuleList:
    """The user's experts, or ``count`` made by a function."""
    if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
        raise TypeError(
            f"{name} must be a list of modules, or a function that makes one; got a single {type(given).__name__}."
        )
    if callable(given) and not isinstance(given, nn.ModuleList):
        if not isinstance(count, int) or count < 1:
            raise ValueError(
                f"{name} is a function; say how many experts it shall make, {count_name}=...; got {count!r}."
            )
        made = [given() for _ in range(count)]
    else:
        made = list(given)
        if count is not None and count != len(made):
            raise ValueError(f"{name} has {len(made)} experts, but {count_name} is {count}; leave {count_name} out.")
    if not made:
        raise ValueError(f"{name} is empty; pass at least one expert.")
    if wrong := [type(expert).__name__ for expert in made if not isinstance(expert, nn.Module)]:
        raise TypeError(f"{name} must hold modules; got {wrong[0]}.")
    _distinct(made, name)
    return nn.ModuleList(made)


def _distinct(experts: Sequence[nn.Module], name: str) -> None:
    if len(set(experts)) < len(experts):
        raise ValueError(
            f"{name}: one module appears more than once. Experts must be different modules: write "
            "[make() for _ in range(n)], not [expert] * n, and let a function build a new one at every call."
        )

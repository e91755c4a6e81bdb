"""Cross-stitch: one network per task, whose activations are mixed after chosen blocks.

Misra et al., "Cross-stitch Networks for Multi-task Learning", CVPR 2016, arXiv 1604.03539. The implementation in the
MTAN repository mixes with one row for all outputs, which hands every task the same features; this one is the paper's
full matrix of tasks by tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from detente.nn.task_layers import require_reset, reset_parameters
from detente.nn.task_norm import module_key, task_names


class CrossStitchUnit(nn.Module):
    """Mix the tasks' activations: ``x_i' = sum_j A[i, j] x_j`` (Misra et al., CVPR 2016).

    With ``A`` the identity the tasks do not see each other. The paper trains ``A`` with a larger learning rate than
    the networks.

    Args:
        tasks: distinct task names.
        channels: None for one matrix ``[T, T]``; a number C for one matrix per channel, ``[T, T, C]``.
        same: initial value of a task's own activation.
        different: initial value of another task's activation; None is ``(1 - same) / (T - 1)``, so that a row sums
            to 1 (with a single task the row is 1 whatever ``same`` is).
        channel_dim: dimension of the channels in the activations.

    Raises:
        ValueError: no task or a duplicate; in the forward a task is missing or unknown, shapes differ, or the channels
            are not ``channels`` many.

    Example:
        >>> import torch, detente
        >>> unit = detente.nn.CrossStitchUnit(["a", "b"], same=0.75)
        >>> mixed = unit({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)})
        >>> mixed["a"][0, 0].item(), mixed["b"][0, 0].item()
        (0.75, 0.25)
    """

    def __init__(
        self,
        tasks: Iterable[str],
        channels: int | None = None,
        same: float = 0.9,
        *,
        different: float | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        self.channels = channels
        self.same = same
        self.different = different
        self.channel_dim = channel_dim
        count = len(self.tasks)
        if channels is not None and (not isinstance(channels, int) or channels < 1):
            raise ValueError(f"channels must be None or a whole number of at least 1; got {channels!r}.")
        self.mixing = nn.Parameter(torch.empty(count, count, *([] if channels is None else [channels])))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial mixing."""
        count = len(self.tasks)
        others = (1 - self.same) / max(count - 1, 1) if self.different is None else self.different
        own = 1.0 if count == 1 and self.different is None else self.same
        with torch.no_grad():
            self.mixing.fill_(others)
            self.mixing[range(count), range(count)] = own

    def extra_repr(self) -> str:
        """Tasks and channels."""
        return f"tasks={list(self.tasks)}, channels={self.channels}"

    def forward(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{task: [N, C, ...]}``, all of one shape, to mixed activations of that shape, for all tasks."""
        if not isinstance(streams, Mapping):
            raise TypeError(f"CrossStitchUnit mixes {{task: activations}}; got {type(streams).__name__}.")
        ordered = list(_by_task(streams, self.tasks, "CrossStitchUnit").values())
        shapes = {task: tuple(streams[task].shape) for task in self.tasks}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the tasks' activations must have one shape to be mixed; got {shapes}.")
        stacked = torch.stack(ordered)
        if self.channels is None:
            mixed = torch.einsum("ij,j...->i...", self.mixing, stacked)
        else:
            dim, shape = self.channel_dim, ordered[0].shape
            if not -len(shape) <= dim < len(shape) or shape[dim] != self.channels:
                raise ValueError(
                    f"expected {self.channels} channels in dimension {dim} of the activations; their shape is "
                    f"{tuple(shape)}. Pass channels={shape[dim] if -len(shape) <= dim < len(shape) else '...'}, "
                    "channels=None for one number per pair of tasks, or another channel_dim."
                )
            last = stacked.movedim(dim + 1 if dim >= 0 else dim, -1)
            mixed = torch.einsum("ijc,j...c->i...c", self.mixing, last).movedim(-1, dim + 1 if dim >= 0 else dim)
        return dict(zip(self.tasks, mixed.unbind(0), strict=True))


class CrossStitch(nn.Module):
    """One copy of a trunk per task, with a :class:`CrossStitchUnit` after chosen blocks.

    Published for convolutional networks with units after the pooling layers. All tasks are always computed.

    Args:
        trunk: ``torch.nn.Sequential`` or another sequence of blocks; it is copied for every task and left alone.
        tasks: distinct task names.
        after: positions of the blocks that a unit follows, negative ones counted from the end; None is every block.
            The paper mixes after pooling layers only.
        channels: None for units with one number per pair of tasks; else the number of channels after each block of
            ``after``, for units with one number per pair and channel.
        same, different, channel_dim: of the units.
        reset: initialise every copy anew, each for itself, instead of starting all tasks from the trunk's weights
            (the paper fine-tunes copies that were trained for one task each).

    Raises:
        TypeError: ``trunk`` is no sequence of modules.
        ValueError: no block, no task, a position out of range or twice, as many ``channels`` as ``after`` are
            expected, ``reset`` of a module without ``reset_parameters``, or forward with inputs missing.

    Example:
        >>> import torch, detente
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model = detente.nn.CrossStitch(trunk, ["a", "b"], after=[1])
        >>> {task: tuple(features.shape) for task, features in model(torch.ones(5, 3)).items()}
        {'a': (5, 2), 'b': (5, 2)}
        >>> optimizer = torch.optim.SGD(
        ...     [{"params": model.network_parameters()}, {"params": model.mixing_parameters(), "lr": 1.0}], lr=0.01)
    """

    def __init__(
        self,
        trunk: Iterable[nn.Module],
        tasks: Iterable[str],
        after: Iterable[int] | None = None,
        *,
        channels: Sequence[int] | None = None,
        same: float = 0.9,
        different: float | None = None,
        channel_dim: int = 1,
        reset: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        blocks = _blocks(trunk)
        positions = [_position(k, len(blocks)) for k in (range(len(blocks)) if after is None else after)]
        if repeated := sorted({k for k in positions if positions.count(k) > 1}):
            raise ValueError(f"after must name different blocks; {repeated} appear more than once.")
        if channels is not None and len(channels) != len(positions):
            raise ValueError(
                f"channels must have one number per unit: expected {len(positions)}, one for each of the blocks "
                f"{positions}; got {len(channels)}."
            )
        if reset:
            for k, block in enumerate(blocks):
                require_reset(block, f"trunk[{k}]")
        copies = []
        for _ in self.tasks:
            # one deepcopy for all blocks: parameters tied between blocks stay tied
            copied = nn.ModuleList(copy.deepcopy(blocks))
            if reset:
                reset_parameters(copied)
            copies.append(copied)
        self.networks = nn.ModuleDict(dict(zip(map(module_key, self.tasks), copies, strict=True)))
        self.units = nn.ModuleDict(
            {
                str(k): CrossStitchUnit(
                    self.tasks,
                    None if channels is None else channels[i],
                    same,
                    different=different,
                    channel_dim=channel_dim,
                )
                for i, k in enumerate(positions)
            }
        )

    def network(self, task: str) -> nn.ModuleList:
        """The blocks of one task's network."""
        if task not in self.tasks:
            raise KeyError(f"CrossStitch has no network for task {task!r}; it knows {list(self.tasks)}")
        network = self.networks[module_key(task)]
        assert isinstance(network, nn.ModuleList)
        return network

    def mixing_parameters(self) -> list[nn.Parameter]:
        """The units' mixing, which wants a larger learning rate."""
        return list(self.units.parameters())

    def network_parameters(self) -> list[nn.Parameter]:
        """All other parameters."""
        return list(self.networks.parameters())

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of every task.

        Args:
            x: what the trunk's first block takes, the same for all tasks, or ``{task: input}`` of equal shapes.

        Returns:
            ``{task: what the trunk's last block returns}``.
        """
        networks = {task: self.network(task) for task in self.tasks}
        streams = _by_task(x, self.tasks, "CrossStitch")
        for k in range(len(networks[self.tasks[0]])):
            streams = {task: network[k](streams[task]) for task, network in networks.items()}
            if str(k) in self.units:
                streams = self.units[str(k)](streams)
        return streams


def _by_task(x: Tensor | Mapping[str, Tensor], tasks: tuple[str, ...], who: str) -> dict[str, Tensor]:
    """The tasks' inputs, in the order of the tasks."""
    if not isinstance(x, Mapping):
        return dict.fromkeys(tasks, x)
    if set(x) != set(tasks):
        raise ValueError(
            f"{who} needs the activations of all its tasks {list(tasks)}, because it mixes them; got {list(x)}."
        )
    return {task: x[task] for task in tasks}


def _blocks(trunk: Iterable[nn.Module]) -> list[nn.Module]:
    """The trunk as a list of blocks."""
    blocks = list(trunk) if isinstance(trunk, nn.Sequential | nn.ModuleList | list | tuple) else None
    if blocks is None or not all(isinstance(block, nn.Module) for block in blocks):
        raise TypeError(
            f"trunk must be a torch.nn.Sequential or a list of modules that run one after the other; got "
            f"{type(trunk).__name__}. Wrap your network's stages: torch.nn.Sequential(model.stem, model.layer1, ...)."
        )
    if not blocks:
        raise ValueError("trunk has no blocks.")
    return blocks


def _position(k: int, count: int) -> int:
    if not isinstance(k, int) or not -count <= k < count:
        raise ValueError(f"after must hold positions of blocks, from {-count} to {count - 1}; got {k!r}.")
    return k % count

"""MTAN: task-specific attention on the features of a shared convolutional trunk.

Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv 1803.10704; the encoder, on
any trunk of blocks. In the paper's formula and its code the mask belongs to a task, the 3 x 3 convolution behind it to
the block: all tasks share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, interpolate

from detente.nn.task_norm import module_key, task_names

Resize = Callable[[Tensor, tuple[int, int]], Tensor]
Block = nn.Sequential | tuple[nn.Module, nn.Module] | tuple[nn.Module, nn.Module, nn.Module]


def fit(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring ``[N, C, H, W]`` to ``[N, C, *size]``: maximum of the covered cells, bilinear where it has to grow."""
    height, width = features.shape[-2:]
    if (height, width) == size:
        return features
    if height >= size[0] and width >= size[1]:
        return adaptive_max_pool2d(features, size)
    return interpolate(features, size, mode="bilinear", align_corners=False)


class AttentionModule(nn.Module):
    """One task's mask on one block: ``sigmoid(BN(conv(relu(BN(conv([u ; previous])))))) * p`` (Liu et al. 2019).

    Both convolutions are 1 x 1. With ``outputs`` the masked features also pass a 3 x 3 convolution, BN and ReLU.

    Args:
        inputs: channels of ``u`` and ``previous`` together.
        features: channels of ``p``.
        outputs: channels after the 3 x 3 convolution; None leaves it out.
        middle: channels between the two 1 x 1 convolutions; None is ``features``, as in the paper's SegNet.
        resize: brings ``previous`` to the size of ``u``, and the mask to the size of ``p``, where they differ.

    Raises:
        ValueError: in the forward the channels do not fit.

    Example:
        >>> import torch, detente
        >>> attention = detente.nn.AttentionModule(inputs=4 + 3, features=8, outputs=6)
        >>> u, p, previous = torch.ones(2, 4, 5, 5), torch.ones(2, 8, 5, 5), torch.ones(2, 3, 10, 10)
        >>> attention(u, p, previous).shape
        torch.Size([2, 6, 5, 5])
    """

    def __init__(
        self, inputs: int, features: int, outputs: int | None = None, *, middle: int | None = None, resize: Resize = fit
    ) -> None:
        super().__init__()
        for name, value in {"inputs": inputs, "features": features, "outputs": outputs, "middle": middle}.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a number of channels, at least 1; got {value!r}.")
        self.inputs = inputs
        self.features = features
        self.resize = resize
        middle = features if middle is None else middle
        self.mask = nn.Sequential(
            nn.Conv2d(inputs, middle, 1),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, features, 1),
            nn.BatchNorm2d(features),
            nn.Sigmoid(),
        )
        self.output = nn.Identity() if outputs is None else output_layer(features, outputs)

    def forward(self, u: Tensor, p: Tensor, previous: Tensor | None = None) -> Tensor:
        """Attended features.

        Args:
            u: first features of the block, ``[N, C_u, H, W]``.
            p: last features of the block, ``[N, features, H', W']``.
            previous: the task's features from the block before, ``[N, C, H'', W'']``.

        Returns:
            ``[N, outputs or features, H', W']``.
        """
        size = _size(u)
        joined = u if previous is None else torch.cat([u, self.resize(previous, size)], dim=1)
        if joined.shape[1] != self.inputs or p.shape[1] != self.features:
            raise ValueError(
                f"expected {self.inputs} channels of u and previous together and {self.features} of p; got "
                f"{u.shape[1]} + {0 if previous is None else previous.shape[1]} and {p.shape[1]}."
            )
        mask = self.mask(joined)
        if size != _size(p):
            mask = self.resize(mask, _size(p))
        return cast(Tensor, self.output(mask * p))


class MTAN(nn.Module):
    """Multi-task attention network on the user's own convolutional trunk (Liu et al., CVPR 2019, arXiv 1803.10704).

    Beside every shared block each task has an :class:`AttentionModule`. It selects from the block's last features
    ``p``, by a mask computed from the block's first features ``u`` and from what the task selected in the block before.
    The selection passes a 3 x 3 convolution, BN and ReLU and is brought to the size of the next block's ``u``.

    Args:
        blocks: the shared blocks in order. Each is a pair ``(first, rest)`` of modules with ``u = first(x)`` and
            ``p = rest(u)``; a triple ``(first, rest, down)``, where ``down(p)`` goes to the next block; or a
            ``torch.nn.Sequential`` that is cut by ``split``. The modules are used, not copied.
        tasks: distinct task names.
        example: an input of the trunk, ``[N, C, H, W]``; it runs once, in eval mode, to find the channels (and makes
            the parameters of lazy modules).
        split: how many children of a ``Sequential`` make up its ``first``; one number, or one per block.
        middle: channels between the two convolutions of each mask; None is the channels of ``p``.
        share_output: all tasks use the block's 3 x 3 convolution, as in the paper; False gives each its own.
        resize: ``resize(features, (H, W))``; the default takes the maximum of the covered cells (max pooling where a
            side is halved) and interpolates where it has to grow.

    Raises:
        TypeError: a block is not of these kinds.
        ValueError: no block or task, a split that leaves ``first`` or ``rest`` empty, features that are not
            ``[N, C, H, W]``.

    Example:
        >>> import torch, detente
        >>> def block(inputs, outputs, stride):
        ...     return torch.nn.Sequential(
        ...         torch.nn.Conv2d(inputs, outputs, 3, stride, 1), torch.nn.ReLU(),
        ...         torch.nn.Conv2d(outputs, outputs, 3, 1, 1), torch.nn.ReLU())
        >>> images = torch.randn(2, 3, 16, 16)
        >>> model = detente.nn.MTAN([block(3, 8, 1), block(8, 12, 2)], ["depth", "edges"], images, split=2)
        >>> {task: tuple(features.shape) for task, features in model(images).items()}
        {'depth': (2, 12, 8, 8), 'edges': (2, 12, 8, 8)}
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        tasks: Iterable[str],
        example: Tensor,
        *,
        split: int | Sequence[int] = 1,
        middle: int | None = None,
        share_output: bool = True,
        resize: Resize = fit,
    ) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        self.resize = resize
        self.blocks = nn.ModuleList(nn.ModuleList(parts) for parts in _parts(list(blocks), split))
        firsts, lasts = self._probe(example)
        self.attention = nn.ModuleList()
        self.outputs = nn.ModuleList()  # of the blocks, where tasks share them
        before = 0
        for j, (u, p) in enumerate(zip(firsts, lasts, strict=True)):
            after = firsts[j + 1].shape[1] if j + 1 < len(firsts) else p.shape[1]
            modules = {
                module_key(task): AttentionModule(
                    u.shape[1] + before, p.shape[1], None if share_output else after, middle=middle, resize=resize
                )
                for task in self.tasks
            }
            self.attention.append(nn.ModuleDict(modules).to(p.device, p.dtype))
            shared = output_layer(p.shape[1], after) if share_output else nn.Identity()
            self.outputs.append(shared.to(p.device, p.dtype))
            before = after

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``{task: [N, C, H, W]}`` from images, C and size being those of the trunk's own last features."""
        selected: dict[str, Tensor] = {}
        for block, attention, output in zip(self.blocks, self.attention, self.outputs, strict=True):
            u, p, x = _run(cast(nn.ModuleList, block), x)
            of_task = cast(nn.ModuleDict, attention)
            selected = {task: output(of_task[module_key(task)](u, p, selected.get(task))) for task in self.tasks}
        return {task: self.resize(features, _size(x)) for task, features in selected.items()}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters of the trunk and of shared outputs."""
        return [*self.blocks.parameters(), *self.outputs.parameters()]

    @torch.no_grad()
    def _probe(self, example: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """First and last features of every block."""
        firsts, lasts = [], []
        x = example
        with _evaluating(self.blocks):
            for j, block in enumerate(self.blocks):
                u, p, x = _run(cast(nn.ModuleList, block), x)
                for name, features in (("first", u), ("last", p), ("outgoing", x)):
                    if not isinstance(features, Tensor) or features.dim() != 4:
                        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                        raise ValueError(
                            f"blocks[{j}]: its {name} features must be [N, C, H, W]; got {got}. Leave pooling to a "
                            "vector and heads out of the blocks."
                        )
                firsts.append(u)
                lasts.append(p)
        return firsts, lasts


def output_layer(inputs: int, outputs: int) -> nn.Sequential:
    """3 x 3 convolution, BN and ReLU behind a mask."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def _run(block: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, rest, down = block
    u = first(x)
    p = rest(u)
    return u, p, down(p)


def _size(features: Tensor) -> tuple[int, int]:
    return features.shape[-2], features.shape[-1]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every part is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _parts(blocks: list[Block], split: int | Sequence[int]) -> list[list[nn.Module]]:
    """First, rest and downsampling of every block."""
    if not blocks:
        raise ValueError("blocks is empty; pass the trunk's stages in order.")
    splits = [split] * len(blocks) if isinstance(split, int) else list(split)
    if len(splits) != len(blocks):
        raise ValueError(f"split must be one number, or one per block: expected {len(blocks)}; got {len(splits)}.")
    parts = []
    for j, (block, at) in enumerate(zip(blocks, splits, strict=True)):
        if isinstance(block, nn.Sequential):
            if not 0 < at < len(block):
                raise ValueError(
                    f"blocks[{j}] has {len(block)} children, of which the first {at} should give u and the others p; "
                    f"{'split must be from 1 to ' + str(len(block) - 1) if len(block) > 1 else 'it cannot be cut'}. "
                    "Set split, or pass a pair (first, rest)."
                )
            parts.append([nn.Sequential(*list(block)[:at]), nn.Sequential(*list(block)[at:]), nn.Identity()])
        elif isinstance(block, tuple | list) and len(block) in (2, 3) and all(isinstance(m, nn.Module) for m in block):
            parts.append([*block, *([nn.Identity()] if len(block) == 2 else [])])
        else:
            raise TypeError(
                f"blocks[{j}] must be a torch.nn.Sequential, or modules (first, rest) or (first, rest, down); got "
                f"{type(block).__name__}."
            )
    return parts

"""What every network of detente.benchmark.models must do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a tensor, a list or a dict."""
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def check_gradients(model: nn.Module, *inputs: Tensor) -> None:
    """In training every parameter has a finite gradient; those of the weights are not 0."""
    sum((leaf * torch.randn_like(leaf)).sum() for leaf in leaves(model.train()(*inputs))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if parameter.ndim > 1:
            assert parameter.grad.any(), name


def check_dropout(make: Callable[[float], nn.Module], *inputs: Tensor) -> None:
    """At 0 no random numbers are drawn; at 0.5 training is random and evaluation the same as without dropout."""

    def twice(model: nn.Module) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(leaves(model(*inputs)), leaves(model(*inputs)), strict=True)

    torch.manual_seed(0)
    plain = make(0.0)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in twice(plain.train()))
    assert torch.equal(torch.get_rng_state(), state)
    dropping = make(0.5)
    dropping.load_state_dict(plain.state_dict())
    assert not any(torch.equal(a, b) for a, b in twice(dropping.train()))
    dropping.load_state_dict(plain.state_dict())  # training has changed the running statistics
    for a, b in zip(leaves(dropping.eval()(*inputs)), leaves(plain.eval()(*inputs)), strict=True):
        assert torch.equal(a, b)


def shapes(output: Any) -> Any:
    """Sizes in place of tensors."""
    if isinstance(output, dict):
        return {name: tuple(tensor.shape) for name, tensor in output.items()}
    return [tuple(tensor.shape) for tensor in output]

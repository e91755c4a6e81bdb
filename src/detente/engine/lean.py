"""Gradients of linear layers as they are: a product of two small matrices, never written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["LARGE", "Product", "biases", "fresh", "packed_input", "products", "saved_input", "worth"]

# what the input of the product is saved as, and which argument the weight is
_NODES = {"AddmmBackward0": ("mat1", 2), "MmBackward0": ("self", 1)}


@dataclass(frozen=True)
class Product:
    """The one place where a step uses a weight W ``[o, i]``: ``Y = X W'``, so that ``dL/dW = (dL/dY)' X``.

    Attributes:
        node: of the product in the autograd graph.
        samples: N, the rows of X and of Y.
    """

    node: Node
    samples: int

    @property
    def output(self) -> GradientEdge:
        """Where the gradient of Y ``[N, o]`` arrives."""
        return GradientEdge(self.node, 0)

    @property
    def inputs(self) -> Tensor:
        """X ``[N, i]``, as the graph keeps it."""
        return saved_input(self.node).detach()


def saved_input(node: Node) -> Tensor:
    """The input ``[N, i]`` of a product, as the graph keeps it."""
    saved: Tensor = getattr(node, f"_saved_{_NODES[node.name()][0]}")
    return saved


def packed_input(node: Node) -> Any:
    """The same before hooks unpack it."""
    return getattr(node, f"_raw_saved_{_NODES[node.name()][0]}")


def products(users: Mapping[Node, list[Node]], parameters: Sequence[Tensor]) -> dict[int, Product]:
    """The weights, by position, that a step uses in one linear layer and nowhere else.

    ``users`` says what each node of its graph feeds.

    Weights with a hook on their gradient are left out: it must see the gradient itself.
    """
    matrices = {
        get_gradient_edge(p).node: k
        for k, p in enumerate(parameters)
        if p.dim() == 2 and p.dtype in (torch.float32, torch.float64) and not p._backward_hooks
    }
    if not matrices:
        return {}
    found = {}
    for leaf, k in matrices.items():
        transposed = _only(users.get(leaf))
        if transposed is None or transposed.name() != "TBackward0":
            continue
        product = _only(users.get(transposed))
        if product is None or product.name() not in _NODES:
            continue
        saved, place = _NODES[product.name()]
        if product.next_functions[place][0] is transposed and getattr(product, "_saved_alpha", 1) == 1:
            found[k] = Product(product, int(getattr(product, f"_saved_{saved}_sym_sizes")[0]))
    return found


def biases(users: Mapping[Node, list[Node]], parameters: Sequence[Tensor]) -> dict[int, Product]:
    """The biases ``[o]``, by position, that a step adds to one such product and uses nowhere else."""
    found = {}
    for k, p in enumerate(parameters):
        if p.dim() != 1 or p.dtype not in (torch.float32, torch.float64) or p._backward_hooks:
            continue
        leaf = get_gradient_edge(p).node
        product: Any = _only(users.get(leaf))
        if product is None or product.name() != "AddmmBackward0" or product.next_functions[0][0] is not leaf:
            continue
        if product._saved_beta == 1 and product._saved_mat2_sym_sizes[1] == len(p):
            found[k] = Product(product, int(product._saved_mat1_sym_sizes[0]))
    return found


def _only(nodes: list[Node] | None) -> Node | None:
    return nodes[0] if nodes is not None and len(nodes) == 1 else None


def worth(samples: int, shape: Sequence[int], tasks: int, *, together: bool = False) -> bool:
    """Whether the products cost less than T written gradients, by a count of operations.

    Writing one gradient, copying it into its row and reading it twice costs about as much per entry as eighty
    multiplications of the layer itself, and as twenty where all are written into their rows ``together``; the Gramian
    of products is taken in float64, at 40% of the speed.
    """
    if len(shape) != 2:
        return False
    rows, columns = shape
    written = tasks * (samples + (_TRAFFIC // 4 if together else _TRAFFIC)) * rows * columns
    kept = 2.5 * samples**2 * (columns + tasks * rows) + 2 * tasks**2 * samples * rows + samples * rows * columns
    return kept + _CALLS < written


_TRAFFIC = 80
_CALLS = 7_000_000  # what the calls themselves take, on the CPU


def fresh(users: Mapping[Node, list[Node]], parameters: Sequence[Tensor]) -> set[int]:
    """Positions of large parameters on the CPU whose gradients are new tensors that nobody else holds.

    Other operations may hand on what they were given, or custom functions what they will write into again. On a GPU
    one buffer means fewer calls.
    """
    return {
        k
        for k, p in enumerate(parameters)
        if p.numel() >= LARGE and p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64)
        and not p._backward_hooks
        and _computed(get_gradient_edge(p).node, users)
    }  # fmt: skip


def _computed(node: Node, users: Mapping[Node, list[Node]]) -> bool:
    def computes(user: Node) -> bool:
        if user.name() == "TBackward0":
            return _computed(user, users)
        return all(
            child is not node or position in _COMPUTED.get(user.name(), ())
            for position, (child, _) in enumerate(user.next_functions)
        )

    return all(computes(user) for user in users.get(node, ()))


LARGE = 1 << 17  # entries from which a copy costs more than handling one more tensor
# of which arguments an operation computes the gradient, instead of handing on its own
_COMPUTED = {
    "AddmmBackward0": (1, 2), "MmBackward0": (0, 1), "ConvolutionBackward0": (0, 1), "EmbeddingBackward0": (0,),
    "ToCopyBackward0": (0,),
}  # fmt: skip

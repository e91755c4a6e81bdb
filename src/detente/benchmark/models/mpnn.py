"""Message passing over molecules, as used on QM9.

Gilmer et al., "Neural Message Passing for Quantum Chemistry", ICML 2017, arXiv 1704.01212, with Set2Set (Vinyals et
al., ICLR 2016, arXiv 1511.06391). Sizes as in Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022,
arXiv 2202.01017 (github.com/AvivNavon/nash-mtl, experiments/quantum_chemistry/models.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from detente.benchmark.models import layers
from detente.benchmark.models.layers import scaled

STEPS = 3  # of message passing, and of Set2Set


class MessagePassing(nn.Module):
    """Edge-conditioned messages, a gated update, and attention over a molecule's atoms; a linear layer per task.

    Args:
        tasks: names of the targets.
        inputs: features of a node.
        edges: features of an edge.
        hidden: features within the network.
        width: multiplies ``hidden`` and the 128 features of the network that reads the edges.
        dropout: rate before the tasks' layers.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        inputs: int = 11,
        edges: int = 5,
        hidden: int = 64,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = scaled(hidden, width)
        self.embed = nn.Linear(inputs, hidden)
        self.message = EdgeConvolution(hidden, edges, scaled(128, width))
        self.update = nn.GRUCell(hidden, hidden)
        self.pool = Set2Set(hidden)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.dropout = layers.dropout(dropout)
        self.heads = nn.ModuleDict({task: nn.Linear(hidden, 1) for task in tasks})

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, graph: Tensor) -> dict[str, Tensor]:
        """Predictions for a batch of graphs.

        Args:
            x: features of the nodes, [N, inputs].
            edge_index: nodes that each edge leaves and enters, int64 [2, E].
            edge_attr: features of the edges, [E, edges].
            graph: which graph each node is of, int64 [N]: every number from 0 to B - 1.

        Returns:
            {task: [B]}.
        """
        nodes = relu(self.embed(x))
        matrices = self.message.matrices(edge_attr)
        for _ in range(STEPS):
            nodes = self.update(relu(self.message(nodes, edge_index, matrices)), nodes)
        features = self.dropout(relu(self.combine(self.pool(nodes, graph))))
        return {task: head(features).squeeze(-1) for task, head in self.heads.items()}


class EdgeConvolution(nn.Module):
    """The mean of what a node's neighbours send, each through a matrix read from the edge, and a linear map of itself.

    The matrices do not depend on the nodes: they are made once for all steps.
    """

    def __init__(self, hidden: int, edges: int, between: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(edges, between), nn.ReLU(), nn.Linear(between, hidden**2))
        self.root = nn.Linear(hidden, hidden, bias=False)
        self.bias = nn.Parameter(torch.zeros(hidden))

    def matrices(self, edge_attr: Tensor) -> Tensor:
        """[E, hidden, hidden] from [E, edges]."""
        hidden = self.bias.numel()
        return cast(Tensor, self.read(edge_attr)).view(-1, hidden, hidden)

    def forward(self, nodes: Tensor, edge_index: Tensor, matrices: Tensor) -> Tensor:
        source, target = edge_index
        sent = torch.bmm(nodes[source].unsqueeze(1), matrices).squeeze(1)
        received = torch.zeros_like(nodes).index_add(0, target, sent)
        neighbours = torch.bincount(target, minlength=len(nodes)).clamp_min(1).unsqueeze(1)
        return cast(Tensor, received / neighbours + self.root(nodes) + self.bias)


class Set2Set(nn.Module):
    """[B, 2 * hidden] from [N, hidden]: a recurrent query, and the mean of the nodes that it attends to."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = nn.LSTMCell(2 * hidden, hidden)

    def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
        graphs = int(graph.max()) + 1
        query = memory = nodes.new_zeros(graphs, nodes.shape[1])
        result = nodes.new_zeros(graphs, 2 * nodes.shape[1])
        for _ in range(STEPS):
            query, memory = self.query(result, (query, memory))
            weights = _softmax((nodes * query[graph]).sum(1), graph, graphs)
            attended = torch.zeros_like(query).index_add(0, graph, weights.unsqueeze(1) * nodes)
            result = torch.cat([query, attended], dim=1)
        return result


def _softmax(scores: Tensor, graph: Tensor, graphs: int) -> Tensor:
    """Softmax among the nodes of each graph."""
    largest = scores.new_zeros(graphs).scatter_reduce(0, graph, scores.detach(), "amax", include_self=False)
    exponentials = (scores - largest[graph]).exp()
    return exponentials / scores.new_zeros(graphs).index_add(0, graph, exponentials)[graph]

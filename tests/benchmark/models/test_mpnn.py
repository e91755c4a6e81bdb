"""Message passing on batches of graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from benchmark.networks import check_dropout, check_gradients, count, shapes
from detente.benchmark.models.mpnn import EdgeConvolution, MessagePassing, Set2Set

TARGETS = tuple(f"target_{number}" for number in range(11))
Graph = tuple[Tensor, Tensor, Tensor]


def graph(nodes: int, seed: int) -> Graph:
    """Nodes, and edges between some of them: node 0 receives none."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.tensor(
        [(a, b) for a in range(nodes) for b in range(1, nodes) if (a + b + seed) % 3], dtype=torch.int64
    )
    return (
        torch.randn(nodes, 11, generator=generator),
        edges.reshape(-1, 2).T,
        torch.randn(len(edges), 5, generator=generator),
    )


def batch(graphs: list[Graph]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = torch.tensor([len(nodes) for nodes, _, _ in graphs])
    starts = (sizes.cumsum(0) - sizes).tolist()
    nodes, edges, features = zip(*graphs, strict=True)
    shifted = [index + start for index, start in zip(edges, starts, strict=True)]
    return (
        torch.cat(nodes),
        torch.cat(shifted, 1),
        torch.cat(features),
        torch.arange(len(graphs)).repeat_interleave(sizes),
    )


@pytest.fixture(scope="module")
def graphs() -> list[Graph]:
    return [graph(5, 0), graph(1, 1), graph(7, 2)]


def test_parameters_of_nash_mtl():
    """Navon et al. (2022): NNConv (5-128-64 x 64), GRU, Set2Set and 2d-d with d = 64, 11 targets. PyTorch Geometric
    2.8's layers have the same 617,675, and with the same parameters the same outputs (checked once, by hand)."""
    convolution = (5 + 1) * 128 + (128 + 1) * 64**2 + 64**2 + 64
    recurrent = 3 * 64 * (64 + 64 + 2) + 4 * 64 * (128 + 64 + 2)
    linear = (11 + 1) * 64 + (128 + 1) * 64 + 11 * (64 + 1)
    assert count(MessagePassing(TARGETS)) == convolution + recurrent + linear == 617_675


def test_a_batch_is_its_graphs_one_by_one(graphs: list[Graph]):
    torch.manual_seed(0)
    model = MessagePassing(TARGETS)
    together = model(*batch(graphs))
    assert shapes(together) == dict.fromkeys(TARGETS, (3,))
    for number, one in enumerate(graphs):
        alone = model(*batch([one]))
        for target in TARGETS:
            torch.testing.assert_close(together[target][number : number + 1], alone[target])


def test_order_of_nodes_does_not_matter(graphs: list[Graph]):
    torch.manual_seed(0)
    model = MessagePassing(TARGETS[:1])
    nodes, edges, features = graphs[2]
    order = torch.randperm(len(nodes))
    shuffled = (nodes[order], order.argsort()[edges], features)
    torch.testing.assert_close(model(*batch([graphs[2]])), model(*batch([shuffled])))


def test_messages_are_means_over_neighbours(graphs: list[Graph]):
    torch.manual_seed(0)
    layer = EdgeConvolution(hidden=4, edges=5, between=6)
    torch.nn.init.normal_(layer.bias)
    (_, edges, features), nodes = graphs[0], torch.randn(5, 4)
    matrices = layer.matrices(features)
    expected = []
    for node in range(5):
        sent = [nodes[a] @ matrices[e] for e, (a, b) in enumerate(edges.T.tolist()) if b == node]
        mean = torch.stack(sent).mean(0) if sent else torch.zeros(4)
        expected.append(mean + layer.root.weight @ nodes[node] + layer.bias)
    torch.testing.assert_close(layer(nodes, edges, matrices), torch.stack(expected))
    torch.testing.assert_close(matrices[2], layer.read[2](relu(layer.read[0](features[2]))).view(4, 4))


def test_attention_survives_large_scores():
    """Softmax must not overflow: scores of hundreds."""
    torch.manual_seed(0)
    pooled = Set2Set(4)(1e4 * torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 2]))
    assert pooled.shape == (3, 8)
    assert pooled.isfinite().all()


def test_gradients_width_and_dropout(graphs: list[Graph]):
    torch.manual_seed(0)
    check_gradients(MessagePassing(TARGETS[:2]), *batch(graphs))
    check_dropout(lambda rate: MessagePassing(TARGETS[:2], dropout=rate), *batch(graphs))
    assert count(MessagePassing(TARGETS, width=0.5)) < count(MessagePassing(TARGETS)) / 4
    assert shapes(MessagePassing(("a",), width=0.001)(*batch(graphs))) == {"a": (3,)}

"""The LeNet of two digits."""

from __future__ import annotations

import torch

from benchmark.networks import check_dropout, check_gradients, count, shapes
from detente.benchmark.models.lenet import LeNet

TASKS = ("left", "right")


def test_parameters_of_pareto_mtl():
    """Lin et al. (2019): 10 maps of 9 x 9, 20 of 5 x 5, 500-50, and 50-10 for each of two tasks."""
    convolutions = (81 + 1) * 10 + (25 * 10 + 1) * 20
    assert count(LeNet(TASKS)) == convolutions + (500 + 1) * 50 + 2 * (50 + 1) * 10 == 31_910


def test_half_the_width_is_the_network_with_250_features():
    """5 maps of 9 x 9, 10 of 5 x 5, 250-50 and 50-10: the variant of the benchmarks with 250 flat features."""
    convolutions = (81 + 1) * 5 + (25 * 5 + 1) * 10
    assert count(LeNet(TASKS, width=0.5)) == convolutions + (250 + 1) * 50 + 2 * (50 + 1) * 10 == 15_240
    assert count(LeNet(TASKS, width=1e-9)) > 0


def test_batch_norm_has_two_parameters_for_each_of_its_channels():
    assert count(LeNet(TASKS, width=0.5, norm=True)) - count(LeNet(TASKS, width=0.5)) == 2 * (5 + 10 + 50)


def test_shapes():
    assert shapes(LeNet(TASKS)(torch.rand(3, 1, 36, 36))) == {"left": (3, 10), "right": (3, 10)}
    assert shapes(LeNet(("one",), classes=7, size=28)(torch.rand(2, 1, 28, 28))) == {"one": (2, 7)}


def test_gradients_and_dropout():
    images = torch.rand(8, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    check_gradients(LeNet(TASKS), images)
    check_gradients(LeNet(TASKS, norm=True), images)
    check_dropout(lambda rate: LeNet(TASKS, dropout=rate), images)

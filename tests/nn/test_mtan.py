"""MTAN: masks follow the paper's formula on any trunk, and a task's attention is its own."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, interpolate, max_pool2d

import detente
from detente.nn import MTAN, AttentionModule

TASKS = ("seg.mask", "depth")


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs + 1, 3, 1, 1), nn.Tanh()
    )


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def close(first: Tensor, second: Tensor) -> None:
    # float64, at most three levels of convolutions over 100 numbers: 1e-14 at the most
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def convolved(x: Tensor, state: Mapping[str, Tensor], conv: str, norm: str, padding: int) -> Tensor:
    x = conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=padding)
    return batch_norm(x, None, None, state[f"{norm}.weight"], state[f"{norm}.bias"], training=True)


def attended(state: Mapping[str, Tensor], at: str, joined: Tensor, p: Tensor) -> Tensor:
    hidden = convolved(joined, state, f"{at}mask.0", f"{at}mask.1", 0).relu()
    return convolved(hidden, state, f"{at}mask.3", f"{at}mask.4", 0).sigmoid() * p


def selected(state: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    return convolved(x, state, f"{at}0", f"{at}1", 1).relu()


def scrambled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


@pytest.mark.parametrize("middle", [None, 2])
def test_attention_is_the_formula(middle: int | None) -> None:
    attention = scrambled(AttentionModule(4 + 3, 5, 6, middle=middle))
    torch.manual_seed(1)
    u, p, previous = (torch.randn(2, c, 4, 4, dtype=torch.float64) for c in (4, 5, 3))
    state = attention.state_dict()
    masked = attended(state, "", torch.cat([u, previous], 1), p)
    close(attention(u, p, previous), selected(state, "output.", masked))
    assert attention.mask[0].out_channels == (middle or 5)
    bare = scrambled(AttentionModule(4, 5))
    close(bare(u, p), attended(bare.state_dict(), "", u, p))


def test_sizes_are_brought_together() -> None:
    attention = scrambled(AttentionModule(4 + 3, 5)).eval()
    torch.manual_seed(1)
    u, p = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    large, small = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 2, 3, dtype=torch.float64)
    close(attention(u, p, large), attention(u, p, max_pool2d(large, 2)))
    close(attention(u, p, small), attention(u, p, interpolate(small, (4, 4), mode="bilinear")))
    ones = torch.ones(2, 5, 2, 2, dtype=torch.float64)
    mask = attention(u, torch.ones_like(p), large)
    close(attention(u, ones, large), max_pool2d(mask, 2))
    own = AttentionModule(7, 5, resize=lambda x, size: x[..., : size[0], : size[1]]).double().eval()
    own.load_state_dict(attention.state_dict())
    close(own(u, p, large), attention(u, p, large[..., :4, :4]))


@pytest.mark.parametrize("share_output", [True, False])
def test_network_is_the_formula(share_output: bool) -> None:
    blocks = [block(3, 4), block(5, 6, 2), block(7, 4)]
    model = scrambled(MTAN(blocks, TASKS, images(), split=2, share_output=share_output))
    x, state = images().double(), model.state_dict()
    features = model(x)
    keys = {"seg.mask": "task_seg%2Emask", "depth": "task_depth"}
    firsts, lasts = [], []
    for part in blocks:
        firsts.append(part[:2](x))
        x = part(x)
        lasts.append(x)
    for task in TASKS:
        previous = None
        for j, (u, p) in enumerate(zip(firsts, lasts, strict=True)):
            if previous is not None and previous.shape[-1] != u.shape[-1]:
                previous = max_pool2d(previous, 2)
            joined = u if previous is None else torch.cat([u, previous], 1)
            at = f"attention.{j}.{keys[task]}."
            masked = attended(state, at, joined, p)
            previous = selected(state, f"outputs.{j}." if share_output else f"{at}output.", masked)
        close(features[task], previous)
        assert features[task].shape == (4, 5, 4, 4)


def test_blocks_may_be_cut_in_several_ways() -> None:
    torch.manual_seed(0)
    first, second = block(3, 4), block(5, 6)
    pool = nn.AvgPool2d(2)
    ways = [
        MTAN([(first[:2], first[2:], pool), (second[:3], second[3:])], TASKS, images()),
        MTAN([(first[:2], first[2:], pool), second], TASKS, images(), split=[2, 3]),
        MTAN([first, nn.Sequential(pool, *second)], TASKS, images(), split=[2, 4]),
    ]
    for model in ways:
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ways[0].parameters())
        model.load_state_dict(dict(zip(model.state_dict(), ways[0].state_dict().values(), strict=True)))
        for task in TASKS:
            # the same kernels on the same numbers
            torch.testing.assert_close(model(images())[task], ways[0](images())[task], rtol=0, atol=0)


def test_output_has_the_size_of_the_trunks_own() -> None:
    model = MTAN([(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))], TASKS, images())
    assert model(images())["depth"].shape == (4, 4, 4, 4)
    assert model(torch.randn(2, 3, 12, 10))["depth"].shape == (2, 4, 6, 5)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_the_probe_leaves_no_trace_but_makes_lazy_parameters() -> None:
    part = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1))
    part[1].eval()
    state = torch.get_rng_state()
    weight = part[3].weight.detach().clone()
    model = MTAN([(part[:3], part[3])], TASKS, images(), split=1)
    assert not torch.equal(torch.get_rng_state(), state)  # lazy and attention parameters are drawn
    assert part[0].weight.shape == (4, 3, 3, 3)
    assert (part[1].num_batches_tracked, part[1].running_mean.any()) == (0, False)
    assert (part[0].training, part[1].training, part[2].training, model.training) == (True, False, True, True)
    assert part[3].weight.grad is None
    assert torch.equal(part[3].weight, weight)
    assert any(p is part[3].weight for p in model.parameters())


def test_attention_belongs_to_its_task() -> None:
    torch.manual_seed(0)
    model = MTAN([block(3, 4), block(5, 6, 2)], TASKS, images())
    model(images())["depth"].square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == ("task_seg" in name), name
        # a bias in front of a BatchNorm has no effect and a gradient of zero
        assert p.grad is None or name.endswith("bias") or p.grad.any(), name


@pytest.mark.parametrize("share_output", [True, False])
def test_conflicts_are_resolved_on_trunk_and_shared_outputs(share_output: bool) -> None:
    torch.manual_seed(0)
    model = MTAN([block(3, 4), block(5, 6, 2)], TASKS, images(), share_output=share_output).double()

    def losses() -> dict[str, Tensor]:
        features = model(images().double())
        return {"seg.mask": features["seg.mask"].mean(), "depth": -(features["depth"] ** 2).mean()}

    model.eval()
    gradients = {}
    for task in TASKS:  # a graph each
        gradients[task] = torch.autograd.grad(losses()[task], list(model.parameters()), allow_unused=True)
    shared = {id(p) for p in model.shared_parameters()}
    for p, *found in zip(model.parameters(), *gradients.values(), strict=True):
        assert (id(p) in shared) == all(g is not None for g in found)
    update = detente.backward(losses(), detente.CAGrad(c=0.4))
    weights = [float(w) for w in update.weights.values()]
    for p, *found in zip(model.parameters(), *gradients.values(), strict=True):
        if id(p) in shared:
            close(p.grad, sum(w * g for w, g in zip(weights, found, strict=True)))
        else:
            close(p.grad, next(g for g in found if g is not None))


def test_state_dict_round_trip() -> None:
    model = MTAN([block(3, 4), block(5, 6, 2)], TASKS, images())
    model(images())
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = MTAN([block(3, 4), block(5, 6, 2)], TASKS, images())
    other.load_state_dict(torch.load(stream, weights_only=True))
    for task in TASKS:
        assert torch.equal(other.eval()(images())[task], model.eval()(images())[task])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MTAN([], TASKS, images()), ValueError, "blocks is empty"),
        (lambda: MTAN([block(3, 4)], (), images()), ValueError, "at least one task"),
        (lambda: MTAN([nn.Conv2d(3, 4, 1)], TASKS, images()), TypeError, r"blocks\[0\] must be.*got Conv2d"),
        (lambda: MTAN([(nn.ReLU(),)], TASKS, images()), TypeError, r"\(first, rest\)"),
        (lambda: MTAN([block(3, 4)], TASKS, images(), split=4), ValueError, "split must be from 1 to 3"),
        (lambda: MTAN([nn.Sequential(nn.ReLU())], TASKS, images()), ValueError, "cannot be cut"),
        (lambda: MTAN([block(3, 4)], TASKS, images(), split=[1, 2]), ValueError, "expected 1; got 2"),
        (lambda: MTAN([(nn.ReLU(), nn.Flatten())], TASKS, images()), ValueError, r"blocks\[0\]: its last.*\(4, 192\)"),
        (lambda: AttentionModule(0, 4), ValueError, "inputs must be"),
        (lambda: AttentionModule(3, 4, middle=-1), ValueError, "middle must be"),
        (
            lambda: AttentionModule(5, 3)(images(), images()),
            ValueError,
            r"expected 5 channels.*and 3 of p; got 3 \+ 0 and 3",
        ),
    ],
)
def test_bad_arguments(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()

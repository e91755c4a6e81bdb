"""Methods as a user writes them on the command line."""

from __future__ import annotations

import pytest

import detente
from detente.benchmark.specs import Spec, parse_methods


def labels(text: str) -> list[str]:
    return [spec.label for spec in parse_methods(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cagrad", ["gd", "cagrad"]),
        ("cagrad(c=0.8)", ["gd", "cagrad(c=0.8)"]),
        (" cagrad( c = .80 ) , mgda ", ["gd", "cagrad(c=0.8)", "mgda"]),
        ("cagrad(c=0.8, rescale=1),mgda", ["gd", "cagrad(c=0.8, rescale=1)", "mgda"]),
        ("connection-strength", ["gd", "connection_strength"]),
        ("loss-power(gamma=2)", ["gd", "loss_power(gamma=2)"]),
        ("wpcgrad(priority=loss_power(gamma=2))", ["gd", "wpcgrad(priority=loss_power(gamma=2))"]),
        ("wpcgrad(priority=dwa),edm", ["gd", "wpcgrad(priority=dwa)", "edm"]),
        ("cagrad()", ["gd", "cagrad"]),
        ("mgda,gd,edm", ["gd", "mgda", "edm"]),
        ("gd", ["gd"]),
        ("gd(weights=[1, 2])", ["gd", "gd(weights=[1, 2])"]),
        ("pcgrad,cagrad,pcgrad", ["gd", "pcgrad", "cagrad"]),
        ("cagrad(c=.4),cagrad(c=0.40),cagrad", ["gd", "cagrad(c=0.4)", "cagrad"]),
        ("mgda,", ["gd", "mgda"]),
    ],
)
def test_labels_are_canonical_distinct_and_start_with_equal_weights(text, expected):
    assert labels(text) == expected


def test_all_is_every_method_once():
    assert labels("all")[0] == "gd"
    assert sorted(labels("all")) == sorted(detente.list_methods())
    assert labels("all,cagrad(c=0.8)") == [*labels("all"), "cagrad(c=0.8)"]


def test_options_reach_the_method_and_the_one_inside_it():
    assert Spec.parse("cagrad(c=0.8)").build().c == 0.8
    built = Spec.parse("wpcgrad(priority=loss_power(gamma=2), mode='anchor')").build()
    (priority,) = [m for m in built.modules() if isinstance(m, detente.LossPower)]
    assert priority.gamma == 2


def test_the_seed_of_the_run_seeds_the_draws_unless_the_options_do():
    assert Spec.parse("pcgrad").build(seed=4).seed == 4
    assert Spec.parse("pcgrad(seed=9)").build(seed=4).seed == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cagard", "unknown method 'cagard'. Did you mean 'cagrad'"),
        ("mgda,pc-grd", "Did you mean 'pcgrad'"),
        ("wpcgrad(priority=dvva(x=1))", "unknown method 'dvva'"),
        ("cagrad(d=1)", "no option 'd'"),
        ("cagrad(c=-1)", "c must be a finite number >= 0; got -1"),
        ("cagrad(c='big')", r"\bc\b.*'big'"),
        ("cagrad(c=big)", "cannot read the value of c"),
        ("cagrad(0.8)", "name every option"),
        ("cagrad(c=1, c=2)", "c"),
        ("cagrad(**{'c': 1})", "cagrad"),
        ("pcgrad(seed='x')", "seed"),
        ("wpcgrad(mode='none')", "mode must be one of"),
        ("connection_strength(nonsense=1)", "no option 'nonsense'"),
        ("cagrad(c=0.8", "cannot read the method"),
        ("cagrad)c(", "cannot read the method"),
        ("cagrad mgda", "cannot read the method"),
        ("cagrad.c", "cannot read the method"),
        ("1 + 1", "cannot read the method"),
        ("", "cannot read the methods"),
        (" , ", "cannot read the methods"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_says_so(text, message):
    with pytest.raises(ValueError, match=message):
        parse_methods(text)

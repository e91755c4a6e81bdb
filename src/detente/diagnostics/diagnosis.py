"""What a recording means, in plain words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detente.diagnostics.recording import Array, Recording
from detente.method import LossWeighting, list_methods, method_class

__all__ = ["Answer", "Diagnosis", "diagnose"]

OPPOSED = -0.1
"""Mean cosine over the records below which two tasks pull against each other; minibatch noise scatters around 0."""
OPPOSED_IN_LAYER = -0.2
NEGLIGIBLE = 0.01
"""Share of the squared gradients below which a layer's fight is nobody's concern."""
UNEVEN, DROWNED = 4.0, 10.0
"""Ratio of the longest to the shortest task gradient, as the median over records."""
OFTEN = 0.25
NO_GAIN, GAIN = 0.7, 0.3
"""Mean cosine to the average gradient at which a study of many problems saw no gain, and large ones."""
FEW = 10
ODD = 0.2
"""Share of the records that may be on the wrong side of a date."""


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a few words, and what was seen."""

    question: str
    answer: str
    evidence: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        causes: of ``"conflict"`` (two tasks pull against each other in most of what they share), ``"local conflict"``
            (in some layers only), ``"dominance"`` (one gradient drowns another), ``"overshoot"`` (steps too long for
            the losses' curvature), those that were found.
        headline: all of it in a sentence.
        answers: question by question.
        pairs: names of the tasks that pull against each other.
        layers: names of the layers in which they do.
    """

    causes: tuple[str, ...]
    headline: str
    answers: tuple[Answer, ...]
    pairs: tuple[tuple[str, str], ...]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        lines = textwrap.wrap(self.headline, 100)
        for answer in self.answers:
            lines += ["", f"{answer.question} {answer.answer}"]
            lines += textwrap.wrap(answer.evidence, 98, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(lines)


def diagnose(recording: Recording, problem: str | None = None) -> Diagnosis:
    """Say in words what was recorded: whether tasks conflict, where, since when, and what may help at what price.

    Args:
        recording: of a training.
        problem: what `detente compare` would be given, for the commands that are proposed.

    Example:
        >>> import detente, torch, tempfile
        >>> model = torch.nn.Linear(2, 2)
        >>> recorder = detente.Recorder(model, tempfile.mkdtemp() + "/run.jsonl", every=1)
        >>> for _ in range(12):
        ...     out = model(torch.ones(1, 2)).sum()
        ...     observation = recorder.observe({"up": out, "down": -out})
        >>> found = diagnose(detente.diagnostics.Recording.load(recorder.path))
        >>> found.causes, found.pairs
        (('conflict',), (('up', 'down'),))
    """
    return _Case(recording, problem).diagnosis()


class _Case:
    def __init__(self, recording: Recording, problem: str | None) -> None:
        self.r = recording
        self.problem = problem or "my_problem.py"
        self.named = {(i, j): f"{recording.tasks[i]} and {recording.tasks[j]}" for i, j in recording.pairs}
        self.means = {pair: _level(recording.cosines[:, pair[0], pair[1]]) for pair in recording.pairs}
        self.opposed = [pair for pair, mean in sorted(self.means.items(), key=lambda e: e[1]) if mean < OPPOSED]
        worst, self.layer_means = [], np.full(len(recording.layers), np.nan)
        for k in range(len(recording.layers)):
            found = {p: _level(recording.layer_cosines[:, k, p[0], p[1]]) for p in recording.pairs}
            found = {p: mean for p, mean in found.items() if np.isfinite(mean)}
            pair = min(found, key=found.__getitem__, default=None)
            worst.append(pair)
            self.layer_means[k] = np.nan if pair is None else found[pair]
        self.worst = worst
        squares = np.nan_to_num(recording.layer_norms) ** 2
        self.shares = squares.sum((0, 2)) / max(squares.sum(), np.finfo(float).tiny)
        self.fighting = [
            k for k, mean in enumerate(self.layer_means) if mean < OPPOSED_IN_LAYER and self.shares[k] >= NEGLIGIBLE
        ]
        self.ratio = _median(np.array([_ratio(row) for row in recording.norms]))
        self.lengths = np.array([_median(norms) for norms in recording.norms.T])
        self.to_mean = _mean(recording.to_mean)
        there = np.isfinite(recording.predicted) & np.isfinite(recording.realised)
        down = there & (recording.predicted < 0)
        self.overshooting = float((down & (recording.realised > 0)).sum() / down.sum()) if down.any() else np.nan
        known = np.isfinite(recording.predicted)
        self.uphill = {
            task: float((recording.predicted[:, t] > 0).sum() / known[:, t].sum())
            for t, task in enumerate(recording.tasks)
            if known[:, t].any()
        }

    # -- what was found

    @property
    def known(self) -> bool:
        """Whether two tasks were ever seen on a parameter that they share."""
        return any(np.isfinite(mean) for mean in self.means.values())

    @property
    def local(self) -> bool:
        """Whether the fight is about a minority of what is shared."""
        known = int(np.isfinite(self.layer_means).sum())
        return bool(self.fighting) and len(self.fighting) <= known / 2

    @property
    def dominated(self) -> bool:
        return self.ratio >= DROWNED

    @property
    def causes(self) -> tuple[str, ...]:
        found = []
        if self.opposed or self.fighting:
            found.append("local conflict" if self.local else "conflict")
        if self.dominated:
            found.append("dominance")
        if self.overshooting > OFTEN:
            found.append("overshoot")
        return tuple(found)

    def diagnosis(self) -> Diagnosis:
        pairs = self.opposed or [p for k in self.fighting if (p := self.worst[k]) is not None]
        answers = [self.conflict(), self.where(), self.since(), self.drowning()]
        answers += [self.steps()] if np.isfinite(self.overshooting) or self.uphill else []
        answers += [self.likely(), self.first(), self.price()]
        return Diagnosis(
            causes=self.causes,
            headline=self.headline(),
            answers=tuple(answers),
            pairs=tuple((self.r.tasks[i], self.r.tasks[j]) for i, j in dict.fromkeys(pairs)),
            layers=tuple(self.r.layers[k] for k in self.fighting),
        )

    def headline(self) -> str:
        said = []
        if "local conflict" in self.causes:
            _, pair = self._fiercest()
            said.append(f"{self.named[pair]} pull against each other, but only in {self._layers(self.fighting)}")
        elif "conflict" in self.causes:
            pairs = self.opposed or [p for k in self.fighting if (p := self.worst[k]) is not None][:1]
            names = [self.named[p] for p in pairs[:3]]
            more = f" (and {len(pairs) - 3} more pairs)" if len(pairs) > 3 else ""
            said.append(f"{'; '.join(names)}{more} pull against each other in most of the shared network")
        if "dominance" in self.causes:
            long, short = self._extremes()
            said.append(f"the gradient of {long} drowns that of {short}: it is {self.ratio:.0f} times as long")
        if "overshoot" in self.causes:
            said.append("steps are longer than the losses' curvature allows")
        if not said:
            return "No conflict was seen, and no task's gradient drowns the others. " + (
                "Plain training on the sum of the losses is what to stay with."
            )
        text = "; ".join(said)
        return text[0].upper() + text[1:] + "."

    # -- question by question

    def conflict(self) -> Answer:
        question = "Do the tasks conflict?"
        count = int(np.isfinite(self.r.norms).any(1).sum())
        caution = f" With {count} records this is a first impression: record more steps." if count < FEW else ""
        if not self.known:
            return Answer(question, "Not known.", "No two tasks were seen together on a parameter that they share.")
        listed = sorted((mean, pair) for pair, mean in self.means.items() if np.isfinite(mean))
        shown = [
            f"{self.named[p]} {mean:+.2f}{self._lately(p)} (negative in {self._negative(p):.0%})"
            for mean, p in listed[:4]
        ]
        evidence = f"Mean cosine of their gradients over {count} records: {'; '.join(shown)}"
        evidence += f", and {len(listed) - 4} more pairs above." if len(listed) > 4 else "."
        if self.opposed:
            answer = "Yes." if self.means[self.opposed[0]] < 3 * OPPOSED else "Somewhat."
        elif self.fighting:
            answer = "In places: over the whole network the cosines hide it."
        else:
            answer = "No."
            evidence += (
                " Cosines that scatter around 0 are unrelated tasks and minibatch noise, not a conflict, even where"
                " half of them are negative."
            )
        return Answer(question, answer, evidence + caution)

    def where(self) -> Answer:
        question = "Where in the network?"
        if not self.fighting:
            if not self.known:
                return Answer(question, "Not known.", "See above.")
            lowest = int(np.nanargmin(self.layer_means))
            low = f"The lowest mean cosine of a layer is {self.layer_means[lowest]:+.2f}, in {self.r.layers[lowest]}."
            return Answer(question, "Nowhere in particular.", low)
        order = sorted(self.fighting, key=lambda k: self.layer_means[k])
        shown = []
        for k in order[:5]:
            pair = self.worst[k]
            assert pair is not None
            shown.append(
                f"{self.r.layers[k]}: {self.named[pair]} {self.layer_means[k]:+.2f}, {self.shares[k]:.0%} of the "
                "squared gradients"
            )
        rest = [k for k, mean in enumerate(self.layer_means) if np.isfinite(mean) and k not in self.fighting]
        evidence = "; ".join(shown) + (f"; and {len(order) - 5} more." if len(order) > 5 else ".")
        if rest:
            lowest = min(self.layer_means[rest])
            evidence += f" In the other {len(rest)} layers the lowest mean cosine is {lowest:+.2f}."
        answer = f"Only in {self._layers(self.fighting)}." if self.local else "In most layers."
        return Answer(question, answer, evidence)

    def since(self) -> Answer:
        question = "Since when?"
        if not self.opposed and not self.fighting:
            return Answer(question, "-", "There is no conflict to date.")
        if self.opposed and not self.local:
            pair = self.opposed[0]
            series, of = self.r.cosines[:, pair[0], pair[1]], self.named[pair]
        else:
            k, pair = self._fiercest()
            series = self.r.layer_cosines[:, k, pair[0], pair[1]]
            of = f"{self.named[pair]} in {self.r.layers[k]}"
        answer = _dated(series, self.r.steps)
        third = max(len(series) // 3, 1)
        evidence = f"Mean cosine of {of}: {_mean(series[:third]):+.2f} in the first third of the records, "
        return Answer(question, answer, evidence + f"{_mean(series[-third:]):+.2f} in the last.")

    def drowning(self) -> Answer:
        question = "Does one task's gradient drown the others?"
        if not np.isfinite(self.ratio):
            return Answer(question, "Not known.", "Never were two tasks with a gradient in the same step.")
        lengths = [f"{task} {length:.3g}" for task, length in zip(self.r.tasks, self.lengths, strict=True)]
        shown = ", ".join(lengths[:8]) + (", ..." if len(lengths) > 8 else "")
        evidence = f"Median lengths: {shown}; the longest is {self.ratio:.1f} times the shortest."
        if self.ratio < UNEVEN:
            return Answer(question, "No.", evidence)
        long, short = self._extremes()
        toward = _mean(self.r.to_mean[:, self.r.tasks.index(short)])
        evidence += (
            f" The mean gradient points where {long} wants: {short}'s own has a cosine of {toward:+.2f} to it. A loss"
            " in another unit is the usual reason, and no conflict."
        )
        return Answer(question, f"Yes: {long}." if self.dominated else f"They are uneven: {long} leads.", evidence)

    def steps(self) -> Answer:
        question = "Do the steps do what they should?"
        said, answer = [], "Yes."
        if np.isfinite(self.overshooting):
            said.append(
                f"Of the losses that a step should have lowered by its gradient, {self.overshooting:.0%} rose on the "
                "same samples."
            )
            if self.overshooting > OFTEN:
                answer = "No: they overshoot, which is the learning rate's fault and not another task's."
        pushed = {task: share for task, share in self.uphill.items() if share > OFTEN}
        if pushed:
            listed = ", ".join(f"{task} in {share:.0%}" for task, share in sorted(pushed.items(), key=lambda e: -e[1]))
            said.append(f"Pushed uphill by the others (first order), of the recorded steps: {listed}.")
            answer = answer if answer != "Yes." else "Not for all tasks."
        elif self.uphill:
            most = max(self.uphill.values())
            rarely = f" in more than {most:.0%} of the recorded steps" if most else ""
            said.append(f"No task is pushed uphill by the others{rarely} (first order).")
        return Answer(question, answer, " ".join(said))

    def likely(self) -> Answer:
        question = "Is a method likely to pay?"
        count = len(self.r.tasks)
        evidence = (
            f"The mean cosine of a task's gradient to the average of all is {self.to_mean:.2f}. In a study of many "
            f"problems, methods gained nothing where it was about {NO_GAIN}, and much where it was about {GAIN}; "
            f"unrelated tasks with gradients of one length would have {count**-0.5:.2f} here ({count} tasks)."
        )
        if not np.isfinite(self.to_mean):
            return Answer(question, "Not known.", "No task gradients were compared.")
        if not self.causes:
            answer = "Hardly." if self.to_mean > (NO_GAIN + GAIN) / 2 else "Perhaps a little."
        elif self.causes == ("overshoot",):
            answer = "Not before the learning rate is right."
        elif self.causes[0] == "dominance":
            answer = "Balancing the losses is; resolving conflicts is not."
        elif self.to_mean < (NO_GAIN + GAIN) / 2:
            answer = "It is worth a try."
        else:
            answer = "Perhaps, where they fight." if self.local else "Perhaps."
        return Answer(
            question,
            answer,
            evidence + " Tuned equal weights are the bar: `detente compare` tells whether it is cleared.",
        )

    def first(self) -> Answer:
        question = "What to try first?"
        causes, said = self.causes, []
        if "overshoot" in causes:
            said.append("a lower learning rate, or clipping")
        if "dominance" in causes:
            weights = np.nanmin(self.lengths) / self.lengths
            listed = ", ".join(f"{t} {w:.2g}" for t, w in list(zip(self.r.tasks, weights, strict=True))[:8])
            said.append(
                f"fixed weights that bring the gradients to one length ({listed}), or a learned loss weighting, `uw`, "
                "at no cost"
            )
        if "local conflict" in causes:
            names = [self.r.layers[k] for k in self.fighting]
            said.append(
                f"layers of their own where they fight (`detente.nn.convert_task_layers(model, tasks, {names[:4]})`), "
                'or a method per layer (`granularity="layer"`)'
            )
        if "conflict" in causes:
            said.append("`cagrad` for the worst-off task, `pcgrad`, or `wpcgrad` where one task matters most")
        if not causes:
            answer = "Nothing: tune the learning rate and the weights of the plain sum."
            return Answer(question, answer, f"detente compare {self.problem} --methods gd --sweep 9 --tune 8")
        methods = {
            "dominance": ["uw", "imtl_g"],
            "conflict": ["cagrad", "pcgrad"],
            "local conflict": ["cagrad", "pcgrad"],
        }
        tried = ["gd", *dict.fromkeys(name for cause in causes for name in methods.get(cause, []))]
        text = "; then ".join(said)
        return Answer(
            question,
            text[0].upper() + text[1:] + ".",
            f"Then let the same budget decide: detente compare {self.problem} --methods {','.join(tried)} --tune 8",
        )

    def price(self) -> Answer:
        question = "What will it cost per step?"
        step, passes = _median(self.r.step_ms), _median(self.r.gradients_ms)
        count = len(self.r.tasks)
        if not (np.isfinite(step) and np.isfinite(passes) and step > 0):
            return Answer(question, "Not known.", "Only one step was timed.")
        taken = {name for name in self.r.methods if name}
        listed = set(list_methods())
        costly = {n for n in taken if n in listed and not issubclass(method_class(n), LossWeighting)}
        if costly:
            answer = f"You pay it now: {step:.3g} ms a step with {', '.join(sorted(costly))}."
            return Answer(question, answer, f"One backward pass per task ({count}) takes {passes:.3g} ms of it.")
        more = 1 + passes * (1 - 1 / count) / step
        evidence = (
            f"A step of this loop takes {step:.3g} ms, one backward pass per task ({count}) {passes:.3g} ms. About: "
            f"methods on all task gradients {more:.2f} times a step of now; with source=detente.Every(10) "
            f"{1 + (more - 1) / 10:.2f} times; loss weightings 1.00 times."
        )
        return Answer(question, f"{more:.1f} times a step, or nothing with a loss weighting.", evidence)

    # -- words

    def _fiercest(self) -> tuple[int, tuple[int, int]]:
        """The layer with the lowest cosine among those that are fought over, and the pair that fights."""
        k = min(self.fighting, key=lambda k: self.layer_means[k])
        pair = self.worst[k]
        assert pair is not None
        return k, pair

    def _lately(self, pair: tuple[int, int]) -> str:
        series = self.r.cosines[:, pair[0], pair[1]]
        return " in their last third" if self.means[pair] != _mean(series) else ""

    def _negative(self, pair: tuple[int, int]) -> float:
        series = self.r.cosines[:, pair[0], pair[1]]
        series = series[np.isfinite(series)]
        return float((series < 0).mean()) if len(series) else np.nan

    def _extremes(self) -> tuple[str, str]:
        positive = np.where(self.lengths > 0, self.lengths, np.nan)
        return self.r.tasks[int(np.nanargmax(positive))], self.r.tasks[int(np.nanargmin(positive))]

    def _layers(self, which: Sequence[int]) -> str:
        """Names of layers, by their common module where that says it shorter."""
        names = [self.r.layers[k] for k in which]
        others = [name for k, name in enumerate(self.r.layers) if k not in which and np.isfinite(self.layer_means[k])]
        first = names[0].split(".")
        for depth in range(1, len(first)):
            prefix = ".".join(first[:depth]) + "."
            if all(name.startswith(prefix) for name in names) and not any(o.startswith(prefix) for o in others):
                return prefix[:-1]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more layers" if len(names) > 4 else "")


def _dated(series: Array, steps: NDArray[np.int64]) -> str:
    there = np.isfinite(series)
    series, steps = series[there], steps[there]
    window = max(min(5, len(series)), len(series) // 20)
    smooth = np.convolve(series, np.ones(window) / window, mode="valid")
    middle = steps[window // 2 : window // 2 + len(smooth)]
    below = smooth < OPPOSED
    count = len(below)
    before = np.concatenate([[0], np.cumsum(below)])  # how many of the first k are below
    begins = before + (count - np.arange(count + 1)) - (before[-1] - before)  # errors of "not before k, always after"
    ends = count - begins
    if begins.min() <= min(ends.min(), ODD * count):
        k = int(begins.argmin())
        return "From the first recorded step on." if k == 0 else f"Since about step {middle[min(k, count - 1)]}."
    if ends.min() <= ODD * count:
        k = int(ends.argmin())
        return f"Until about step {middle[min(k, count - 1)]}; not at the end."
    return "On and off."


def _ratio(norms: Array) -> float:
    positive = norms[np.isfinite(norms) & (norms > 0)]
    return float(positive.max() / positive.min()) if len(positive) > 1 else np.nan


def _level(series: Array) -> float:
    """Mean cosine over the records; or over their last third, where it is lower there and not by chance."""
    everywhere = _mean(series)
    last = series[-(len(series) // 3) :]
    last = last[np.isfinite(last)]
    if len(last) < FEW // 2:
        return everywhere
    lately = float(last.mean())
    return lately if lately < everywhere and lately < -2 * float(last.std()) / len(last) ** 0.5 else everywhere


def _mean(values: Array) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else np.nan


def _median(values: Array) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else np.nan

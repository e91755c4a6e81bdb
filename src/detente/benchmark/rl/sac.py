"""Multi-task soft actor-critic (Haarnoja et al. 2018; Yu et al. 2019), whose gradients any method may combine.

One actor and two critics share their layers among the tasks. Every task has its own environment, replay buffer and
temperature. An update draws a batch from every buffer, lays them end to end, and puts them through the networks once;
loss t is the mean over the part of task t. The parts are disjoint, so one backward pass gives all task gradients
(`detente.Disjoint`). The method resolves those of the critics and those of the actor, each with a history of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import detente
from detente.benchmark.device import clock
from detente.benchmark.files import describe
from detente.benchmark.job import Job
from detente.benchmark.log import Log
from detente.benchmark.randomness import seed
from detente.benchmark.rl.metaworld import ACTIONS, HORIZON, OBSERVATIONS, Array, environments, film, success
from detente.benchmark.rl.rates import FILM, sheet
from detente.benchmark.rl.replay import Replay
from detente.benchmark.specs import Spec
from detente.benchmark.training import Training
from detente.method import GramianMethod, Method, method_class
from detente.methods import AutoLambda

__all__ = ["SETTINGS", "SoftActorCritic", "check"]

SETTINGS: dict[str, Any] = {
    "epochs": 16,  # each ends with an evaluation
    "episodes": 4,  # per task and epoch
    "horizon": 150,  # steps of a training episode
    "evaluation_horizon": HORIZON,  # steps after which an episode of an evaluation has failed
    "goals": 30,  # training goals per task
    "warm_up": 3,  # further episodes, of random actions, before the first update
    "updates": 1,  # per step of all environments
    "batch_size": 64,  # transitions per task
    "capacity": 100_000,  # transitions per task that the buffer keeps
    "hidden": 128,
    "layers": 2,
    "heads": True,  # an output layer per task; false: one for all, which sees the task as a one-hot input
    "lr": 1e-3,
    "gamma": 0.99,
    "tau": 0.005,
    "sampled": 0,  # tasks whose gradients are taken, CAGrad-Fast; 0 for all
    "evaluated": 5,  # episodes per task of an evaluation
    "frames": 6,  # per task, of the pictures of the first seed's last policy; 0 for none
}
REWARD = 10.0  # the greatest of a step
BOUNDS = -20.0, 2.0  # of the logarithm of the policy's standard deviation


class Network(nn.Module):
    """Linear layers with ReLU that all tasks share; above them one output layer per task, or one for all."""

    def __init__(self, inputs: int, outputs: int, tasks: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.tasks, self.heads = tasks, bool(settings["heads"])
        hidden = settings["hidden"]
        sizes = [inputs + (0 if self.heads else tasks), *[hidden] * settings["layers"]]
        shared = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(sizes)]
        self.trunk = nn.Sequential(*shared)
        self.outputs = nn.ModuleList(nn.Linear(hidden, outputs) for _ in range(tasks if self.heads else 1))

    def shared(self) -> list[Tensor]:
        """Parameters that all tasks share."""
        return list(self.trunk.parameters() if self.heads else self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [T * B, O] for inputs [T * B, I], those of task 0 first."""
        if not self.heads:
            names = torch.eye(self.tasks, dtype=x.dtype, device=x.device).repeat_interleave(len(x) // self.tasks, 0)
            output: Tensor = self.outputs[0](self.trunk(torch.cat([x, names], 1)))
            return output
        parts = self.trunk(x).chunk(self.tasks)
        return torch.cat([head(part) for head, part in zip(self.outputs, parts, strict=True)])


class SoftActorCritic(Training):
    """The training of one policy on several tasks."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        settings = job.settings
        if not settings["gamma"] < 1:
            raise ValueError(f"gamma must be below 1; got {settings['gamma']}.")
        # no value is greater, nor any density's logarithm below -3: with it the actor's losses are what is missing to
        # the best, and positive, as some methods need them; gradients do not see it
        self.most = REWARD / (1 - settings["gamma"]) + 10
        seed(job.seed)
        count = len(self.tasks)
        self.counts = dict.fromkeys(self.tasks, settings["batch_size"])
        self.actor = Network(OBSERVATIONS, 2 * ACTIONS, count, settings).to(self.device)
        critics = [Network(OBSERVATIONS + ACTIONS, 1, count, settings).to(self.device) for _ in range(2)]
        self.critics = nn.ModuleList(critics)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.temperatures = nn.Parameter(torch.zeros(count, device=self.device))  # logarithms
        networks = [self.actor, self.critics]
        how = {"lr": settings["lr"], "weight_decay": settings["weight_decay"], "fused": True}
        self.optimizers = [torch.optim.Adam(network.parameters(), **how) for network in networks]
        self.warmth = torch.optim.Adam([self.temperatures], lr=settings["lr"])
        self.for_actor, self.for_critics = (
            self.spec.build(network, settings["epochs"], job.seed + k) for k, network in enumerate(networks)
        )
        self.sources = [self._source(method) for method in self.methods]
        # the output layers are the tasks' own, although their outputs are joined
        self.shared = [self.actor.shared(), [p for critic in critics for p in critic.shared()]]
        for optimizer in self.optimizers:
            self.clip(optimizer)
        self.buffer = Replay(count, settings["capacity"], job.seed)
        self.random = np.random.default_rng(job.seed)
        # of the observations before the first update
        self.mean, self.deviation = torch.zeros(OBSERVATIONS), torch.ones(OBSERVATIONS)
        self.environments: Any = None
        self.rates: dict[str, dict[str, float]] = {}  # of the last epoch's training episodes
        self.saved |= {
            "actor": self.actor,
            "critics": self.critics,
            "targets": self.targets,
            "actor's optimizer": self.optimizers[0],
            "critics' optimizer": self.optimizers[1],
            "temperatures' optimizer": self.warmth,
            "actor's method": self.for_actor,
            "critics' method": self.for_critics,
            "replay": self.buffer,
            "rest": self,
        }
        self.saved |= {
            f"source {k}": source for k, source in enumerate(self.sources) if isinstance(source, detente.Sampled)
        }

    def state_dict(self) -> dict[str, Any]:
        """What has no state of its own."""
        return {
            "temperatures": self.temperatures.detach(),
            "random": self.random.bit_generator.state,
            "mean": self.mean,
            "deviation": self.deviation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.temperatures.copy_(state["temperatures"])
        self.random.bit_generator.state = state["random"]
        self.mean, self.deviation = state["mean"], state["deviation"]

    def _source(self, method: Method) -> Any:
        """Which gradients an update takes; methods with a schedule of their own, and weightings, allow no choice."""
        if not isinstance(method, GramianMethod) or method.requires_step or len(self.tasks) == 1:
            return "parameters"
        if self.job.settings["sampled"]:
            return detente.Sampled(self.job.settings["sampled"], seed=self.job.seed)
        return detente.Disjoint([self.job.settings["batch_size"]] * len(self.tasks))

    @property
    def methods(self) -> Sequence[Method]:
        return self.for_actor, self.for_critics

    @property
    def parameters(self) -> int:
        return sum(p.numel() for network in (self.actor, self.critics) for p in network.parameters())

    # -- acting

    def _policy(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation, [T * B, 4] each, before the squashing by tanh."""
        mean, spread = self.actor(observations).chunk(2, dim=1)
        return mean, spread.clamp(*BOUNDS)

    def _act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [T * B, 4], and the logarithms of their densities [T * B]."""
        mean, spread = self._policy(observations)
        raw = mean + spread.exp() * noise
        gaussian = -0.5 * noise.square() - spread - 0.5 * math.log(2 * math.pi)
        squashed = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh^2), without cancellation
        return raw.tanh(), (gaussian - squashed).sum(1)

    def _seen(self, observations: Tensor) -> Tensor:
        """What the networks see of observations [N, 39]: positions a few centimetres apart, told apart."""
        scaled: Tensor = (observations - self.mean) / self.deviation
        return scaled.to(self.device)

    @torch.no_grad()
    def _explore(self, observations: Array) -> Array:
        seen = self._seen(torch.from_numpy(observations).float())
        actions, _ = self._act(seen, torch.randn(len(seen), ACTIONS, device=self.device))
        return actions.cpu().double().numpy()

    def _evaluated(self, k: int) -> Callable[[Array], Array]:
        """The mean action of task k, for one observation at a time."""

        @torch.no_grad()
        def policy(observations: Array) -> Array:
            seen = self._seen(torch.from_numpy(observations).float())
            everyone = seen.repeat(len(self.tasks), 1)  # the network wants the same number of rows of every task
            mean, _ = self._policy(everyone)
            return mean.tanh().view(len(self.tasks), len(seen), ACTIONS)[k].cpu().double().numpy()

        return policy

    # -- updates

    def _parts(self, values: Tensor) -> dict[str, Tensor]:
        """The mean over the rows of each task."""
        return dict(zip(self.tasks, values.view(len(self.tasks), -1).mean(1).unbind(), strict=True))

    def _update(self, log: Log, probing: bool) -> None:
        observations, actions, rewards, following = self.buffer.sample(self.job.settings["batch_size"])
        observations, following = self._seen(observations), self._seen(following)
        actions, rewards = actions.to(self.device), rewards.to(self.device)
        temperatures = self.temperatures.detach().exp().repeat_interleave(self.job.settings["batch_size"])
        noise = torch.randn(2, len(actions), ACTIONS, device=self.device)
        with torch.no_grad():
            ahead, density = self._act(following, noise[0])
            both = [critic(torch.cat([following, ahead], 1)).squeeze(1) for critic in self.targets]
            value = torch.minimum(*both) - temperatures * density
            goal = rewards + self.job.settings["gamma"] * value

        def critics_losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
            joined = torch.cat([observations, actions], 1)
            errors = [critic(joined).squeeze(1) - goal for critic in self.critics]
            found = self._parts(torch.stack(errors).square().sum(0))
            return {task: found[task] for task in tasks}

        densities: list[Tensor] = []

        def actor_losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
            chosen, density = self._act(observations, noise[1])
            densities.append(density.detach())
            both = [critic(torch.cat([observations, chosen], 1)).squeeze(1) for critic in self.critics]
            found = self._parts(temperatures * density - torch.minimum(*both) + self.most)
            return {task: found[task] for task in tasks}

        log.step()
        self._step(1, critics_losses, log, probing)
        self.critics.requires_grad_(False)  # the actor's gradient goes through them, not into them
        self._step(0, actor_losses, log, probing)
        self.critics.requires_grad_(True)
        self.warmth.zero_grad()
        surprise = self._parts(densities[0] - ACTIONS)  # the target entropy is -4
        (-self.temperatures.exp() * torch.stack(list(surprise.values()))).sum().backward()  # type: ignore[no-untyped-call]
        self.warmth.step()
        with torch.no_grad():
            slow, fast = (list(network.parameters()) for network in (self.targets, self.critics))
            torch._foreach_lerp_(slow, fast, self.job.settings["tau"])  # type: ignore[arg-type]

    def _step(
        self, which: int, losses: Callable[[tuple[str, ...]], dict[str, Tensor]], log: Log, probing: bool
    ) -> None:
        optimizer = self.optimizers[which]
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        closure = self.closure(losses, log, trained if probing else None)
        method, source = self.methods[which], self.sources[which]
        update = detente.step(closure, optimizer, method, shared=self.shared[which], source=source)
        log.update(update, share=1 / len(self.methods))

    # -- an epoch

    def warm_up(self) -> None:
        """Building the environments is the larger part of it."""
        self.environments = environments(self.tasks, self.job.settings["horizon"])

    def train_epoch(self, log: Log, progress: Callable[[float], None]) -> None:
        settings = self.job.settings
        horizon, episodes = settings["horizon"], settings["episodes"]
        solved = np.zeros(len(self.tasks))
        random = 0 if self.epoch else settings["warm_up"]
        self.environments.call("begin", "train", self.epoch * episodes, settings["goals"])
        observations, _ = self.environments.reset()  # every episode of the epoch but the first begins by itself
        for episode in range(-random, episodes):
            successful = np.zeros(len(self.tasks), dtype=bool)
            ready = episode >= 0
            if random and episode == 0:
                self.mean, self.deviation = self.buffer.moments()
            for step in range(horizon):
                if ready:
                    actions = self._explore(observations)
                else:
                    actions = self.random.uniform(-1, 1, (len(self.tasks), ACTIONS))
                following, rewards, _, ended, info = self.environments.step(actions.astype(np.float32))
                last = bool(ended.all())
                # an episode's end is no end of the task: the value goes on from what was seen last
                seen = np.stack(list(info["final_obs"])) if last else following
                self.buffer.add(observations, actions, rewards, seen)
                news = info["final_info"] if last else info
                successful |= np.asarray(news["success"]) > 0
                observations = following
                for k in range(settings["updates"] if ready else 0):
                    probing = (step * settings["updates"] + k) % settings["probe_every"] == 0
                    start = clock(self.device)
                    self._update(log, probing)
                    if not probing:
                        self.step_times.append(1000 * (clock(self.device) - start))
                progress((random + episode + (step + 1) / horizon) / (random + episodes))
            solved += successful * ready
        self.rates = {task: {"success": s / episodes} for task, s in zip(self.tasks, solved.tolist(), strict=True)}

    def figures(self, split: str) -> dict[str, dict[str, float]]:
        if split == "train":
            return self.rates
        episodes, horizon = (self.job.settings[key] for key in ("evaluated", "evaluation_horizon"))
        return {
            task: {"success": success(self._evaluated(k), task, split, episodes, horizon)}
            for k, task in enumerate(self.tasks)
        }

    def finish(self, directory: Path) -> None:
        """A sheet of pictures of the first seed's policy, where the machine can render any."""
        self.environments.close()
        frames = self.job.settings["frames"]
        if not frames or self.job.seed or self.job.task or self.job.trial is not None:
            return
        try:
            films = [film(self._evaluated(k), task, frames) for k, task in enumerate(self.tasks)]
        except Exception as error:
            (directory / "film.txt").write_text(f"no pictures: {describe(error)}\n")
            return
        sheet(films, self.tasks, directory / FILM)


def check(specs: Sequence[Spec]) -> None:
    """Raise where a method does not apply.

    Raises:
        ValueError: a method gives every task norms of its own, or looks at a second batch.
    """
    for spec in specs:
        wanted = method_class(spec.method)
        if "model" in wanted.needs:
            raise ValueError(
                f"{spec.method} gives every task norms of its own, and the networks of this problem have none. "
                "Leave it out, or compare it on mt10-bc."
            )
        if issubclass(wanted, AutoLambda):
            raise ValueError(f"{spec.method} looks at a second batch, which this training does not draw. Leave it out.")

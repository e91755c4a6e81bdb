"""Reinforcement learning in the style of torchrl: a loss module with a dict of ``loss_*``, and collected batches.

Actor, critic and entropy bonus share a trunk and pull on it in different directions. Nothing but PyTorch is needed:
the environment is a two-armed bandit whose better arm depends on what is seen. Run it with
``python examples/actor_critic.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import detente


class Agent(nn.Module):
    """A trunk, a policy over two actions and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.policy, self.value = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, seen: Tensor) -> tuple[Categorical, Tensor]:
        features = self.trunk(seen)
        return Categorical(logits=self.policy(features)), self.value(features).squeeze(-1)


class A2CLoss(nn.Module):
    """The losses of a batch, as torchrl's loss modules name them."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen, value = self.agent(batch["seen"])
        advantage = batch["reward"] - value.detach()
        return {
            "loss_policy": -(chosen.log_prob(batch["action"]) * advantage).mean(),
            "loss_value": (value - batch["reward"]).square().mean(),
            "loss_entropy": -0.01 * chosen.entropy().mean(),
        }


def collect(agent: Agent, batches: int, size: int = 256) -> Iterator[dict[str, Tensor]]:
    """Batches of what the agent saw, did and got."""
    for _ in range(batches):
        seen = torch.randn(size, 4)
        with torch.no_grad():
            action = agent(seen)[0].sample()
        better = (seen[:, 0] * seen[:, 1] > 0).long()
        yield {"seen": seen, "action": action, "reward": (action == better).to(seen.dtype)}


def main(batches: int = 300, method: detente.Method | None = None) -> list[float]:
    """Train; returns the mean reward of every batch."""
    torch.manual_seed(0)
    agent = Agent()
    losses_of = A2CLoss(agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    method = method or detente.CAGrad(c=0.4)
    rewards = []
    for batch in collect(agent, batches):
        losses = {name.removeprefix("loss_"): loss for name, loss in losses_of(batch).items()}
        optimizer.zero_grad()
        detente.backward(losses, method)
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        rewards.append(float(batch["reward"].mean()))
    return rewards


if __name__ == "__main__":
    rewards = main()
    print(f"mean reward: first ten batches {sum(rewards[:10]) / 10:.2f}, last ten {sum(rewards[-10:]) / 10:.2f}")

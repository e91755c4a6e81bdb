"""Transformers: a small BERT that classifies sequences and tags tokens.

Run it with ``python examples/transformers_example.py`` (needs ``pip install 'detente[transformers]'``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, TrainingArguments

import detente
from detente.integrations.transformers import MultiTaskTrainer


class Sequences(Dataset[dict[str, Tensor]]):
    """Random tokens. Are most of a sequence's tokens high? Does a token repeat the one before?"""

    def __init__(self, count: int = 128) -> None:
        self.tokens = torch.randint(0, 8, (count, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        majority = ((tokens >= 4).sum() > 6).long()
        return {"input_ids": tokens, "majority": majority, "repeats": (tokens == tokens.roll(1)).long()}


class Network(nn.Module):
    """The trunk is any model of the library; the tasks' heads stand beside it."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.trunk = BertModel(BertConfig(vocab_size=8, **size, **dropout), add_pooling_layer=False)
        self.majority, self.repeats = nn.Linear(32, 2), nn.Linear(32, 2)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        states = self.trunk(input_ids=input_ids).last_hidden_state
        return {"majority": self.majority(states[:, 0]), "repeats": self.repeats(states)}


class Trainer(MultiTaskTrainer):
    def compute_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = model(inputs["input_ids"])
        return {task: F.cross_entropy(outputs[task].flatten(0, -2), inputs[task].flatten()) for task in outputs}


def make_trainer(batch_size: int = 32, folder: str = "runs/transformers", **arguments: Any) -> Trainer:
    """``batch_size`` is that of one process; ``arguments`` are any TrainingArguments."""
    torch.manual_seed(0)
    settings = {"num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, **arguments}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {"remove_unused_columns": False, "label_names": ["majority", "repeats"]}
    told = TrainingArguments(folder, per_device_train_batch_size=batch_size, **settings)
    return Trainer(Network(), told, train_dataset=Sequences(), method=detente.CAGrad(c=0.4))


def main(**settings: Any) -> nn.Module:
    """Train; weights and conflicts stand beside the loss in everything that is logged."""
    trainer = make_trainer(**settings)
    trainer.train()
    return trainer.model


if __name__ == "__main__":
    main()

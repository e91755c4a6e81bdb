"""Scale-invariant loss."""

from __future__ import annotations

from torch import Tensor

from detente.method import Context, LossWeighting, Paper, at_least

__all__ = ["SI"]


class SI(LossWeighting):
    """SI: gradient descent on the sum of the logarithms of the losses.

    The scale-invariant baseline of Navon et al. (2022): rescaling a loss changes nothing. Its direction is that of
    :class:`GLS`. ::

        loss = sum_i log(L_i + e)
        w_i  = 1 / (L_i + e)

    Args:
        epsilon: e, added to every loss.

    Raises:
        ValueError: a loss is not positive; ``epsilon`` is negative.

    Limits:
        The loss nearest to 0 takes over: a loss of 0.000001 has ten million times the weight of a loss of 10. Nothing
        bounds the weights as losses fall, so that steps grow during training; ``epsilon`` bounds them. Losses that
        reach 0, such as a hinge loss, are an error without it.

    Example:
        >>> import torch, detente
        >>> detente.SI().weights(torch.tensor([4.0, 0.5])).tolist()
        [0.25, 2.0]
    """

    name = "si"
    paper = Paper(
        "navon2022multi",
        "Multi-Task Learning as a Bargaining Game",
        "Navon, Aviv and Shamsian, Aviv and Achituve, Idan and Maron, Haggai and Kawaguchi, Kenji and Chechik, Gal "
        "and Fetaya, Ethan",
        "International Conference on Machine Learning",
        2022,
        "2202.01017",
    )
    positive_losses = True

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__()
        self.epsilon = at_least("epsilon", epsilon, 0)

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        return 1 / (losses + self.epsilon)

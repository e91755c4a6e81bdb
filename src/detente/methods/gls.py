"""Geometric loss strategy."""

from __future__ import annotations

from torch import Tensor

from detente.method import Context, LossWeighting, Paper

__all__ = ["GLS"]


class GLS(LossWeighting):
    """GLS: gradient descent on the geometric mean of the losses.

    Chennupati et al. (2019). Rescaling a loss changes the length of the update but not its direction. ::

        loss = GM = (prod_i L_i)^(1 / T)
        w_i  = GM / (T L_i)

    Raises:
        ValueError: a loss is not positive.

    Limits:
        The loss nearest to 0 takes over and slows the rest: with losses 1 and 0.000001 the weights are 0.0005 and 500.
        Since the factor GM falls with every loss, steps shrink during training while the learning rate stays. On digits
        it trained one task at the cost of the other, 0.925 and 0.879 beside 0.908 and 0.913 for equal weights
        (``docs/results/digits.md``).

    Example:
        >>> import torch, detente
        >>> detente.GLS().weights(torch.tensor([4.0, 1.0])).tolist()
        [0.25, 1.0]
    """

    name = "gls"
    paper = Paper(
        "chennupati2019multinet",
        "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning",
        "Chennupati, Sumanth and Sistu, Ganesh and Yogamani, Senthil and Rawashdeh, Samir A.",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops",
        2019,
        "1904.08492",
    )
    positive_losses = True

    def rule(self, losses: Tensor, context: Context) -> Tensor:
        # in logarithms, so that no product under- or overflows
        return (losses.log().mean() - losses.log()).exp() / len(losses)

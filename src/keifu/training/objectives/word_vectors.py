"""Objective of word vectors: negative sampling (Mikolov et al., 2013, equation 4)."""

from torch import nn
from torch.nn.functional import softplus

from keifu.training.protocols import Batch, LossOutput


def negative_sampling(model: nn.Module, batch: Batch) -> LossOutput:
    """Tell the neighbour of each word from the noise: return -ln σ(s) of the first of batch["words"] and -ln σ(-s) of
    the others, where s is their product with the vector of batch["centers"]. The figure is the share of pairs in which
    the neighbour has the largest product."""
    scores = model(batch["centers"], batch["words"]).float()
    loss = softplus(-scores[:, 0]).sum() + softplus(scores[:, 1:]).sum()
    n_right = (scores[:, :1] > scores[:, 1:]).all(-1).sum()
    return LossOutput(loss, len(scores), {"accuracy": n_right})

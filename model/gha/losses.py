"""The group constraint of one layer (GCT of Grouped Head Attention, arXiv 2305.14380), from the Gram matrix of its heads' maps.

    continuous    −α · mean_i cos(x_i, z_g(i)) + β · mean_{j<k} cos(z_j, z_k)
    categorical   −α · mean_i log p_i(g(i)) + β · mean_i mean_{j≠g(i)} log p_i(j)      p_i = softmax_j(SCALE · cos(x_i, z_j))

The paper writes the first with a distance φ; its authors' code has these signs. Its categorical form has a linear classifier in
each layer. Here the normalised centres are the classifier's weights, so that it has no parameters and does not depend on how
groups are numbered. An empty group is a class of logit 0. Gradients flow through centres, not through labels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from model.gha.clustering import cosines, one_hot, products

Loss = Literal["continuous", "categorical"]
SCALE = 10.0  # of logits: with 8 groups of orthogonal centres, a head at its centre has p above 0.999 for its own group


def continuous(G_NN: Tensor, labels_N: Tensor, groups: int, alpha: float, beta: float) -> Tensor:
    """The scalar term from cosines, differentiable in G."""
    own_NC = one_hot(labels_N, groups, G_NN.dtype)
    pairs_CC = own_NC.new_full((groups, groups), beta / max(1, math.comb(groups, 2))).triu_(1)
    weights_EC = torch.cat([own_NC * (-alpha / len(own_NC)), pairs_CC])
    products_EC, inverse_E = products(G_NN, own_NC)
    # The bilinear form takes a fifth fewer small operations, forward and backward, than `cosines`.
    return inverse_E @ ((weights_EC * products_EC) @ inverse_E[len(own_NC) :])


def categorical(G_NN: Tensor, labels_N: Tensor, groups: int, alpha: float, beta: float) -> Tensor:
    """The scalar term from probabilities of groups, differentiable in G."""
    own_NC = one_hot(labels_N, groups, G_NN.dtype)
    others = beta / max(1, groups - 1)
    weights_NC = others - (alpha + others) * own_NC  # β / (C − 1) for log p of another group, −α for that of the own
    log_NC = (SCALE * cosines(G_NN, own_NC)[0]).log_softmax(-1)
    return (weights_NC * log_NC).sum() / len(own_NC)


def scores(G_NN: Tensor, labels_N: Tensor, groups: int, loss: Loss) -> Tensor:
    """η, how well a head represents its group, (..., N): cos(x_i, z_g(i)), or p_i(g(i)) in the categorical form."""
    own_NC = one_hot(labels_N, groups, G_NN.dtype)
    eta_NC = cosines(G_NN, own_NC)[0]
    if loss == "categorical":
        eta_NC = torch.softmax(SCALE * eta_NC, -1)
    return (eta_NC * own_NC).sum(-1)

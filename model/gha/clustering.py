"""Groups of attention heads from Gram matrices (hidden unit discovery of Grouped Head Attention, arXiv 2305.14380).

G_ij = x_i·x_j of the flattened feature maps x of a layer's N heads; G_LNN of all layers. With M_NC the membership matrix, whose
columns average the heads of a group, the centre z_j of group j is known by

    x_i·z_j = (G M)_ij        z_j·z_k = (Mᵀ G M)_jk        |x_i − z_j|² = G_ii − 2 (G M)_ij + (Mᵀ G M)_jj

so that the maps themselves are never needed. All functions work on all layers at once, take float64 matrices and are
deterministic; a layer's result does not depend on other layers. A group is empty only if a layer has fewer distinct maps than
groups; its centre is then zero.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# A map or centre counts as zero below this fraction of the mean square length of the heads' maps, the accuracy of sums of
# float32 products.
NOTHING = 1e-8
ZERO = 1e-20  # squared length of zero maps in divisions; its power −3/2, in gradients, still fits float32


def kmeans(G_LNN: Tensor, groups: int, seed: int, iterations: int = 100) -> Tensor:
    """K-means with Euclidean distance: the group of each head, (L, N) int64, numbered from 0.

    Initialised by greedy k-means++, as scikit-learn's KMeans is; each layer has its own generator.
    """
    start_LC = plus_plus(G_LNN, groups, seed)
    return lloyd(G_LNN, one_hot(start_LC, G_LNN.shape[-1], G_LNN.dtype).transpose(-1, -2), iterations)


def plus_plus(G_LNN: Tensor, groups: int, seed: int) -> Tensor:
    """Initial centres as heads, (L, C): each the best of a few, sampled in proportion to the squared distance to earlier ones.

    The best is the one that leaves the smallest sum of squared distances (Arthur and Vassilvitskii 2007, their greedy variant).
    """
    layers, heads, _ = G_LNN.shape
    if not 1 <= groups <= heads:
        raise ValueError(f"{groups} groups of {heads} heads")
    draws_LCT = _uniform(layers, groups, 2 + int(math.log(groups)), seed)
    between_LNN = _squared_distances(G_LNN)
    each_L = torch.arange(layers)
    chosen = [(draws_LCT[:, 0, 0] * heads).long()]
    nearest_LN = between_LNN[each_L, chosen[0]]
    for draw_LT in draws_LCT.unbind(1)[1:]:
        sums_LN = nearest_LN.cumsum(-1)
        drawn_LT = torch.searchsorted(sums_LN, draw_LT * sums_LN[:, -1:], right=True).clamp_(max=heads - 1)
        left_LTN = torch.minimum(nearest_LN[:, None], between_LNN[each_L[:, None], drawn_LT])
        best_L = left_LTN.sum(-1).argmin(-1)
        nearest_LN = left_LTN[each_L, best_L]
        chosen.append(drawn_LT[each_L, best_L])
    return torch.stack(chosen, -1)


def lloyd(G_LNN: Tensor, start_LNC: Tensor, iterations: int = 100) -> Tensor:
    """Lloyd's algorithm from centres that are averages of heads, the columns of `start_LNC`; the group of each head, (L, N).

    A head belongs to its nearest centre, the first one in a tie. As in scikit-learn, an empty group takes the head farthest
    from its centre, and a layer is done when no head changes its group, or after `iterations`.
    """
    groups = start_LNC.shape[-1]
    labels_LN = torch.full(G_LNN.shape[:-1], -1)
    ended_L = torch.zeros(len(G_LNN), dtype=torch.bool)
    for _ in range(iterations + 1):
        distances_LNC = _to_centres(G_LNN, start_LNC)
        found_LN = torch.where(ended_L[:, None], labels_LN, distances_LNC.argmin(-1))
        ended_L, labels_LN = (found_LN == labels_LN).all(-1), found_LN
        if ended_L.all():
            break
        start_LNC = membership(_fill_empty(labels_LN, distances_LNC), groups, G_LNN.dtype)
    return labels_LN


def choose_groups(G_LNN: Tensor, max_groups: int, seed: int) -> int:
    """The number of groups, 2 to `max_groups`, with the highest mean silhouette over layers; the smallest in a tie."""

    def quality(groups: int) -> float:
        return float(silhouette(G_LNN, kmeans(G_LNN, groups, seed), groups).mean())

    return max(range(2, max_groups + 1), key=quality)


def align(labels_LN: Tensor, previous_LN: Tensor | None, groups: int) -> Tensor:
    """The same groups, renumbered to match `previous_LN`: as many heads as possible keep their number.

    Without previous labels, groups are numbered in the order of their first heads.
    """
    own_LNC = one_hot(labels_LN, groups, torch.int64)
    if previous_LN is None:
        first_LC = torch.where(own_LNC.any(1), own_LNC.argmax(1), labels_LN.shape[-1])
        number_LC = first_LC.argsort(dim=-1, stable=True).argsort(dim=-1)
    else:
        common_LCC = own_LNC.transpose(-1, -2) @ one_hot(previous_LN, groups, torch.int64)
        number_LC = torch.tensor([assignment(common_CC) for common_CC in common_LCC.tolist()])
    return number_LC.gather(-1, labels_LN)


def assignment(gain_CC: list[list[int]]) -> list[int]:
    """The column of each row, no column twice, whose gains have the largest sum (Hungarian method, O(C³))."""
    best = [row.index(max(row)) for row in gain_CC]
    size = len(best)
    if len(set(best)) == size:
        return best
    prices = [0] * (size + 1)  # of columns; the last is a dummy column where each row starts
    bids = [-max(row) for row in gain_CC]
    row_of = [-1] * (size + 1)
    for row in range(size):
        row_of[size], column = row, size
        slack, before, done = [math.inf] * size, [size] * size, [False] * (size + 1)
        while row_of[column] >= 0:
            done[column], i = True, row_of[column]
            for j in range(size):
                if not done[j] and (reduced := -gain_CC[i][j] - bids[i] - prices[j]) < slack[j]:
                    slack[j], before[j] = reduced, column
            following = min((j for j in range(size) if not done[j]), key=slack.__getitem__)
            step = int(slack[following])
            for j in range(size + 1):
                if done[j]:
                    bids[row_of[j]] += step
                    prices[j] -= step
                elif j < size:
                    slack[j] -= step
            column = following
        while column != size:
            row_of[column], column = row_of[before[column]], before[column]
    return sorted(range(size), key=row_of.__getitem__)


def one_hot(labels_N: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """1 where a head belongs to a group, (..., N) → (..., N, C)."""
    return (labels_N[..., None] == torch.arange(groups, device=labels_N.device)).to(dtype)


def membership(labels_LN: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """M_LNC: column j averages the heads of group j; zero for an empty group."""
    own_LNC = one_hot(labels_LN, groups, dtype)
    return own_LNC / own_LNC.sum(-2, keepdim=True).clamp_(min=1)


def group_sizes(labels_LN: Tensor, groups: int) -> Tensor:
    """Heads in each group, (L, C) int64."""
    return one_hot(labels_LN, groups, torch.int64).sum(-2)


def centre_shift(G_LNN: Tensor, labels_LN: Tensor, previous_LN: Tensor, groups: int) -> Tensor:
    """How far centres have moved from those of the previous labels, both computed from the maps of `G_LNN`, (L,).

    The mean of |z_j − z'_j| over groups, in units of the root mean square length of the maps.
    """
    moved_LNC = membership(labels_LN, groups, G_LNN.dtype) - membership(previous_LN, groups, G_LNN.dtype)
    squares_LC = (moved_LNC * (G_LNN @ moved_LNC)).sum(-2).clamp_(min=0)
    return squares_LC.sqrt().mean(-1) / _mean_square(G_LNN).clamp_min(ZERO).sqrt()


def silhouette(G_LNN: Tensor, labels_LN: Tensor, groups: int) -> Tensor:
    """Silhouette coefficient (Rousseeuw 1987), Euclidean, mean over heads, (L,): from −1 to 1, higher is more compact.

    (b − a) / max(a, b), where a is the mean distance to the other heads of a head's group and b that to the heads of the
    nearest other group; 0 for a head alone in its group, or if there is no other group.
    """
    own_LNC = one_hot(labels_LN, groups, torch.bool)
    sizes_L1C = own_LNC.sum(-2, keepdim=True)
    sums_LNC = _squared_distances(G_LNN).sqrt_() @ own_LNC.to(G_LNN.dtype)
    within_LN = sums_LNC.mul(own_LNC).sum(-1) / own_LNC.mul(sizes_L1C - 1).sum(-1)
    to_LN = (sums_LNC / sizes_L1C).masked_fill(own_LNC | (sizes_L1C == 0), math.inf).amin(-1)
    score_LN = (to_LN - within_LN) / torch.maximum(to_LN, within_LN)  # 0 / 0 or ∞ / ∞ if a or b does not exist
    return score_LN.nan_to_num(nan=0.0).mean(-1)


def dunn(G_LNN: Tensor, labels_LN: Tensor, groups: int) -> Tensor:
    """Dunn's index (Dunn 1974), (L,), higher is more compact: smallest distance of groups over largest diameter of one.

    The distance is between the nearest two heads, the diameter between the farthest two. 0 if the index is undefined: all
    diameters are 0 (e.g. each head is its own group), or there is only one group.
    """
    own_LNC = one_hot(labels_LN, groups, G_LNN.dtype)
    together_LNN = (own_LNC @ own_LNC.transpose(-1, -2)).bool()
    distances_LNN = _squared_distances(G_LNN).sqrt_()
    apart_L = distances_LNN.masked_fill(together_LNN, math.inf).flatten(1).amin(-1)
    diameter_L = distances_LNN.masked_fill(~together_LNN, 0).flatten(1).amax(-1)
    return (apart_L / diameter_L).where((diameter_L > 0) & apart_L.isfinite(), 0)


def homogeneity(G_LNN: Tensor, labels_LN: Tensor, groups: int) -> Tensor:
    """Mean cosine of a head and the centre of its group, (L,); higher: heads of a group are more similar."""
    own_LNC = one_hot(labels_LN, groups, G_LNN.dtype)
    return (cosines(G_LNN, own_LNC)[0] * own_LNC).sum(-1).mean(-1)


def diversity(G_LNN: Tensor, labels_LN: Tensor, groups: int) -> Tensor:
    """Mean cosine of two centres, (L,); LOWER: groups differ more, 1 if all have the same direction. 0 for one group."""
    of_centres_LCC = cosines(G_LNN, one_hot(labels_LN, groups, G_LNN.dtype))[1]
    return of_centres_LCC.triu(1).sum((-2, -1)) / max(1, math.comb(groups, 2))


def products(G_NN: Tensor, own_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Products with centres, (..., E, C), and inverse lengths, (..., E), of N heads and then C centres; differentiable in G.

    Centres are sums of heads here, not means: `own_NC` is a `one_hot`. A map or centre that counts as zero gets a large
    constant as its inverse length, so that cosines with it are nearly 0 and gradients are finite.
    """
    with_maps_NC = G_NN @ own_NC
    products_EC = torch.cat([with_maps_NC, own_NC.transpose(-1, -2) @ with_maps_NC], -2)
    of_centres_CC = products_EC[..., own_NC.shape[-2] :, :]
    squares_E = torch.cat([G_NN.diagonal(dim1=-2, dim2=-1), of_centres_CC.diagonal(dim1=-2, dim2=-1)], -1)
    least_1 = (_mean_square(G_NN.detach()) * NOTHING).clamp_(min=ZERO)[..., None]
    return products_EC, torch.maximum(squares_E, least_1).rsqrt()


def cosines(G_NN: Tensor, own_NC: Tensor) -> tuple[Tensor, Tensor]:
    """cos(x_i, z_j), (..., N, C), and cos(z_j, z_k), (..., C, C), of a `one_hot`; differentiable in G."""
    heads, groups = own_NC.shape[-2:]
    products_EC, inverse_E = products(G_NN, own_NC)
    cosines_EC = products_EC * inverse_E[..., None] * inverse_E[..., None, heads:]
    to_centres_NC, of_centres_CC = cosines_EC.split([heads, groups], -2)
    return to_centres_NC, of_centres_CC


def _uniform(layers: int, groups: int, trials: int, seed: int) -> Tensor:
    """Numbers in [0, 1), (L, C, trials) float64; those of a layer follow from `seed` and its number."""
    drawn = []
    for layer in range(layers):
        digest = hashlib.sha256(f"{seed} groups of heads, layer {layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn.append(torch.rand(groups, trials, generator=generator, dtype=torch.float64))
    return torch.stack(drawn)


def _squared_distances(G_LNN: Tensor) -> Tensor:
    """|x_i − x_j|², (L, N, N)."""
    squares_LN = G_LNN.diagonal(dim1=-2, dim2=-1)
    return (squares_LN[:, :, None] + squares_LN[:, None] - 2 * G_LNN).clamp_(min=0)


def _to_centres(G_LNN: Tensor, average_LNC: Tensor) -> Tensor:
    """|x_i − z_j|² for centres that are the columns' averages of heads, (L, N, C)."""
    products_LNC = G_LNN @ average_LNC
    squares_L1C = (average_LNC * products_LNC).sum(-2, keepdim=True)
    return (G_LNN.diagonal(dim1=-2, dim2=-1)[..., None] - 2 * products_LNC + squares_L1C).clamp_(min=0)


def _fill_empty(labels_LN: Tensor, distances_LNC: Tensor) -> Tensor:
    """Move the heads farthest from their centres into the empty groups; a head at its centre stays."""
    groups = distances_LNC.shape[-1]
    empty_LC = group_sizes(labels_LN, groups) == 0
    if not empty_LC.any():
        return labels_LN
    filled_LN = labels_LN.clone()
    own_LN = distances_LNC.gather(-1, labels_LN[..., None])[..., 0]
    farthest_LN = own_LN.argsort(dim=-1, descending=True, stable=True)
    for layer, group in empty_LC.nonzero().tolist():
        head = farthest_LN[layer, int(empty_LC[layer, :group].sum())]
        if own_LN[layer, head] > 0:
            filled_LN[layer, head] = group
    return filled_LN


def _mean_square(G_LNN: Tensor) -> Tensor:
    """Mean squared length of the maps of a layer, (...,)."""
    return G_LNN.diagonal(dim1=-2, dim2=-1).mean(-1)

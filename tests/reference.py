"""The formulas of docs/method.md, line by line, slow and plain: what fast code is compared with.

Nothing here imports twinmerge. Everything is computed in the dtype it is given.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]

# ---- §2 shared expert -------------------------------------------------------------------------


def task_vector(base: StateDict, expert: StateDict) -> StateDict:
    """tau_t = theta_t - theta_0."""
    return {name: expert[name] - base[name] for name in base}


def average(base: StateDict, experts: Mapping[str, StateDict]) -> StateDict:
    """theta_s = 1/T sum_t theta_t."""
    return {name: torch.stack([expert[name] for expert in experts.values()]).mean(0) for name in base}


def task_arithmetic(base: StateDict, experts: Mapping[str, StateDict], scaling: float) -> StateDict:
    """theta_s = theta_0 + lambda sum_t tau_t."""
    vectors = [task_vector(base, expert) for expert in experts.values()]
    return {name: base[name] + scaling * sum(vector[name] for vector in vectors) for name in base}


def ties(base: StateDict, experts: Mapping[str, StateDict], density: float, scaling: float) -> StateDict:
    """TIES on whole task vectors: sort, trim, elect by the sum's sign, average what agrees (arXiv:2306.01708)."""
    vectors = [trim(flatten(task_vector(base, expert)), density) for expert in experts.values()]
    return unflatten(flatten(base) + scaling * elect_and_average(vectors), base)


def trim(vector: Tensor, density: float) -> Tensor:
    """Keep what is at least as large as the k-th largest magnitude, k = round(density * n), 1 or more."""
    k = max(1, round(density * len(vector)))
    threshold = sorted(vector.abs().tolist(), reverse=True)[k - 1]
    return torch.stack([value if abs(value) >= threshold else torch.zeros_like(value) for value in vector])


def elect_and_average(vectors: list[Tensor]) -> Tensor:
    """Entry by entry: the mean of the non-zero values whose sign is that of the sum; 0 where the sum is 0."""
    merged = torch.zeros_like(vectors[0])
    for i in range(len(merged)):
        values = [vector[i] for vector in vectors]
        sign = torch.sign(sum(values))
        agreeing = [value for value in values if value != 0 and torch.sign(value) == sign]
        if agreeing:
            merged[i] = sum(agreeing) / len(agreeing)
    return merged


def dare(vector: Tensor, dropped: Tensor, density: float) -> Tensor:
    """Zero where dropped, the others divided by the fraction kept (arXiv:2311.03099)."""
    return (~dropped) * vector / density


def logistic_fisher(weight: Tensor, bias: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of p = softmax(W x + b): mean over inputs of sum_c p_c (d log p_c)^2; d log p_c / d b_k = [c = k] - p_k."""
    of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for x in inputs:
        p = torch.softmax(weight @ x + bias, dim=0)
        for c in range(len(p)):
            for k in range(len(p)):
                slope = (1.0 if c == k else 0.0) - p[k]
                of_bias[k] += p[c] * slope**2 / len(inputs)
                of_weight[k] += p[c] * (slope * x) ** 2 / len(inputs)
    return of_weight, of_bias


def fisher(experts: list[Tensor], information: list[Tensor], weights: list[float], floor: float) -> Tensor:
    """sum_t w_t F_t theta_t / sum_t w_t F_t, F_t at least `floor` (arXiv:2111.09832)."""
    merged = torch.zeros_like(experts[0])
    for i in range(merged.numel()):
        shares = [w * max(float(f.flatten()[i]), floor) for w, f in zip(weights, information, strict=True)]
        values = [float(expert.flatten()[i]) for expert in experts]
        merged.view(-1)[i] = sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)
    return merged


def regmean(experts: list[Tensor], inputs: list[Tensor], alpha: float) -> Tensor:
    """(sum_t G_t)^-1 sum_t G_t W_t, G_t = X_t' X_t, off the diagonal times alpha; W (in, out) (arXiv:2212.09849)."""
    total, product = 0.0, 0.0
    for weight, x in zip(experts, inputs, strict=True):
        gram = x.T @ x
        for i in range(len(gram)):
            for j in range(len(gram)):
                if i != j:
                    gram[i, j] = gram[i, j] * alpha
        total, product = total + gram, product + gram @ weight
    return torch.linalg.inv(total) @ product


def flatten(tensors: StateDict) -> Tensor:
    """All tensors of a state dict, one after the other, as one vector."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def unflatten(vector: Tensor, like: StateDict) -> StateDict:
    """The inverse of `flatten`."""
    pieces = vector.split([like[name].numel() for name in sorted(like)])
    return {name: piece.view(like[name].shape) for name, piece in zip(sorted(like), pieces, strict=True)}


# ---- §3 exclusive knowledge -------------------------------------------------------------------


def truncated_svd(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """up = U diag(s), down = V^T, cut at the rank, and all singular values."""
    u, s, vt = torch.linalg.svd(difference, full_matrices=False)
    return (u * s)[:, :rank], vt[:rank], s


# ---- §5 inference -----------------------------------------------------------------------------


def weighed_low_rank(difference: Tensor, left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank in the norm tr(G D C D') of two damped moments (METHOD §3)."""
    roots = []
    for moment in (left.double(), right.double()):
        full = torch.diag(moment) if moment.ndim == 1 else moment
        values, vectors = torch.linalg.eigh(full + 0.1 * full.diagonal().mean() * torch.eye(len(full)).double())
        roots.append(vectors @ torch.diag(values.sqrt()) @ vectors.T)
    g, c = roots
    u, s, v = torch.linalg.svd(g @ difference.double() @ c)
    kept = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    return torch.linalg.inv(g) @ kept @ torch.linalg.inv(c)


def four_bits(vector: Tensor, root: Tensor | None) -> Tensor:
    """A vector in sixteen levels; with a lower triangle `root`, each entry makes good what those after it lost."""
    vector = vector.double()

    def level(value: float, step: float) -> float:
        return min(max(math.floor(value / step + 8), 0), 15) - 7.5

    def scaled(levels: Tensor, seen: Tensor) -> tuple[float, float]:
        along, norm = float((levels @ seen) @ (vector @ seen)), float((levels @ seen).square().sum())
        return along / norm, along**2 / norm

    alike, found = torch.eye(len(vector)).double(), []
    for clip in (0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 0.925, 1.0):
        step = clip * float(vector.abs().max()) / 7.5
        levels = torch.tensor([level(float(value), step) for value in vector]).double()
        found.append((*scaled(levels, alike), levels))
    scale, _, levels = max(found, key=lambda entry: entry[1])
    if root is None:
        return scale * levels
    error = torch.zeros_like(vector)
    for i in reversed(range(len(vector))):
        owed = float(error[i + 1 :] @ root[i + 1 :, i]) / float(root[i, i])
        levels[i] = level(float(vector[i]) + owed, scale)
        error[i] = vector[i] - levels[i] * scale
    return scaled(levels, root)[0] * levels


def compose(shared: StateDict, exclusive: Mapping[str, StateDict], gate: Mapping[str, float]) -> StateDict:
    """theta(x) = theta_s + sum_t w_t D_t for one input, exclusive parts dense."""
    composed = {name: tensor.clone() for name, tensor in shared.items()}
    for expert, parts in exclusive.items():
        for name, difference in parts.items():
            composed[name] = composed[name] + gate[expert] * difference
    return composed


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ups: list[Tensor],
    downs: list[Tensor],
    biases: list[Tensor | None],
    gate: Tensor,
) -> Tensor:
    """y = x W_s^T + b_s + sum_t w_t (x down_t^T) up_t^T + sum_t w_t db_t, row by row; x (batch, seq, in)."""
    rows = []
    for row, w in zip(x, gate, strict=True):
        y = row @ weight.T
        if bias is not None:
            y = y + bias
        for t in range(len(ups)):
            y = y + w[t] * (row @ downs[t].T) @ ups[t].T
            if biases[t] is not None:
                y = y + w[t] * biases[t]
        rows.append(y)
    return torch.stack(rows)


def gated_embedding(ids: Tensor, weight: Tensor, ups: list[Tensor], downs: list[Tensor], gate: Tensor) -> Tensor:
    """Each token's row of W_s + sum_t w_t up_t down_t; ids (batch, seq)."""
    rows = []
    for row, w in zip(ids, gate, strict=True):
        table = weight
        for t in range(len(ups)):
            table = table + w[t] * (ups[t] @ downs[t])
        rows.append(table[row])
    return torch.stack(rows)


def gated_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, weights: list[Tensor], biases: list[Tensor], gate: Tensor, epsilon: float
) -> Tensor:
    """LayerNorm with gamma(x) = gamma_s + sum_t w_t dgamma_t, likewise beta; x (batch, seq, features)."""
    rows = []
    for row, w in zip(x, gate, strict=True):
        gamma, beta = weight, bias
        for t in range(len(weights)):
            gamma = gamma + w[t] * weights[t]
            beta = beta + w[t] * biases[t]
        centred = row - row.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        rows.append(centred / torch.sqrt(variance + epsilon) * gamma + beta)
    return torch.stack(rows)

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


def tsv_m(vectors: list[Tensor]) -> Tensor:
    """Each task's top min / T triplets, both sides replaced by P Q' of their P S Q' (arXiv:2412.00081)."""
    count = min(vectors[0].shape) // len(vectors)
    cut = [torch.linalg.svd(vector, full_matrices=False) for vector in vectors]
    left = nearest_orthonormal(torch.cat([u[:, :count] for u, _, _ in cut], dim=1))
    right = nearest_orthonormal(torch.cat([vh[:count] for _, _, vh in cut]).T)
    return left @ torch.diag(torch.cat([s[:count] for _, s, _ in cut])) @ right.T


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """P Q' of P S Q'."""
    p, _, q = torch.linalg.svd(matrix, full_matrices=False)
    return p @ q


def iso_c(vectors: list[Tensor]) -> Tensor:
    """The sum's singular values replaced by their mean (arXiv:2502.04959)."""
    u, s, vh = torch.linalg.svd(sum(vectors), full_matrices=False)
    return u @ torch.diag(torch.full_like(s, float(s.mean()))) @ vh


def iso_cts(vectors: list[Tensor], common_fraction: float) -> Tensor:
    """The sum's first directions and, in equal shares, each task's top ones off them (arXiv:2502.04959)."""
    sides = min(vectors[0].shape)
    own = round((sides - int(sides * common_fraction)) / len(vectors))
    u, s, vh = (part for part in torch.linalg.svd(sum(vectors), full_matrices=False))
    common = sides - own * len(vectors)
    u, s, vh = u[:, :common], s[:common], vh[:common]
    lefts, values, rights = [], [], []
    for vector in vectors:
        of_task = torch.linalg.svd(vector - u @ u.T @ vector, full_matrices=False)
        lefts.append(of_task[0][:, :own])
        values.append(of_task[1][:own])
        rights.append(of_task[2][:own])
    left = nearest_orthonormal(torch.cat([*lefts, u], dim=1))
    right = nearest_orthonormal(torch.cat([*rights, vh]).T)
    return float(torch.cat([*values, s]).mean()) * left @ right.T


def consensus(vectors: list[Tensor], threshold: float, agreement: int) -> Tensor:
    """The sum where at least so many tasks have |tau_t| > threshold |sum - tau_t| (arXiv:2405.07813)."""
    total = sum(vectors).flatten()
    for i in range(len(total)):
        needed = 0
        for vector in vectors:
            own = float(vector.flatten()[i])
            needed += abs(own) > threshold * abs(float(total[i]) - own)
        if needed < agreement:
            total[i] = 0
    return total.view(vectors[0].shape)


def tall(vectors: list[Tensor], index: int, threshold: float) -> Tensor:
    """The sum where |tau_t| > threshold |sum - tau_t| (arXiv:2405.07813)."""
    total, own = sum(vectors).flatten(), vectors[index].flatten()
    for i in range(len(total)):
        if not abs(float(own[i])) > threshold * abs(float(total[i]) - float(own[i])):
            total[i] = 0
    return total.view(vectors[0].shape)


def emr(models: list[list[Tensor]], index: int) -> list[Tensor]:
    """Task vectors of a task's model, tensor by tensor, of those of all tasks (arXiv:2405.17461)."""
    elected = []
    for vectors in models:
        column = []
        for values in zip(*[vector.flatten().tolist() for vector in vectors], strict=True):
            sign = 1 if sum(values) > 0 else -1 if sum(values) < 0 else 0
            column.append(sign * max([abs(value) for value in values if value * sign > 0], default=0.0))
        elected.append(column)
    own = [vectors[index].flatten().tolist() for vectors in models]
    masked = [[e if e * o > 0 else 0.0 for e, o in zip(*pair, strict=True)] for pair in zip(elected, own, strict=True)]
    scale = sum(abs(v) for part in own for v in part) / sum(abs(v) for part in masked for v in part)
    return [
        scale * torch.tensor(part, dtype=torch.float64).view(vectors[0].shape)
        for part, vectors in zip(masked, models, strict=True)
    ]


def model_stock(vectors: list[Tensor]) -> Tensor:
    """t times the mean, t = T cos / (1 + (T - 1) cos) of the mean cosine of pairs (arXiv:2403.19522)."""
    found = []
    for i, first in enumerate(vectors):
        for second in vectors[i + 1 :]:
            found.append(float((first * second).sum() / first.norm() / second.norm()))
    cosine, count = sum(found) / len(found), len(vectors)
    return count * cosine / (1 + (count - 1) * cosine) * sum(vectors) / count


def slerp_of(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at t of the arc (Shoemake 1985)."""
    angle = math.acos(float((first * second).sum() / first.norm() / second.norm()))
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def multislerp(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """Barycentric interpolation on the sphere, with its step in the tangent space."""
    units = [vector / vector.norm() for vector in vectors]
    mean = sum(w * unit for w, unit in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (unit - (unit * mean).sum() * mean) for w, unit in zip(weights, units, strict=True))
    length = float(tangent.norm()) + 1e-12
    point = math.cos(length) * mean + math.sin(length) / length * tangent
    return point * sum(w * float(vector.norm()) for w, vector in zip(weights, vectors, strict=True))


def karcher(vectors: list[Tensor], steps: int = 200) -> Tensor:
    """Where the mean of the tangents towards all directions is zero, at the mean length (arXiv:2603.04972)."""
    units = [vector / vector.norm() for vector in vectors]
    mean = sum(units) / sum(units).norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = min(max(float((unit * mean).sum()), -1.0), 1.0)
            angle = math.acos(cosine)
            tangent = tangent + (angle / math.sin(angle) if angle > 1e-9 else 1.0) * (unit - cosine * mean) / len(units)
        length = float(tangent.norm())
        if length < 1e-12:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
    return mean * sum(float(vector.norm()) for vector in vectors) / len(vectors)


def magprune(vector: Tensor, draws: Tensor, density: float, epsilon: float) -> Tensor:
    """Row by row: chances rise with the rank of a magnitude; what is drawn is divided by its (arXiv:2406.11617)."""
    rows, of_rows = vector.reshape(len(vector) if vector.ndim > 1 else 1, -1), draws.flatten().tolist()
    kept = torch.zeros_like(rows)
    for i, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda j: abs(float(row[j])))
        for rank, j in enumerate(order):
            chance = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
            if of_rows[i * len(row) + j] < chance:
                kept[i, j] = row[j] / chance
    return kept.view(vector.shape)


def breadcrumbs(vector: Tensor, density: float, gamma: float) -> Tensor:
    """Sorted by magnitude: without the top gamma, the next density (arXiv:2312.06795)."""
    flat, count = vector.flatten(), vector.numel()
    kept = max(1, round(density * count))
    top = min(int(gamma * count), count - kept)
    order = sorted(range(count), key=lambda i: -abs(float(flat[i])))
    result = torch.zeros_like(flat)
    for i in order[top : top + kept]:
        result[i] = flat[i]
    return result.view(vector.shape)


def sce(vectors: list[Tensor], select_topk: float) -> Tensor:
    """Select by variance, calculate weights from squares, erase minority signs (arXiv:2408.07990)."""
    stacked = torch.stack([vector.flatten() for vector in vectors])
    variance = stacked.var(dim=0, unbiased=False)
    count = int(select_topk * int((variance > 0).sum()))
    chosen = range(len(variance)) if select_topk == 1 else variance.argsort(descending=True)[:count].tolist()
    selected = torch.zeros_like(stacked)
    for i in chosen:
        selected[:, i] = stacked[:, i]
    weights = selected.square().sum(dim=1)
    merged = torch.zeros_like(variance)
    for i in range(len(merged)):
        sign = torch.sign(selected[:, i].sum())
        agrees = [t for t in range(len(vectors)) if sign != 0 and torch.sign(selected[t, i]) == sign]
        if agrees:
            merged[i] = sum(weights[t] * selected[t, i] for t in agrees) / sum(weights[t] for t in agrees)
    return merged.view(vectors[0].shape)


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

"""Groups inputs of one batch under few gates, the paper's group-wise mode (METHOD §5)."""

import torch
from torch import Tensor


def group_gates(gate: Tensor, chosen: Tensor, groups: int = 20, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The paper's group-wise mode: bins by argmax, k-means on the gates inside each, gates averaged per group.

    Depends on the batch's composition, so it belongs to offline evaluation (METHOD §5).

    Args:
        gate: (batch, expert), of all inputs together.
        chosen: (batch,) the likeliest expert of each.
        groups: merged models in all, shared out among the bins by size, at least one each.
        seed: of k-means.

    Returns:
        (batch,) the group of every input, and (group, expert) the gates.
    """
    from sklearn.cluster import KMeans

    gate, chosen = gate.cpu(), chosen.cpu()
    bins = torch.unique(chosen)
    spare = max(groups - len(bins), 0)
    assigned = torch.zeros(len(gate), dtype=torch.int64)
    means: list[Tensor] = []
    done = 0
    for index in bins:
        rows = (chosen == index).nonzero()[:, 0]
        share = spare * (done + len(rows)) // len(gate) - spare * done // len(gate)
        done += len(rows)
        clusters = min(1 + share, len(torch.unique(gate[rows], dim=0)))
        labels = torch.from_numpy(KMeans(clusters, n_init=4, random_state=seed).fit_predict(gate[rows].numpy())).long()
        for cluster in range(clusters):
            members = rows[labels == cluster]
            assigned[members] = len(means)
            means.append(gate[members].mean(dim=0))
    return assigned, torch.stack(means)

"""One-to-one matching of predictions and objects at the least total cost (DETR, arXiv 2005.12872, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Pairs = tuple[Int[Tensor, "k _p"], Int[Tensor, "k _p"]]
FORBIDDEN = 1e9  # stands for a cost that is no number


@torch.no_grad()
def assign(costs: Sequence[Float[Tensor, "k n _m"]]) -> list[Pairs]:
    """For each image, whose costs are (predictions made of it, queries, objects): which queries answer for which
    objects, for each of its K predictions min(N, M) pairs in the order of the queries.

    Costs that are not finite are as good as forbidden. The matching itself is the host's work: all images and
    predictions go there as one tensor and come back as one, so that a device waits once a step.
    """
    if not len(costs):
        return []
    from scipy.optimize import linear_sum_assignment

    device, sizes = costs[0].device, [c.shape[2] for c in costs]
    table = torch.cat([c.float() for c in costs], 2)
    table = table.nan_to_num(FORBIDDEN, FORBIDDEN, FORBIDDEN).cpu().numpy()  # (K, N, M of all)
    found: list[np.ndarray] = []
    for part in np.split(table, np.cumsum(sizes)[:-1], axis=2):
        found.append(np.stack([np.stack(linear_sum_assignment(cost)) for cost in part], 1))  # (2, K, P)
    answer = torch.from_numpy(np.concatenate(found, 2).astype("int64")).to(device)
    counts = [f.shape[2] for f in found]
    return [(queries, objects) for queries, objects in (part.unbind(0) for part in answer.split(counts, 2))]

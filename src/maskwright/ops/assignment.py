"""One-to-one assignment of predictions to objects at the least total cost (DETR, arXiv 2005.12872, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

Pairs = tuple[Int[Tensor, "k _p"], Int[Tensor, "k _p"]]
FORBIDDEN = 1e9  # replaces costs that are not finite


@torch.no_grad()
def assign(costs: Sequence[Float[Tensor, "k n _m"]]) -> list[Pairs]:
    """Assigns queries to objects, for each image and each of its K predictions.

    The assignment is computed on the host: all images and predictions are transferred as one tensor, and so is the
    result, so that a device is synchronised once per step.

    Args:
        costs: For each image (K predictions, N queries, M objects). Costs that are not finite are avoided.

    Returns:
        For each image the queries and the objects of K x min(N, M) pairs, in the order of the queries.
    """
    if not len(costs):
        return []
    from scipy.optimize import linear_sum_assignment

    device, sizes = costs[0].device, [c.shape[2] for c in costs]
    table = torch.cat([c.float() for c in costs], 2)
    table = table.nan_to_num(FORBIDDEN, FORBIDDEN, FORBIDDEN).cpu().numpy()  # (K, N, M of all)
    pairs: list[np.ndarray] = []
    for part in np.split(table, np.cumsum(sizes)[:-1], axis=2):
        pairs.append(np.stack([np.stack(linear_sum_assignment(cost)) for cost in part], 1))  # (2, K, P)
    every = torch.from_numpy(np.concatenate(pairs, 2).astype("int64")).to(device)
    counts = [p.shape[2] for p in pairs]
    return [(queries, objects) for queries, objects in (part.unbind(0) for part in every.split(counts, 2))]


def best_pairs(scores: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the one-to-one assignment of rows to columns with the largest sum of scores.

    Args:
        scores: (N, M), finite.

    Returns:
        Rows, ascending, and the column of each: min(N, M) pairs.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-scores)
    return rows.astype(np.int64), columns.astype(np.int64)

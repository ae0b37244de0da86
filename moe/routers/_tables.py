"""Tables from token ids to experts, made once from how often each id occurs."""

from pathlib import Path

import numpy as np

from moe.errors import ConfigError


def read_frequencies(path: Path) -> np.ndarray:
    """How often each id occurs [V], float64. Raises ConfigError for a file that is not such an array."""
    try:
        counts_V = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"hash frequencies {path} cannot be read ({error}): save an array with numpy.save") from error
    if counts_V.ndim != 1 or counts_V.dtype.kind not in "iuf" or not (counts_V >= 0).all():
        shape = f"{counts_V.dtype}{list(counts_V.shape)}"
        raise ConfigError(
            f"hash frequencies {path} must be one count of 0 or more per id, not {shape}: see numpy.bincount"
        )
    return counts_V.astype(float)


def balanced_table(counts_V: np.ndarray, order_VE: np.ndarray, k: int) -> np.ndarray:
    """Experts of each id [V, k]: most frequent id first, each to the k least loaded; equal loads in the id's own order."""
    load_E = np.zeros(order_VE.shape[1])
    table_VK = np.empty((len(counts_V), k), dtype=np.int64)
    for v in np.argsort(-counts_V, kind="stable"):
        mine = order_VE[v]
        table_VK[v] = mine[np.argsort(load_E[mine], kind="stable")[:k]]
        load_E[table_VK[v]] += counts_V[v]
    return table_VK

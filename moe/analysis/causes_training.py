"""The doctor's rule about the optimisation itself: a learning rate that the experts do not bear."""

import math
from statistics import fmean, variance

from moe.analysis.finding import Finding, Sure
from moe.analysis.history import History
from moe.analysis.rows import Json
from moe.analysis.thresholds import limit

WINDOWS = 20
"""The loss is averaged over this many equal parts of the run."""


def learning_rate(history: History) -> list[Finding]:
    """The loss rises, steps are not finite, or the experts' weights move by much of their size every step."""
    peak = history.config["train"]["optimizer"]["lr"]
    skipped = [row["step"] for row in history.metrics if row.get("skipped")]
    rise, since = _rise(history)
    init_std = history.config["model"].get("init_std", 0.02)
    updates = {layer: _update(rows, peak, init_std) for layer, rows in history.health.items()}
    worst = max(updates.values(), default=0.0)
    large = worst > limit("relative_update")
    if not skipped and rise <= limit("loss_rise") and not large:
        return []
    signs = [f"{len(skipped)} step(s) were not finite"] if skipped else []
    if rise > limit("loss_rise"):
        signs.append(f"the loss is {rise:.0%} above its best average since step {since}")
    if large:
        signs.append(f"a step moves an expert's weights by up to {worst:.0%} of their size")
    layers = [layer for layer, update in updates.items() if update > limit("relative_update")]
    sure: Sure = "certain" if len(signs) > 1 else "likely"
    first = skipped[0] if skipped else since if rise > limit("loss_rise") else history.grace
    return [
        Finding(
            cause="learning_rate",
            layers=tuple(sorted(layers)),
            since=first,
            sure=sure,
            what=f"the learning rate is too high for the experts: {'; '.join(signs)}",
            why=f"train.optimizer.lr={peak:g}; an expert sees a part of the batch, so its steps are noisier than a dense layer's",
            change=f"train.optimizer.lr={peak / 10:.2g}, with a longer warm-up",
        )
    ]


def _update(rows: list[Json], peak: float, init_std: float) -> float:
    """The peak learning rate, about what AdamW moves an element by, over the rms of the experts' weights at first sight.

    0 for weights that have not grown: a large step that is not taken again and again does no harm.
    """
    first = next((row["expert_rms"] for row in rows if row.get("expert_rms")), 0.0)
    return peak / first if first > limit("weight_growth") * init_std else 0.0


def _rise(history: History) -> tuple[float, int]:
    """How far the loss of the last window is above the best one before, relative, and where that one ended.

    0 where the rise is within the noise of the two averages, which is wide for a small batch.
    """
    size = max(2, history.steps // WINDOWS)
    losses = [(row["step"], row["loss"]) for row in history.metrics if row.get("loss") is not None]
    windows = [losses[start : start + size] for start in range(len(losses) % size, len(losses), size)]
    if len(windows) < 3:
        return 0.0, 0
    means = [fmean(loss for _, loss in window) for window in windows]
    best = min(range(len(means) - 1), key=means.__getitem__)
    noise = fmean(variance([loss for _, loss in window]) for window in (windows[best], windows[-1]))
    rise = means[-1] - means[best]
    if rise <= limit("loss_noise") * math.sqrt(2 * noise / size):
        return 0.0, 0
    return rise / max(means[best], 1e-9), windows[best][-1][0]

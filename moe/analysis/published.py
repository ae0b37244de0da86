"""Coefficients fitted to published runs, with their source. The runs themselves are not part of this package.

Source: the validation losses published with "Unified Scaling Laws for Routed Language Models" (Clark et al., ICML 2022,
arXiv 2202.01169; DeepMind, CC-BY 4.0), sizes 15M to 370M active parameters, 131 billion tokens, top-1 routing in every
other layer, nats per token of a 32,000-word vocabulary. Fitted here with `moe.analysis.scaling` on 2026-11-22.
"""

from dataclasses import dataclass

from moe.analysis.scaling import PowerLaw, RoutedLaw

LAWS = {
    "s-base": RoutedLaw(-0.086427, -0.114336, 0.0094496, 1.139775, 2.0959, 254.60, rmse=0.0145, runs=44),
    "rl-r": RoutedLaw(-0.085761, -0.116980, 0.0105347, 1.128674, 1.4547, 566.19, rmse=0.0145, runs=45),
    "hash": RoutedLaw(-0.089358, -0.128222, 0.0114293, 1.173538, 4.0361, 488.71, rmse=0.0135, runs=42),
}
"""The routed law of each of the paper's three routers."""

DENSE = PowerLaw(alpha=0.081340, d=1.085935, rmse=0.0075, runs=7)
"""The same publication's dense models."""


@dataclass(frozen=True)
class PublishedOptimism:
    """How far forecasts from smaller sizes were off, per factor e of size and as a share of the predicted gain."""

    share: float
    """Over-statement."""
    levels: tuple[float, ...]
    """Shares of the back-tested runs ..."""
    spreads: tuple[float, ...]
    """... whose miss, less the over-statement, was at most this."""
    misses: int


OPTIMISM = {
    "linear": PublishedOptimism(0.0523, (0.5, 0.8, 0.9, 0.95), (0.0272, 0.0726, 0.1779, 0.5874), misses=77),
    "law": PublishedOptimism(0.0674, (0.5, 0.8, 0.9, 0.95), (0.0376, 0.0795, 0.2597, 0.3933), misses=78),
}
"""Of the two forms of a ladder, on the same runs: 55M, 130M and 370M predicted from all smaller sizes."""

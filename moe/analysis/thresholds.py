"""The numbers above which the doctor speaks, each with where it comes from; docs/doctor.md prints this table.

"drills, seed 0" means: between the healthy runs and the injected faults of seed 0 of tests/drills, at the tuning sizes alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """A limit, what it limits, and its source."""

    value: float
    meaning: str
    source: str


THRESHOLDS = {
    "effective_share": Threshold(
        0.5,
        "effective experts over E below this: collapse",
        "loads of a collapse on k experts: CV = √((E-k)/k); drills",
    ),
    "dead_share": Threshold(0.01, "share of the balanced load below which an expert is dead", "common practice"),
    "dead_rows": Threshold(
        20, "rows that a balanced expert must have had before it can be called dead", "Poisson: e⁻²⁰"
    ),
    "utility": Threshold(
        0.1, "output norm over the layer's median below this: utility-dead", "Step-3.5 report (load looks fine)"
    ),
    "output_cosine": Threshold(0.9, "mean cosine of two experts' outputs above this: redundancy", "drills, seed 0"),
    "pair_cosine": Threshold(0.99, "cosine of one pair of experts above this: redundancy", "drills, seed 0"),
    "tokens_per_expert": Threshold(
        40, "rows per expert and step below this: starvation", "fewer than about 40 to 50 tokens carry noise only"
    ),
    "row_cosine": Threshold(0.9, "mean cosine of router rows above this: rows aligned", "arXiv 2606.28116; drills"),
    "drop_rate": Threshold(
        0.25,
        "share of rows dropped above this, once loads have settled",
        "drills, seed 0: up to 0.2 with capacity 2 in healthy runs, above 0.5 with 0.4",
    ),
    "gradient_ratio": Threshold(
        5, "balance gradient over LM gradient at the router", "drills, seed 0: healthy below 0.5, weight ×1000 above 8"
    ),
    "over_constrained_ratio": Threshold(
        2, "that ratio, with MaxVio at its floor: over-constrained", "E=2048 study: MaxVio below 0.2 costs loss"
    ),
    "floor_factor": Threshold(2, "MaxVio counts as at its floor below this many floors", "noise floor by simulation"),
    "logit_growth": Threshold(2, "logit rms over that at half the time", "ST-MoE, arXiv 2202.08906"),
    "logit_max": Threshold(50, "largest router logit", "bfloat16 has steps of 0.25 there"),
    "rounding_flips": Threshold(
        0.001,
        "share of choices that float64 would have made otherwise",
        "float32 shows none; bfloat16 logits of 90: 0.002 to 0.005 (drills, seed 0)",
    ),
    "churn": Threshold(0.5, "churn between evaluations over that of random routing, after 60 %", "drills, seed 0"),
    "loss_rise": Threshold(0.1, "loss over its best earlier average, relative", "drills, seed 0"),
    "loss_noise": Threshold(5, "the same rise in standard errors of the two averages", "drills, seed 0"),
    "relative_update": Threshold(0.15, "peak learning rate over the rms of an expert's weights", "drills, seed 0"),
    "weight_growth": Threshold(
        2, "the same weights over their size at the start", "drills, seed 0: 0.9 healthy, 4 at ×30"
    ),
    "router_change": Threshold(1e-7, "relative change of the router in a step: frozen", "float32 resolution"),
    "extra_tokens": Threshold(0.005, "tokens that the routers count beyond the valid ones", "an identity"),
    "probe_gain": Threshold(
        0.0,
        "nats that the router gains over a counterfactual: uninformative if the interval holds this",
        "95 % interval",
    ),
    "convention": Threshold(
        0.15, "relative distance of the logged balance loss to K or L times its value", "an identity"
    ),
}


def limit(name: str) -> float:
    """The value of a threshold."""
    return THRESHOLDS[name].value

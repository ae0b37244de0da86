"""The drills' model sizes and the text that they train on."""

import sysconfig
from pathlib import Path
from typing import Any

TUNING_SIZES = ("small", "wide")
HELD_OUT_SIZE = "held-out"
"""No threshold was set with a run of this size."""

SIZES: dict[str, dict[str, Any]] = {
    "small": {"dim": 32, "layers": 2, "experts": 8, "top_k": 2, "hidden": 32, "rows": 16},
    "wide": {"dim": 32, "layers": 3, "experts": 16, "top_k": 2, "hidden": 24, "rows": 16},
    "held-out": {"dim": 40, "layers": 3, "experts": 10, "top_k": 2, "hidden": 20, "rows": 14},
}
STEPS = 120
SEQUENCE = 64
MODULES = ("argparse", "ast", "decimal", "inspect", "pathlib", "pickle", "subprocess", "tarfile", "typing", "zipfile")


def base(size: str, seed: int, cache: Path) -> dict[str, Any]:
    """The settings of a healthy run of a size: the default router, health measured six times."""
    shape = SIZES[size]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = [
        stdlib / f"{name}.py" for name in (*MODULES, "_pydecimal", "dataclasses", "difflib", "doctest", "optparse")
    ]
    return {
        "name": "drill",
        "seed": seed,
        "model": {
            "vocab_size": 257,
            "dim": shape["dim"],
            "num_layers": shape["layers"],
            "ffn_hidden": 2 * shape["dim"],
            "attention": {"name": "grouped_query", "num_heads": 2, "num_kv_heads": 2, "head_dim": shape["dim"] // 2},
            "moe": {
                "num_experts": shape["experts"],
                "top_k": shape["top_k"],
                "expert_hidden": shape["hidden"],
                "router": {"name": "topk"},
            },
            "init_std": 0.1,
        },
        "data": {
            "sources": [{"name": "files", "paths": [str(path) for path in found if path.is_file()]}],
            "sequence_length": SEQUENCE,
            "validation_fraction": 0.2,
            "cache_dir": str(cache),
        },
        "train": {
            "steps": STEPS,
            "batch_rows": shape["rows"],
            "micro_rows": shape["rows"],
            "optimizer": {"lr": 0.004},
            "schedule": {"name": "cosine", "warmup_steps": 8},
            "device": "cpu",
            "threads": 1,
        },
        "evaluation": {"every_steps": 20, "rows": 8, "final_rows": 8, "probe_rows": 8},
        "logging": {"console": "off", "routing_every": 3},
    }

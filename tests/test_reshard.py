"""Checkpoints saved in one layout and loaded in another: every tensor to the last bit, the next batch, the next step's loss.

Compared with what the saving ranks held in memory, as hashes of whole tensors; tests/reshard_cases.py does both sides.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import reshard_cases
import torch

from moe.parallel import Ranks

HERE = Path(__file__).parent
ALONE = "alone"
ONE = Ranks(0, 1, torch.device("cpu"))
TWO = ("parallel.replicate=2", "parallel.shard=2", "parallel.expert=2", "parallel.context=2", "parallel.tensor=2")
FOUR = (
    "parallel.shard=4",
    "parallel.expert=4",
    "parallel.replicate=2,parallel.shard=2",
    "parallel.shard=2,parallel.context=2",
    "parallel.shard=2,parallel.tensor=2",
    "parallel.shard=4,parallel.expert=2",
    "parallel.replicate=2,parallel.shard=2,parallel.expert=2",
)


def work(folder: Path, kinds: str, ranks: int, layouts: tuple[str, ...]) -> dict[str, dict]:
    """Save, load or both, in every layout of this number of ranks; one rank does it in this process."""
    if ranks == 1:
        return {k: v for kind in kinds.split(",") for k, v in reshard_cases.work(folder, kind, [*layouts], ONE).items()}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    line = [sys.executable, *launcher, str(HERE / "reshard_cases.py"), str(folder), kinds, ";".join(layouts)]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=600, cwd=HERE.parent, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / f"{kind}-{ranks}.json" for kind in kinds.split(",")]
    return {key: value for file in files for key, value in json.loads(file.read_text()).items()}


def compare(names: tuple[str, ...], results: dict[str, dict]) -> int:
    """Hold every load against what was saved; returns the number of pairs that differ in layout."""
    pairs = [f"{source} -> {layout}" for source, layout in product(names, names)]
    assert results.keys() == {*names, *pairs}
    for pair in pairs:
        source, layout = pair.split(" -> ")
        found, expected = results[pair], results[source]
        assert expected["moved"], "the router's balancing state is not what a fresh model has"
        assert found["tensors"].keys() == expected["tensors"].keys(), pair
        different = [name for name, value in expected["tensors"].items() if found["tensors"][name] != value]
        assert not different, f"{pair}: {different[:5]}"
        assert found["batch"] == expected["batch"], pair
        limit = 0.0 if source == layout else 1e-5
        assert abs(found["loss"] - expected["loss"]) <= limit * expected["loss"], pair
        assert abs(found["norm"] - expected["norm"]) <= limit * expected["norm"], pair
    return sum(len(set(pair.split(" -> "))) == 2 for pair in pairs)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_one_and_two_ranks_load_what_the_others_saved(tmp_path):
    (tmp_path / "data").mkdir()
    results = work(tmp_path, "save", 1, (ALONE,)) | work(tmp_path, "save,load", 2, TWO)
    assert compare((ALONE, *TWO), results | work(tmp_path, "load", 1, (ALONE,))) == 30


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_one_two_and_four_ranks_load_what_the_others_saved(tmp_path):
    (tmp_path / "data").mkdir()
    results = work(tmp_path, "save", 1, (ALONE,)) | work(tmp_path, "save", 2, TWO)
    results |= work(tmp_path, "save,load", 4, FOUR) | work(tmp_path, "load", 2, TWO)
    assert compare((ALONE, *TWO, *FOUR), results | work(tmp_path, "load", 1, (ALONE,))) == 156

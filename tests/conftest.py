"""What every test starts from: one thread, fixed seeds, no network, NaN in fresh memory, an honest count of skips."""

import os
import random
import shutil
import tempfile
from collections import Counter

# Before torch and the Hugging Face libraries are imported, and inherited by every process that a test starts.
SCRATCH = tempfile.mkdtemp(prefix="moe-tests-")
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HOME": os.path.join(SCRATCH, "huggingface"),
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_DIR": SCRATCH,
    "MPLBACKEND": "Agg",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known_state(request):
    """Fixed seeds, and NaN (integers: the largest) in fresh memory, which torch fills in deterministic mode only.

    That mode also repairs operations that are not repeatable by themselves; a test that looks for those carries the
    marker `plain_memory`.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(request.node.get_closest_marker("plain_memory") is None)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`")
    parser.addoption(
        "--alone", action="store_true", help="of those, only the tests marked `alone`, which workers leave out"
    )


LONGEST_FIRST = ("test_kernels_interpreted.py", "test_layouts.py", "test_gpu_check.py", "test_compile_gate.py")
"""Files that take minutes: begun first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(config, items):
    if config.getoption("--alone") and not config.getoption("--full"):
        raise pytest.UsageError("--alone goes with --full: tests marked `alone` are of the full tier")
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if not config.getoption("--full"):
        left_out = leave_out(config, items, lambda item: item.get_closest_marker("full"))
        config.stash[LEFT_OUT] = len(left_out)
    elif config.getoption("--alone"):
        leave_out(config, items, lambda item: not item.get_closest_marker("alone"))
    elif hasattr(config, "workerinput"):
        leave_out(config, items, lambda item: item.get_closest_marker("alone"))


def leave_out(config, items, which):
    """Deselect some of the tests, and return those."""
    left_out = [item for item in items if which(item)]
    if left_out:
        items[:] = [item for item in items if not which(item)]
        config.hook.pytest_deselected(items=left_out)
    return left_out


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes: every one collects the same tests
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "") for report in skipped)
    terminalreporter.write_sep("-", f"{len(skipped)} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d}  {reason.removeprefix('Skipped: ')}")
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out:4d}  of the full tier not run: scripts/test --full runs them")


def pytest_unconfigure():
    shutil.rmtree(SCRATCH, ignore_errors=True)


LEFT_OUT = pytest.StashKey[int]()

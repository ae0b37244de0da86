"""The compiled CPU kernels against torch in float64, on awkward shapes; needs a C compiler, which torch.compile needs as well."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compiler import NEEDS_COMPILER

from moe.config.load import load
from moe.model import Transformer
from moe.train.flops import counter
from moe_cpu.cross_entropy import cross_entropy_
from moe_cpu.library import CannotCompile, library
from moe_cpu.product import linear, peak_gigaflops, product

pytestmark = NEEDS_COMPILER
RECIPES = Path(__file__).parents[1] / "recipes"

SIZES = [
    (1, 1, 1),
    (1, 33, 5),
    (13, 31, 17),
    (96, 32, 512),
    (97, 65, 513),
    (200, 130, 1030),
    (3, 700, 2),
    (0, 4, 3),
    (4, 0, 3),
    (4, 3, 0),
]


def matrix(rows: int, columns: int, turned: bool, seed: int) -> torch.Tensor:
    """Random, stored by rows or by columns, and a part of a wider matrix."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(columns if turned else rows, (rows if turned else columns) + 3, generator=generator)[:, :-3]
    return stored.t() if turned else stored


@pytest.mark.parametrize(("a_turned", "b_turned"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_a_product_is_torchs_in_float64(size, a_turned, b_turned):
    M, N, K = size
    a, b = matrix(M, K, a_turned, 0), matrix(K, N, b_turned, 1)
    expected = a.double() @ b.double()
    bound = 2e-7 * K * (a.double().abs() @ b.double().abs()) / max(K, 1) ** 0.5 + 1e-30
    assert ((product(a, b) - expected).abs() <= bound).all()
    begun = torch.randn(M, N + 2)[:, :N]
    found = product(a, b, begun.clone(), add=True)
    assert ((found - begun.double() - expected).abs() <= bound + 1e-6 * begun.abs()).all()


def test_threads_change_no_bit():
    a, b = matrix(301, 700, False, 0), matrix(700, 257, True, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nan_and_infinity_pass_through():
    a, b = torch.ones(20, 40), torch.ones(40, 50)
    a[3, 7], a[5, 1] = float("nan"), float("inf")
    out = product(a, b)
    assert out[3].isnan().all()
    assert out[5].isinf().all()
    assert (out[[0, 1, 2, 4, 6]] == 40).all()


def test_linear_has_torchs_gradients():
    x, w = torch.randn(37, 21, requires_grad=True), torch.randn(45, 21, requires_grad=True)
    dy = torch.randn(37, 45)
    found = torch.autograd.grad(linear(x, w), (x, w), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = torch.autograd.grad(wide[0] @ wide[1].t(), wide, dy.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(linear, (x, w))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), "gives"),
        (torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 2), "float64"),
    ],
    ids=("sizes", "type"),
)
def test_what_does_not_fit_is_refused_before_memory_is_touched(a, b, message):
    with pytest.raises(ValueError, match=message):
        product(a, b)


def test_a_compiler_that_fails_is_named_with_what_it_said(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such processor >&2\nexit 1\n")
    broken.chmod(0o755)
    code = "from moe_cpu.library import library; library()"
    environment = {**os.environ, "CC": str(broken), "MOE_CPU_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode
    assert "no such processor" in done.stderr
    assert not list((tmp_path / "cache").glob("*"))


def test_without_a_compiler_the_error_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CannotCompile, match="no C compiler"):
        library.__wrapped__()


@pytest.mark.parametrize("V", [1, 5, 16, 33, 1000])
def test_cross_entropy_is_torchs_in_float64(V):
    logits = torch.randn(9, V) * 5
    logits[2] += 1e4
    logits[3, 0] = -1e30
    targets = torch.randint(V, (9,))
    targets[4] = -100
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    for gradient in (False, True):
        found = logits.clone()
        torch.testing.assert_close(
            cross_entropy_(found, targets, gradient=gradient).double(), expected, rtol=1e-6, atol=2e-6
        )
        torch.testing.assert_close(found.double(), wide.grad if gradient else logits.double(), rtol=1e-5, atol=1e-6)


def test_cross_entropy_passes_nan_on_and_refuses_targets_beyond_the_classes():
    logits = torch.zeros(3, 40)
    logits[1, 7] = float("nan")
    assert cross_entropy_(logits.clone(), torch.zeros(3, dtype=torch.int64), gradient=True).isnan().tolist() == [
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="target 40 is none of 40 classes"):
        cross_entropy_(logits, torch.full((3,), 40), gradient=False)


@pytest.mark.full
@pytest.mark.parametrize("flags", ["-march=haswell", "-march=x86-64"], ids=["avx2", "sse2"])
def test_narrower_vectors_pass_the_same_tests(flags, tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86-64 processors")
    here = Path(__file__).parent
    tests = [str(path) for path in sorted(here.glob("test_cpu_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    environment = {**os.environ, "MOE_CPU_FLAGS": flags, "MOE_CPU_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parent, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_roof_is_above_a_product():
    """A product packs its operands besides: at most the roof, with room for a machine that others use."""
    a, b = torch.randn(480, 256), torch.randn(256, 512)
    product(a, b)
    begun = time.perf_counter()
    product(a, b)
    speed = 2 * a.shape[0] * b.numel() / (time.perf_counter() - begun) / 1e9
    assert speed < 1.5 * peak_gigaflops(rounds=3)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_chunked_loss_is_counted_as_the_whole_one(backend):
    """The ledger's FLOPs: the head's three products are there, whoever computes them and in how many chunks."""
    run = load(RECIPES / "smoke.py", [f"model.backend={backend}", f"model.moe.backend={backend}"])
    counts = []
    for chunk in (0, 64):
        model, ids = Transformer(run.model, loss_chunk=chunk), torch.randint(0, 250, (4, 64))
        with counter(run) as counted:
            model(ids, targets_BS=ids).objective.backward()
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] > 0

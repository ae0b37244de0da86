"""The variants with descriptors and persistent programs (TMA) against the plain ones, and against float64.

Both add the same products in the same order, so nothing may differ but what numpy itself rounds differently. Then where a
descriptor is impossible: the plain variant is taken, whatever the table says.
"""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from ffn_cases import UNIT, Case, check, gradient_of, inputs_of, kernels, results, rms, rows_of

from moe_triton import tuning
from moe_triton.tiles import can_describe

OPS = ("up", "down", "input_bwd")
F16, BF16 = torch.float16, torch.bfloat16

# Several column tiles and a part of one, D and F that no tile divides, experts without rows, rows that go nowhere and whose
# hidden values are never written: a box that is copied whole holds those too.
CASES = {
    "an expert without rows, biases": Case(T=18, D=72, F=136, E=3, K=2, routing="empty_middle", biased=True),
    "weights on the input, rows that go nowhere": Case(
        T=9, D=136, F=72, E=3, routing="ragged", activation="geglu", weight_on="input", dtype=F16
    ),
    "no gate, x alone kept, bfloat16": Case(
        T=40, D=136, F=72, E=5, routing="zipf", activation="relu2", recompute="hidden", dtype=BF16
    ),
    "more programs than tiles": Case(T=1, D=16, F=8, E=1, K=1),
}
MORE = [pytest.param(case, id=name, marks=pytest.mark.full) for name, case in list(CASES.items())[2:]]


@pytest.fixture
def described():
    """Operators with a TMA variant are forced to it."""
    with ExitStack() as stack:
        for op in OPS:
            stack.enter_context(tuning.forced(op, {"TMA": 1}))
        yield


def found(case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rows = rows_of(case)
    inputs = inputs_of(case, rows)
    return results(kernels, case, rows, inputs, gradient_of(case))


@pytest.mark.parametrize("case", [*(pytest.param(case, id=name) for name, case in list(CASES.items())[:2]), *MORE])
def test_both_variants_are_equal(case, request, monkeypatch):
    programs = []
    monkeypatch.setattr("moe_triton.up.num_programs", lambda tiles, tma: programs.append(tma) or (2 if tma else tiles))
    plain = found(case)
    request.getfixturevalue("described")
    persistent = found(case)
    assert set(programs) == {0, 1}
    for name, value in plain.items():
        if name == "x":  # its weights come transposed, which numpy's products may add up in another order
            assert rms(persistent[name] - value) <= 4 * UNIT[case.dtype] * rms(value)
        else:
            assert torch.equal(persistent[name], value), name


@pytest.mark.full
@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_with_descriptors(case):
    check(case)


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize(
    "case", [Case(T=9, D=24, F=47, E=2), Case(T=0, D=16, F=16, E=3)], ids=["47 columns", "no rows"]
)
def test_what_cannot_be_described_takes_the_plain_variant(case, monkeypatch):
    taken = []
    monkeypatch.setattr("moe_triton.down.num_programs", lambda tiles, tma: taken.append(tma) or tiles)
    check(replace(case, dtype=F16))
    assert set(taken) == {0}


def test_a_tensor_that_starts_between_two_multiples_of_16_bytes_is_not_described():
    storage = torch.zeros(2 * 16 * 8 + 1)
    assert can_describe(storage[:-1].view(2, 16, 8))
    assert not can_describe(storage[1:].view(2, 16, 8))
    assert not can_describe(storage[:240].view(2, 24, 5)) and not can_describe(torch.zeros(0, 8))

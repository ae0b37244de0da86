"""The fused score and top-k against the float64 reference (topk_cases.py): experts exactly, weights, scores and gradients.

The full tier runs a set of cases in which every pair of values occurs, the default tier a third of it. Beside
them torch.topk where no two scores are equal, hand-worked rows, finite differences, and what values cannot show.
"""

from dataclasses import replace

import pytest
import torch
from covering import covering
from topk_cases import Choice, check, inputs_of, kernels, results
from torch import Tensor

from moe_triton import reference, topk
from moe_triton.topk import score_topk

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16

VALUES = {
    "T": [0, 1, 7, 64, 129],
    "E": [1, 2, 7, 8, 60, 64, 128],
    "K": [1, 2, 3, 8, "E"],
    "score": list(topk.SCORES),
    "normalize": [False, True],
    "biased": [False, True],
    "scaling_factor": [1.0, 2.5],
    "logits": ["normal", "tied"],
    "dtype": [F32, F16, BF16],
    "of": ["both", "weights", "scores"],
}


def choice_of(combination: dict) -> Choice:
    """The case of one combination of VALUES, with K no larger than E; one weight divided by itself has no gradient."""
    E, K = combination["E"], combination["K"]
    K = E if K == "E" else min(K, E)
    return Choice(**{**combination, "K": K, "normalize": combination["normalize"] and K > 1})


CHOICES = [choice_of(combination) for combination in covering(VALUES)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.full] if i % 3 else []) for i, case in enumerate(CHOICES)],
)
def test_experts_weights_scores_and_gradients(case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Choice(T=3, E=1000, K=10, normalize=True),
        Choice(T=2, E=4096, K=3, score="sigmoid", biased=True),
        pytest.param(Choice(T=5, E=257, K=257, score="sigmoid", normalize=True), marks=pytest.mark.full),
        pytest.param(Choice(T=600, E=512, K=10, normalize=True, dtype=BF16), marks=pytest.mark.full),
        pytest.param(Choice(T=4096, E=8, K=2, score="sqrt_softplus", biased=True), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_many_experts_and_many_tokens(case):
    check(case)


@pytest.mark.parametrize("score", topk.SCORES)
def test_large_logits_overflow_nothing(score):
    case = Choice(E=60, K=3, score=score, logits="large", of="weights")
    logits_TE, _ = inputs_of(case)
    found = results(kernels, case, logits_TE, None, (torch.ones(33, 3), torch.ones(33, 60)))
    exact = results(reference.score_topk, case, logits_TE.double(), None, (torch.ones(33, 3), torch.ones(33, 60)))
    assert found["expert"].tolist() == exact["expert"].tolist()
    for name, atol in {"weight": 1e-20, "score": 1e-20, "dlogits": 1e-6}.items():
        assert torch.allclose(found[name].double(), exact[name], rtol=1e-5, atol=atol), name


def test_rows_by_hand():
    logits_TE = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, -0.0, -1.0, 0.0, -2.0]])
    assert score_topk(logits_TE, 4).expert_TK.tolist() == [[1, 2, 4, 3], [0, 1, 3, 2]]
    assert score_topk(-logits_TE, 2).expert_TK.tolist() == [[0, 3], [4, 2]]
    # scores 3/4, 0, 1/2, 0: the bias moves expert 0 to the end and is in no weight
    logits_TE = torch.tensor([[3.0, 0.0, 1.0, 0.0]]).log()
    bias_E = torch.tensor([-1.0, 0.25, 0.25, 0.25])
    chosen = score_topk(logits_TE, 2, score="sigmoid", bias_E=bias_E)
    assert chosen.expert_TK.tolist() == [[2, 1]]
    assert torch.allclose(chosen.weight_TK, torch.tensor([[0.5, 0.0]]))
    chosen = score_topk(torch.tensor([[2.0, 5.0, 1.0]]).log(), 2, normalize=True, scaling_factor=7.0)
    assert torch.allclose(chosen.weight_TK, torch.tensor([[5.0, 2.0]]))


@pytest.mark.parametrize("k", [1, 5, 60])
def test_the_order_is_that_of_torch_topk_where_no_two_are_equal(k):
    logits_TE = torch.rand(40, 60).argsort(dim=1) / 8
    assert torch.equal(score_topk(logits_TE, k).expert_TK, logits_TE.topk(k, dim=1).indices)


def test_softmax_after_selection_is_the_normalised_softmax_before_it():
    logits_TE = torch.randn(20, 9, dtype=F64)
    best = logits_TE.topk(3, dim=1)
    chosen = score_topk(logits_TE, 3, normalize=True)
    assert torch.equal(chosen.expert_TK, best.indices)
    assert torch.allclose(chosen.weight_TK, best.values.softmax(1), rtol=1e-12)


@pytest.mark.parametrize("score", topk.SCORES)
@pytest.mark.parametrize("biased", [False, True])
def test_nan_ranks_first_reaches_the_weights_and_stays_in_its_row(score, biased):
    logits_TE, bias_E = torch.randn(6, 5), torch.zeros(5) if biased else None
    clean = score_topk(logits_TE, 3, score=score, bias_E=bias_E)
    logits_TE[2, 3], logits_TE[4] = torch.nan, torch.nan
    found = score_topk(logits_TE, 3, score=score, bias_E=bias_E)
    expected = reference.score_topk(logits_TE, 3, score=score, bias_E=bias_E)
    assert torch.equal(found.expert_TK, expected[1])
    assert torch.equal(found.weight_TK.isnan(), expected[0].isnan())
    assert found.weight_TK[2].isnan().any()
    assert found.expert_TK[4].tolist() == [0, 1, 2]
    whole = [0, 1, 3, 5]
    assert torch.equal(found.expert_TK[whole], clean.expert_TK[whole])
    assert torch.equal(found.weight_TK[whole], clean.weight_TK[whole])


def test_experts_of_minus_infinity_are_chosen_last_and_get_no_gradient():
    logits_TE = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0]], requires_grad=True)
    chosen = score_topk(logits_TE, 3, normalize=True)
    chosen.weight_TK[:, 0].sum().backward()
    assert chosen.expert_TK.tolist() == [[3, 1, 0]]
    assert chosen.weight_TK[0, 2] == 0
    assert logits_TE.grad[0, 0] == logits_TE.grad[0, 2] == 0 < logits_TE.grad[0, 3]


@pytest.mark.parametrize(
    "score, normalize, biased",
    [
        pytest.param(score, normalize, biased, marks=[] if normalize and biased else [pytest.mark.full])
        for score in topk.SCORES
        for normalize in (False, True)
        for biased in (False, True)
    ],
)
def test_gradcheck(score, normalize, biased):
    # distinct by more than a finite difference, so that nobody's choice changes
    logits_TE = (torch.stack([torch.randperm(5) for _ in range(3)]) / 3.0).double().requires_grad_()
    bias_E = torch.tensor([0.3, 0.0, -0.2, 0.1, 0.0]).double() if biased else None

    def function(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        rule = {"score": score, "normalize": normalize, "scaling_factor": 1.7, "bias_E": bias_E}
        chosen = score_topk(logits_TE, 2, keep_scores=True, **rule)
        assert chosen.score_TE is not None
        return chosen.weight_TK, chosen.score_TE

    assert torch.autograd.gradcheck(function, (logits_TE,))


@pytest.mark.plain_memory
def test_two_runs_are_bitwise_equal_and_permuted_tokens_permute_bitwise():
    case = Choice(T=100, E=60, K=8, score="sigmoid", normalize=True, biased=True)
    logits_TE, bias_E = inputs_of(case)
    gradients = torch.randn(100, 8), torch.randn(100, 60)
    first, second = (results(kernels, case, logits_TE, bias_E, gradients) for _ in range(2))
    order_T = torch.randperm(100)
    permuted = results(kernels, case, logits_TE[order_T], bias_E, tuple(g[order_T] for g in gradients))
    for name, value in first.items():
        assert torch.equal(second[name], value), name
        assert torch.equal(permuted[name], value[order_T]), name


def test_the_bias_has_no_gradient_and_strides_change_nothing():
    logits_TE, bias_E = inputs_of(Choice(T=20, biased=True))
    usual = logits_TE.clone().requires_grad_()
    weight_TK = score_topk(usual, 2, normalize=True, bias_E=bias_E).weight_TK
    weight_TK.backward(torch.tensor([1.0, 2.0]).repeat(20, 1))
    strided = logits_TE.t().contiguous().t().requires_grad_()
    bias_E = bias_E.requires_grad_()
    other = score_topk(strided, 2, normalize=True, bias_E=bias_E).weight_TK
    other.backward(torch.tensor([1.0, 2.0]).expand(20, 2))
    assert torch.equal(other, weight_TK)
    assert torch.equal(strided.grad, usual.grad)
    assert bias_E.grad is None


def test_one_launch_each_way_and_only_logits_and_experts_are_kept(launches):
    logits_TE = torch.randn(50, 60, dtype=BF16).requires_grad_()
    saved: list[tuple] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    launches.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chosen = score_topk(logits_TE, 4, keep_scores=True)
    assert launches == ["topk_fwd_kernel"]
    assert saved == [((50, 60), BF16), ((50, 4), torch.int64)]
    (chosen.weight_TK.sum() + chosen.score_TE.square().sum()).backward()
    assert launches == ["topk_fwd_kernel", "topk_bwd_kernel"]
    assert score_topk(logits_TE, 4).score_TE is None


@pytest.mark.parametrize("keep_scores", [True, pytest.param(False, marks=pytest.mark.full)])
def test_operator_contract(keep_scores):
    logits_TE = torch.randn(6, 5, requires_grad=True)
    arguments = (logits_TE, torch.zeros(5), 2, "sigmoid", True, 2.5, keep_scores)
    torch.library.opcheck(torch.ops.moe_triton.topk.default, arguments)


def test_shapes_follow_on_the_meta_device_and_in_one_graph():
    logits_TE = torch.empty(12, 7, device="meta", dtype=BF16, requires_grad=True)
    chosen = score_topk(logits_TE, 3, keep_scores=True)
    assert chosen.weight_TK.shape == chosen.expert_TK.shape == (12, 3)
    assert (chosen.weight_TK.dtype, chosen.expert_TK.dtype) == (F32, torch.int64)
    chosen.weight_TK.sum().backward()
    assert logits_TE.grad.shape == (12, 7)
    compiled = torch.compile(lambda logits: score_topk(logits, 3).weight_TK, fullgraph=True, backend="aot_eager")
    logits_TE = torch.randn(12, 7)
    assert torch.equal(compiled(logits_TE), score_topk(logits_TE, 3).weight_TK)


@pytest.mark.parametrize(
    "E, k, options, message",
    [
        (4, 5, {}, r"k \(5\) of 4 experts: k must be from 1 to the number of experts, at most 4096"),
        (4, 0, {}, r"k \(0\) of 4 experts"),
        (4097, 1, {}, r"k \(1\) of 4097 experts: .* at most 4096"),
        (4, 1, {"score": "tanh"}, r"score 'tanh' is unknown: use one of softmax, sigmoid, sqrt_softplus"),
        (4, 1, {"bias_E": torch.zeros(3)}, r"bias_E is \[3\] but must be \[4\]"),
    ],
)
def test_mistakes_are_named(E, k, options, message):
    with pytest.raises(ValueError, match=message):
        score_topk(torch.zeros(2, E), k, **options)


def test_a_case_that_must_fail_fails(monkeypatch):
    right = topk.score_topk

    def wrong(logits_TE: Tensor, k: int, **options):
        chosen = right(logits_TE, k, **options)
        return chosen._replace(weight_TK=chosen.weight_TK * 1.001)

    monkeypatch.setattr(topk, "score_topk", wrong)
    with pytest.raises(AssertionError, match="weight: error"):
        check(replace(Choice(), of="weights"))

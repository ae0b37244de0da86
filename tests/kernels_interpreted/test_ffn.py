"""The expert FFN's kernels against float64 autograd of the plain formula (ffn_cases.py): y and every gradient.

The default tier runs every value of every parameter at least once; the full tier runs a set in which every pair occurs.
Then what values cannot show: repeatability, equivariance, what is kept for backward, launches, tracing, refusals.
"""

from dataclasses import replace

import pytest
import torch
from covering import covering, pairs_of
from ffn_cases import (
    ALPHA,
    LIMIT,
    UNIT,
    Case,
    check,
    gradient_of,
    inputs_of,
    kept_experts,
    kernels,
    plain,
    results,
    rms,
    rows_of,
)
from torch import Tensor

from moe_triton import ffn, reference
from moe_triton.combine import combine
from moe_triton.down import down
from moe_triton.hidden_backward import hidden_bwd, row_weight_bwd
from moe_triton.input_backward import input_bwd
from moe_triton.plan import RoutingPlan, routing_plan
from moe_triton.tiles import Weights
from moe_triton.up import up
from moe_triton.weight_backward import w_down_bwd, w_up_bwd

BF16, F16 = torch.bfloat16, torch.float16

CASES = {
    "as it comes: odd D and F, prime E": Case(),
    "K = 1, bfloat16, biases": Case(T=64, D=64, F=32, E=8, K=1, dtype=BF16, biased=True),
    "Zipf, float16, gradient out of a larger tensor": Case(
        T=129, D=40, F=24, E=2, K=2, routing="zipf", dtype=F16, gradient="sliced"
    ),
    "K = E, GeGLU, transposed gradient": Case(
        T=7, D=128, F=128, E=7, K=7, activation="geglu", biased=True, gradient="strided"
    ),
    "one token, more experts than rows, weight on the input": Case(T=1, E=60, K=8, weight_on="input", dtype=F16),
    "one of each": Case(T=1, D=16, F=16, E=1, K=1, gradient="expanded"),
    "no tokens": Case(T=0),
    "no rows for the first expert, GELU, x alone kept": Case(
        K=3, routing="empty_first", activation="gelu", biased=True, recompute="hidden"
    ),
    "none for the middle one, ReLU², one gradient for all tokens": Case(
        K=1, routing="empty_middle", activation="relu2", dtype=BF16, gradient="expanded"
    ),
    "none for the last one, SiLU, biases and weight on the input": Case(
        T=20, E=8, routing="empty_last", activation="silu", weight_on="input", biased=True, gradient="strided"
    ),
    "all to one of 60 experts": Case(T=40, D=64, F=96, E=60, routing="one"),
    "0 to 2K rows per token, some nowhere": Case(
        D=48, F=70, E=5, routing="ragged", weight_on="input", biased=True, recompute="hidden", dtype=BF16
    ),
    "experts repeated within a token, many tiles of D": Case(
        T=20, D=200, F=20, E=3, K=8, routing="ragged", activation="relu2", dtype=F16
    ),
    "two rows per expert of every 8 tokens, the others dropped": Case(
        T=45, D=40, F=24, E=5, K=2, routing="zipf", biased=True, capacity=2
    ),
    "drops among ragged rows, weight on the input": Case(
        D=24, F=16, E=3, routing="ragged", weight_on="input", recompute="hidden", dtype=F16, capacity=1
    ),
    "no capacity at all": Case(T=9, D=16, F=8, E=3, biased=True, capacity=0),
    "gpt-oss's activation and biases": Case(
        T=40, D=48, F=40, E=5, activation="swiglu_oai", biased=True, routing="zipf"
    ),
    "128 experts": Case(T=8, D=24, F=47, E=128, K=3, routing="zipf"),
}

VALUES = {
    "T": [0, 1, 7, 64, 129, 512],
    "shape": [(64, 32), (97, 47), (128, 128), (256, 96), (600, 100)],
    "E": [1, 2, 7, 8, 60, 64, 128],
    "K": [1, 2, 3, 8, "E"],
    "routing": ["uniform", "zipf", "one", "empty_first", "empty_middle", "empty_last", "ragged"],
    "dtype": [torch.float32, F16, BF16],
    "activation": ["swiglu", "geglu", "swiglu_oai", "relu2", "gelu", "silu"],
    "biased": [False, True],
    "weight_on": ["output", "input"],
    "recompute": ["activation", "hidden"],
    "gradient": ["dense", "expanded", "strided", "sliced"],
    "capacity": [None, 3],
}


def case_of(combination: dict) -> Case:
    """The case of one combination of VALUES; K = E is 8 where there are more experts, so that rows stay few."""
    D, F = combination["shape"]
    K = min(combination["E"], 8) if combination["K"] == "E" else combination["K"]
    rest = {name: value for name, value in combination.items() if name not in ("shape", "K")}
    return Case(D=D, F=F, K=K, **rest)


PAIRS = covering(VALUES)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case):
    check(case)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [case_of(combination) for combination in PAIRS], ids=str)
def test_values_and_gradients_of_every_pair(case):
    check(case)


def test_the_full_tier_meets_every_pair_of_values():
    met = set().union(*(pairs_of(combination) for combination in PAIRS))
    names = list(VALUES)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert all((a, x, b, y) in met for x in VALUES[a] for y in VALUES[b])
    assert len(PAIRS) <= 150


SMALL = Case(T=4, D=4, F=3, E=2, K=2, dtype=torch.float64)


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        pytest.param(replace(SMALL, activation="geglu", biased=True, weight_on="input"), marks=pytest.mark.full),
        pytest.param(replace(SMALL, activation="relu2", biased=True, recompute="hidden"), marks=pytest.mark.full),
        pytest.param(replace(SMALL, activation="gelu", weight_on="input"), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_gradcheck(case):
    rows = rows_of(case)
    inputs = {name: tensor.double().requires_grad_() for name, tensor in inputs_of(case, rows).items()}

    def function(*tensors: Tensor) -> Tensor:
        return kernels(case, rows, dict(zip(inputs, tensors, strict=True)))

    # fast mode: a random direction instead of every element, each of which would take all the launches
    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=20, D=13, F=7, E=5, K=3, activation=activation, biased=True, weight_on=weight_on)
        for activation, weight_on in [
            ("swiglu", "output"),
            ("geglu", "input"),
            ("swiglu_oai", "output"),
            ("relu2", "output"),
            ("gelu", "input"),
        ]
    ],
    ids=str,
)
def test_the_reference_is_the_plain_formula(case):
    rows = rows_of(case)
    token_R, expert_R, _ = rows
    inputs = {name: tensor.double() for name, tensor in inputs_of(case, rows).items()}
    token_P, row_P, _, offsets_E1, _ = reference.routing_plan(token_R, expert_R, num_experts=case.E, tile_rows=16)
    y = reference.expert_ffn(
        inputs["x"],
        inputs.get("w_gate"),
        inputs["w_up"],
        inputs["w_down"],
        token_P,
        inputs["weight"][row_P],
        offsets_E1,
        weight_on=case.weight_on,
        activation=case.activation,
        alpha=ALPHA,
        limit=LIMIT,
        b_gate_EF=inputs.get("b_gate"),
        b_up_EF=inputs.get("b_up"),
        b_down_ED=inputs.get("b_down"),
    )
    assert torch.allclose(y, plain(case, rows, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.plain_memory
def test_two_runs_are_bitwise_equal_and_so_is_a_second_backward():
    case = Case(T=20, D=48, F=32, K=3, routing="ragged")
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    first, second = (results(kernels, case, rows, inputs, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y = kernels(case, rows, inputs)
    once, again = (torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_recomputing_the_hidden_rows_changes_no_bit():
    case = Case(T=20, D=48, F=32, dtype=F16, biased=True)
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    kept = results(kernels, case, rows, inputs, dy)
    recomputed = results(kernels, replace(case, recompute="hidden"), rows, inputs, dy)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


EQUIVARIANT = [
    Case(T=24, D=48, F=32, K=3, biased=True),
    pytest.param(
        Case(T=150, E=3, routing="zipf", dtype=F16, biased=True), marks=pytest.mark.full
    ),  # several tiles each
    pytest.param(Case(T=150, E=3, dtype=BF16, weight_on="input", activation="relu2"), marks=pytest.mark.full),
    pytest.param(Case(T=150, E=60, K=8, recompute="hidden", activation="geglu"), marks=pytest.mark.full),
]


@pytest.mark.parametrize("case", EQUIVARIANT, ids=str)
def test_relabelled_experts_permute_bitwise(case):
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    order_E = torch.randperm(case.E)
    relabelled = {k: t[order_E] if k[:2] in ("w_", "b_") else t for k, t in inputs.items()}
    new_rows = rows[0], order_E.argsort()[rows[1]], rows[2]
    old, new = results(kernels, case, rows, inputs, dy), results(kernels, case, new_rows, relabelled, dy)
    for name, value in old.items():
        assert torch.equal(new[name], value[order_E] if name[:2] in ("w_", "b_") else value), name


@pytest.mark.parametrize("case", EQUIVARIANT, ids=str)
def test_permuted_tokens_permute_bitwise_and_weights_agree(case):
    (token_R, expert_R, token_offsets), dy = rows_of(case), gradient_of(case)
    rows = token_R, expert_R, token_offsets
    inputs = inputs_of(case, rows)
    order_T = torch.randperm(case.T)
    order_R = (order_T[:, None] * case.K + torch.arange(case.K)).flatten()
    permuted = {**inputs, "x": inputs["x"][order_T], "weight": inputs["weight"][order_R]}
    old = results(kernels, case, rows, inputs, dy)
    new = results(kernels, case, (token_R, expert_R[order_R], token_offsets), permuted, dy[order_T])
    assert torch.equal(new["y"], old["y"][order_T])
    assert torch.equal(new["x"], old["x"][order_T])
    assert torch.equal(new["weight"], old["weight"][order_R])
    for name in (name for name in old if name[:2] in ("w_", "b_")):
        assert rms(new[name] - old[name]) <= 8 * UNIT[case.dtype] * rms(old[name]), name


@pytest.mark.parametrize("recompute", ["activation", "hidden"])
@pytest.mark.parametrize("E", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_backward_keeps_x_and_the_preactivations_only(dtype, E, recompute):
    case = Case(T=32, D=32, F=16, E=E, dtype=dtype, recompute=recompute)
    T, D, F, K = case.T, case.D, case.F, case.K
    rows = rows_of(case)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(case, rows).items()}
    plan = routing_plan(*rows, num_experts=E)
    parameters = {t.untyped_storage().data_ptr() for name, t in inputs.items() if name.startswith("w_")}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.nbytes():
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        weights = Weights(inputs["w_gate"], inputs["w_up"], inputs["w_down"])
        ffn.planned_ffn(inputs["x"], weights, inputs["weight"], plan, recompute=recompute)
    hidden = 2 * K * F if recompute == "activation" else 0
    indices = sum(t.untyped_storage().nbytes() for t in plan[:-1])
    assert sum(saved.values()) == (D + hidden) * T * dtype.itemsize + inputs["weight"].nbytes + indices
    # row and token of each place, place of each row: 3 int32 per row; offsets of tokens; schedule and offsets of experts
    assert indices == 12 * T * K + 8 * (T + 1) + 8 * len(plan.schedule) + 8 * (E + 1)


PLAN_KERNELS = ["plan_count_kernel", "plan_scan_kernel", "plan_place_kernel", "plan_schedule_kernel"]
FORWARD = ["up_fwd_kernel", "down_fwd_kernel", "combine_fwd_kernel"]
BACKWARD = ["hidden_bwd_kernel", "w_down_bwd_kernel", "w_up_bwd_kernel", "input_bwd_kernel", "combine_fwd_kernel"]


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_three_launches_forward_and_five_and_a_reduction_backward(launches, weight_on):
    case = Case(D=32, F=16, weight_on=weight_on)
    rows = rows_of(case)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(case, rows).items()}
    launches.clear()
    y = kernels(case, rows, inputs)
    assert launches == PLAN_KERNELS + FORWARD
    launches.clear()
    y.sum().backward()
    assert launches == [*BACKWARD, "row_weight_bwd_kernel"]


def test_only_what_is_asked_for_is_computed(launches):
    case = Case(T=12, D=32, F=16, E=3, biased=True)
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    full = results(kernels, case, rows, inputs, dy)
    spared = {
        "x": {"w_down_bwd_kernel", "w_up_bwd_kernel", "row_weight_bwd_kernel"},
        "w_gate": {"w_down_bwd_kernel", "input_bwd_kernel", "combine_fwd_kernel", "row_weight_bwd_kernel"},
        "w_down": {"w_up_bwd_kernel", "input_bwd_kernel", "combine_fwd_kernel", "row_weight_bwd_kernel"},
        "weight": {"w_down_bwd_kernel", "w_up_bwd_kernel", "input_bwd_kernel", "combine_fwd_kernel"},
    }
    for name in inputs:
        tensors = {**inputs, name: inputs[name].clone().requires_grad_()}
        y = kernels(case, rows, tensors)
        launches.clear()
        (gradient,) = torch.autograd.grad(y, tensors[name], dy)
        assert torch.equal(gradient.double(), full[name]), name
        assert not spared.get(name, set()) & set(launches), name
    with torch.no_grad():
        y = kernels(case, rows, {name: tensor.requires_grad_() for name, tensor in inputs.items()})
    assert torch.equal(y.double(), full["y"])
    assert not y.requires_grad


def test_weight_gradients_in_float32_from_bfloat16_weights():
    case = Case(T=64, D=32, F=16, E=2, dtype=BF16)
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    plan = routing_plan(*rows, num_experts=case.E)
    exact = results(plain, case, rows, {k: t.double() for k, t in inputs.items()}, dy.double())
    errors = []
    for gradient_dtype in (BF16, torch.float32):
        weights = {name: inputs[name].clone().requires_grad_() for name in ("w_gate", "w_up", "w_down")}
        for weight in weights.values():
            weight.grad_dtype = gradient_dtype
        y = ffn.planned_ffn(
            inputs["x"], Weights(*weights.values()), inputs["weight"], plan, gradient_dtype=gradient_dtype
        )
        gradients = torch.autograd.grad(y, list(weights.values()), dy)
        assert all(gradient.dtype == gradient_dtype for gradient in gradients)
        errors.append({name: rms(g.double() - exact[name]) for name, g in zip(weights, gradients, strict=True)})
    rounded, unrounded = errors
    assert all(unrounded[name] < rounded[name] for name in rounded)


def test_main_gradients_are_added_to_in_place():
    case = Case(T=20, D=32, F=16, E=4, dtype=F16, biased=True, routing="empty_last")
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    alone = results(kernels, case, rows, inputs, dy)
    names = {name: f"{name}_{letters}" for name, letters in zip(list(inputs)[1:7], ORDER, strict=True)}
    main = {full: torch.full(inputs[name].shape, 3.0) for name, full in names.items()}
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    weights = Weights(**{full: tensors[name] for name, full in names.items()})
    plan = routing_plan(*rows, num_experts=case.E)
    micro_batches = [
        ffn.planned_ffn(tensors["x"], weights, tensors["weight"], plan, main_gradients=main) for _ in range(2)
    ]
    for y in micro_batches:
        y.backward(dy)
    for name, full in names.items():
        assert tensors[name].grad is None
        assert rms(main[full].double() - 3 - 2 * alone[name]) <= 1e-3 * rms(alone[name]), name
        assert main[full].dtype == torch.float32
    assert (main["w_down_EFD"][3] == 3).all()
    assert tensors["x"].grad is not None
    assert torch.equal(tensors["x"].grad.double(), 2 * alone["x"])
    with pytest.raises(ValueError, match=r"main_gradients has .* but must have one for each of"):
        ffn.planned_ffn(tensors["x"], weights, tensors["weight"], plan, main_gradients={"w_up_EDF": main["w_up_EDF"]})


ORDER = ("EDF", "EDF", "EFD", "EF", "EF", "ED")


@pytest.mark.parametrize("weight_on", ["output", pytest.param("input", marks=pytest.mark.full)])
def test_dropped_rows_add_exactly_nothing(weight_on):
    case = Case(T=24, D=32, F=16, E=4, K=2, routing="zipf", biased=True, weight_on=weight_on, capacity=2)
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    dropped_R = kept_experts(case, rows) == case.E
    assert 5 < dropped_R.sum() < 40
    found = results(kernels, case, rows, inputs, dy)
    assert not found["weight"][dropped_R].any()
    assert found["weight"][~dropped_R].all()
    # without a capacity, and with those rows sent nowhere: the same bits; so are they if nothing can be read from the weights
    sent_nowhere = (rows[0], torch.where(dropped_R, case.E, rows[1]), rows[2])
    poisoned = {**inputs, "weight": torch.where(dropped_R, torch.nan, inputs["weight"])}
    for other in (
        results(kernels, replace(case, capacity=None), sent_nowhere, inputs, dy),
        results(kernels, case, rows, poisoned, dy),
    ):
        assert all(torch.equal(found[name], other[name]) for name in found)


def test_strided_inputs():
    case = Case(T=12, D=16, F=8, E=3)
    rows, dy = rows_of(case), gradient_of(case)
    inputs = inputs_of(case, rows)
    strided = {k: t.transpose(0, -1).contiguous().transpose(0, -1) for k, t in inputs.items()}
    assert not strided["x"].is_contiguous()
    usual, other = (results(kernels, case, rows, i, dy) for i in (inputs, strided))
    assert all(torch.equal(usual[name], other[name]) for name in usual)


def arguments_of(case: Case) -> tuple:
    """The operator's own arguments, with gradients wanted."""
    rows = rows_of(case)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(case, rows).items()}
    plan = routing_plan(*rows, num_experts=case.E)
    names = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down", "weight")
    tensors = (inputs["x"], *(inputs.get(name) for name in names), *plan)
    rule = (case.activation, ALPHA, LIMIT, case.weight_on == "input")
    return (*tensors, *rule, case.recompute == "activation", case.dtype, [])


@pytest.mark.parametrize("recompute", ["activation", "hidden"])
def test_operator_contract(recompute):
    case = Case(T=9, D=8, F=6, E=3, recompute=recompute, dtype=torch.float64)
    torch.library.opcheck(torch.ops.moe_triton.expert_ffn.default, arguments_of(case))


def test_compiles_as_one_graph_without_recompiling_for_other_routings(launches):
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph.forward

    case = Case(T=12, D=16, F=8, E=3)
    inputs = inputs_of(case, rows_of(case))
    compiled = torch.compile(lambda rows: kernels(case, rows, inputs), fullgraph=True, backend=count)
    for routing in ("uniform", "empty_middle", "one"):
        rows = rows_of(replace(case, routing=routing))
        assert torch.equal(compiled(rows), kernels(case, rows, inputs))
    assert graphs == 1


def test_compiles_once_for_token_counts_of_the_same_tile_height():
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph.forward

    case = Case(T=12, D=16, F=8, E=3)
    weights = inputs_of(case, rows_of(case))
    compiled = torch.compile(
        lambda rows, inputs: kernels(case, rows, inputs), fullgraph=True, backend=count, dynamic=True
    )
    for T in (12, 17, 24):  # 8 to 16 rows per expert: tiles of 16 rows
        rows = rows_of(replace(case, T=T))
        inputs = {**weights, "x": torch.randn(T, 16), "weight": torch.rand(2 * T)}
        assert torch.equal(compiled(rows, inputs), kernels(case, rows, inputs))
    assert graphs == 1


@pytest.mark.plain_memory  # else 40 GB of address space would be filled, of which kilobytes are used
def test_tokens_rows_and_experts_beyond_32_bits():
    T = P = 2**25 + 64  # times D = F = 64: more than 2^31 elements
    E = 2**19 + 8  # times D·F: likewise
    num_rows, first = 20, P - 20
    x_TD, dy_TD = (torch.empty(P, 64, dtype=F16) for _ in range(2))
    w_gate, w_up, w_down = (torch.empty(E, 64, 64, dtype=F16) for _ in range(3))
    tokens = T - 1 - 3 * torch.arange(num_rows)
    for tensor in (x_TD, dy_TD):
        tensor[tokens] = torch.randn(num_rows, 64).half()
    for weight in (w_gate, w_up, w_down):
        weight[-1] = (torch.randn(64, 64) / 8).half()
    token_P, row_P = torch.empty(P, dtype=torch.int32), torch.empty(P, dtype=torch.int32)
    token_P[first:], row_P[first:] = tokens.int(), torch.arange(num_rows, dtype=torch.int32)
    offsets_E1 = torch.full((E + 1,), first)
    offsets_E1[-1] = P
    plan = RoutingPlan(
        token_P,
        row_P,
        reverse_R=torch.arange(first, P),
        offsets_E1=offsets_E1,
        token_offsets=torch.arange(num_rows + 1),
        schedule=torch.tensor([[E - 1, first]], dtype=torch.int32),
        tile_rows=32,
    )
    weights, weight_R = Weights(w_gate, w_up, w_down), torch.rand(num_rows)

    def expected(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, weight: Tensor) -> Tensor:
        return (torch.nn.functional.silu(x @ w_gate) * (x @ w_up)) @ w_down * weight[:, None]

    exact = [t.double().requires_grad_() for t in (x_TD[tokens], w_gate[-1], w_up[-1], w_down[-1], weight_R)]
    y = expected(*exact)
    dx, dw_gate, dw_up, dw_down, dweight = torch.autograd.grad(y, exact, dy_TD[tokens].double())

    rule = {"activation": "swiglu", "alpha": ALPHA, "limit": LIMIT, "weigh_input": False}
    gate_PF, up_PF, hidden_PF = up(x_TD, weights, weight_R, plan, keep=True, **rule)
    found = {"y": combine(down(hidden_PF, weights, plan), weight_R, plan)}
    del hidden_PF
    dgate, dup, weighted, parts = hidden_bwd(dy_TD, gate_PF, up_PF, weights, weight_R, plan, **rule)
    found["dx"] = combine(input_bwd(dgate, dup, x_TD, weights, weight_R, plan, weigh_input=False)[0], None, plan)
    found["dweight"] = row_weight_bwd(parts, weight_R, plan)
    # one expert only, because each has its programs
    of_last = plan._replace(offsets_E1=offsets_E1[-2:])
    gradients = {name: torch.empty(1, 64, 64) for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")}
    w_down_bwd(weighted, dy_TD, weight_R, of_last, gradients, weigh_input=False)
    w_up_bwd(x_TD, dgate, dup, weight_R, of_last, gradients, weigh_input=False)
    for name, value in {"y": y, "dx": dx, "dweight": dweight}.items():
        assert rms(found[name].double() - value) <= 4e-3 * rms(value), name
    for name, value in zip(gradients, (dw_gate, dw_up, dw_down), strict=True):
        assert rms(gradients[name][0].double() - value) <= 4e-3 * rms(value), name


def test_shapes_follow_on_the_meta_device():
    case = Case(T=12, D=16, F=8, E=3, biased=True)
    rows = tuple(t.to("meta") for t in rows_of(case))
    real = rows_of(case)
    inputs = {k: t.to("meta").requires_grad_() for k, t in inputs_of(case, real).items()}
    y = kernels(case, rows, inputs)  # pyright: ignore[reportArgumentType]
    y.sum().backward()
    assert y.shape == (12, 16)
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "tanh"}, r"activation 'tanh' is unknown: use one of swiglu, geglu"),
        ({"activation": "gelu"}, r"gelu takes no w_gate_EDF"),
        ({"w_gate": None}, r"swiglu takes w_gate_EDF: it has a gate"),
        ({"b_up": torch.zeros(3, 8)}, r"b_gate_EF and b_up_EF come together"),
        ({"w_up": torch.zeros(3, 8, 16)}, r"w_up_EDF is \[3, 8, 16\] of torch.float32 but must be \[3, 16, 8\]"),
        ({"w_down": torch.zeros(3, 8, 16, dtype=F16)}, r"w_down_EFD is .* torch.float16 but must be .* torch.float32"),
        ({"x": torch.zeros(12, 15)}, r"x_TD has 15 columns but w_down_EFD gives 16"),
    ],
)
def test_mistakes_are_named(change, message):
    case = Case(T=12, D=16, F=8, E=3)
    rows = rows_of(case)
    inputs = inputs_of(case, rows)
    case = replace(case, activation=change.pop("activation", "swiglu"))
    with pytest.raises(ValueError, match=message):
        kernels(case, rows, {**inputs, **change})

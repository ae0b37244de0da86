"""What the experts put out on average, for a router that lets it stand in for experts it did not choose."""

import torch
from torch import Tensor, nn

from moe.experts import Experts
from moe.routing import Counts, Routing, Selection, Tokens, fixed_offsets


@torch.no_grad()
def output_sums(
    experts: Experts, after: nn.Module | None, x_TD: Tensor, routing: Routing, tokens: Tokens, *, stride: int
) -> Counts:
    """Sum of each expert's outputs, before any gate, over its rows of every stride-th token of a batch row, and their count.

    `after` is a linear map that follows the experts. The routing has the same number of rows for every token. Additive:
    output_sum_ED [E, D] float32 (float64 stays), output_rows_E [E] int64. Which tokens are taken is a function of position and
    step, the same in every layout, and moves on each step. One more forward pass of the experts over 1/stride of the rows.
    """
    T, E, B = x_TD.shape[0], routing.num_experts, tokens.num_rows
    S, K = T // max(B, 1), routing.expert_R.shape[0] // max(T, 1)
    place_S = (torch.arange(0, S, stride, device=x_TD.device) + tokens.step) % max(S, 1)
    expert_R = routing.expert_R.view(B, S, K).index_select(1, place_S).flatten()
    x_RD = x_TD.view(B, S, -1).index_select(1, place_S).flatten(0, 1).repeat_interleave(K, 0)
    row_R = torch.arange(expert_R.shape[0], device=x_TD.device)
    alone = Routing(
        token_R=row_R,
        expert_R=expert_R,
        weight_R=torch.ones_like(expert_R, dtype=routing.weight_R.dtype),
        token_offsets=fixed_offsets(len(row_R), 1, x_TD.device),
        num_experts=E,
        selection=Selection(row_R, expert_R),
    )
    dispatch = experts.plan(alone)
    # in exact sizes: a row that fixed sizes drop would count as an output of zero
    arrival = experts.start(x_RD, dispatch, exact=True)
    y_RD = experts(x_RD, dispatch, arrival).to(torch.promote_types(x_TD.dtype, torch.float32))
    is_expert_RE = expert_R.unsqueeze(1) == torch.arange(E, device=x_TD.device)
    sum_ED = is_expert_RE.t().to(y_RD.dtype) @ y_RD
    return {"output_sum_ED": sum_ED if after is None else after(sum_ED), "output_rows_E": is_expert_RE.sum(0)}

"""The kernels of topk.py: whole rows of logits in registers, searched k times for their largest.

With s the scores, S the sum of the chosen ones and c a constant, w = c·s_chosen, or c·s_chosen / S:

    ds_j = c·dw_j    or    c·(dw_j - Σ_i dw_i·s_i / S) / S    for the chosen, 0 for the others; then ds -> d(logits).
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); where exp(-|x|) is small against 1, log(1 + small) as small·log(u)/(u - 1) with u = 1 + small."""
    small = tl.exp(-tl.abs(x))
    u = 1 + small
    log1p = tl.where(u == 1, small, tl.log(u) * (small / tl.where(u == 1, 1.0, u - 1)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), without a large number's exponential."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small)


@triton.jit
def _scores(logits, SCORE: tl.constexpr):
    """Scores of a tile of whole rows, whose lanes past the last expert are -inf."""
    if SCORE == "softmax":
        largest = tl.max(logits, axis=1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)  # a row of NaN has no largest
        exponential = tl.exp(logits - largest[:, None])
        return exponential / tl.sum(exponential, axis=1)[:, None]
    elif SCORE == "sigmoid":
        return _sigmoid(logits)
    else:
        return tl.sqrt(_softplus(logits))


@triton.jit
def _scores_bwd(dscore, score, logits, SCORE: tl.constexpr):
    """d(logits) from d(scores)."""
    if SCORE == "softmax":
        return score * (dscore - tl.sum(score * dscore, axis=1)[:, None])
    elif SCORE == "sigmoid":
        return dscore * score * (1 - score)
    else:
        return dscore * tl.where(score > 0, _sigmoid(logits) / (2 * tl.where(score > 0, score, 1.0)), 0.0)


@triton.jit
def _order(key, inside, INT: tl.constexpr, BITS: tl.constexpr):
    """Integers in the order of the keys: both zeros equal, NaN above all, lanes that are not inside below all."""
    bits = tl.where(key == 0, 0.0, key).to(INT, bitcast=True)
    bits ^= (bits >> (BITS - 1)) & (2 ** (BITS - 1) - 1)  # the larger a negative number's bits, the smaller it is
    bits = tl.where(key != key, 2 ** (BITS - 1) - 1, bits)
    return tl.where(inside, bits, -(2 ** (BITS - 1)))


@triton.jit
def topk_fwd_kernel(
    logits_ptr,  # [T, E] bf16
    bias_ptr,  # [E] f32
    weight_ptr,  # [T, K] f32
    expert_ptr,  # [T, K] int64
    score_ptr,  # [T, E] f32
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    ACC: tl.constexpr,
    INT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights, experts (best first, the lower of equals first) and scores of BLOCK_T tokens."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = token < num_tokens
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = in_t[:, None] & (e < E)[None, :]
    at = token[:, None] * E + e[None, :]
    logits = tl.where((e < E)[None, :], tl.load(logits_ptr + at, mask=inside, other=0).to(ACC), float("-inf"))
    score = _scores(logits, SCORE)  # pyright: ignore[reportGeneralTypeIssues]
    if KEEP_SCORES:
        tl.store(score_ptr + at, score, mask=inside)
    key = logits  # every score grows with its logit, and logits that differ stay apart where scores round to one
    if BIASED:
        key = score + tl.load(bias_ptr + e, mask=e < E, other=0).to(ACC)[None, :]
    order = _order(key, (e < E)[None, :], INT, BITS)
    expert = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    weight = tl.zeros([BLOCK_T, BLOCK_K], dtype=ACC)
    for i in range(K):
        best = tl.argmax(order, axis=1, tie_break_left=True)
        is_best = e[None, :] == best[:, None]
        expert = tl.where(k[None, :] == i, best[:, None], expert)
        weight = tl.where(k[None, :] == i, tl.sum(tl.where(is_best, score, 0.0), axis=1)[:, None], weight)
        order = tl.where(is_best, -(2 ** (BITS - 1)), order)
    if NORMALIZE:
        total = tl.sum(weight, axis=1)
        weight /= tl.where(total < 1e-20, 1e-20, total)[:, None]
    at = token[:, None] * K + k[None, :]
    inside = in_t[:, None] & (k < K)[None, :]
    tl.store(weight_ptr + at, weight * SCALE, mask=inside)
    tl.store(expert_ptr + at, expert, mask=inside)


@triton.jit
def topk_bwd_kernel(
    logits_ptr,  # [T, E] bf16
    expert_ptr,  # [T, K] int64
    dweight_ptr,  # [T, K] f32
    dscore_ptr,  # [T, E] f32
    dlogits_ptr,  # [T, E] bf16
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    OF_WEIGHTS: tl.constexpr,
    OF_SCORES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """d(logits) of BLOCK_T tokens from the gradients of their weights, of all their scores, or of both."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = token < num_tokens
    e = tl.arange(0, BLOCK_E)
    inside = in_t[:, None] & (e < E)[None, :]
    at = token[:, None] * E + e[None, :]
    logits = tl.where((e < E)[None, :], tl.load(logits_ptr + at, mask=inside, other=0).to(ACC), float("-inf"))
    score = _scores(logits, SCORE)  # pyright: ignore[reportGeneralTypeIssues]
    dscore = tl.zeros([BLOCK_T, BLOCK_E], dtype=ACC)
    if OF_WEIGHTS:
        times_chosen = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
        for i in range(K):
            expert = tl.load(expert_ptr + token * K + i, mask=in_t, other=0).to(tl.int32)
            dweight = tl.load(dweight_ptr + token * K + i, mask=in_t, other=0).to(ACC)
            is_chosen = e[None, :] == expert[:, None]
            dscore = tl.where(is_chosen, dweight[:, None] * SCALE, dscore)
            times_chosen += is_chosen.to(tl.int32)
        if NORMALIZE:
            chosen_score = tl.where(times_chosen > 0, score, 0.0)
            total = tl.sum(chosen_score, axis=1)
            constant = total < 1e-20  # then forward divided by 1e-20
            total = tl.where(constant, 1e-20, total)
            mean = tl.where(constant, 0.0, tl.sum(dscore * chosen_score, axis=1) / total)
            dscore = tl.where(times_chosen > 0, (dscore - mean[:, None]) / total[:, None], 0.0)
    if OF_SCORES:
        dscore += tl.load(dscore_ptr + at, mask=inside, other=0).to(ACC)
    dlogits = _scores_bwd(dscore, score, logits, SCORE)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(dlogits_ptr + at, dlogits, mask=inside)

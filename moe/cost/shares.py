"""What one rank of a layout has to do with: its blocks, tokens, forward passes and parameters."""

from dataclasses import dataclass
from functools import lru_cache

from moe.config.layout import Layout
from moe.config.schema import LatentAttention, Model, Run, balances, is_moe_layer
from moe.cost.counting import Parameters, expert_biases, parameters, vectors_by_layer


@dataclass(frozen=True)
class Held:
    """Parameters of one block, or of what is around the blocks, before they are shared out."""

    layer: int
    """The block; -1 for embedding, last norm and head."""
    matrices: int
    """In attention, dense and shared feed-forward layers, embedding and head: cut by FSDP2."""
    alike: int
    """Of the matrices, those that tensor parallelism does not cut: around the blocks, down-projections of latent attention,
    the shared expert's gate, and what latent experts share."""
    whole: int
    """In vectors and the router: on every rank of the stage (moe/train/sharding.py)."""
    experts: int
    """In the matrices of routed experts."""
    expert_biases: int = 0
    """In their biases: those of a rank's experts are whole there."""

    def matrices_on(self, tensor: int) -> float:
        """Elements of the matrices on one of so many tensor ranks."""
        return self.alike + (self.matrices - self.alike) / tensor


def tokens_per_pass(run: Run, layout: Layout) -> int:
    """Tokens of one rank in one forward pass."""
    return run.train.micro_rows * run.data.sequence_length // layout.context


def accumulation(run: Run, layout: Layout) -> int:
    """Forward passes of one rank in a step."""
    return max(1, run.train.batch_rows // (run.train.micro_rows * layout.data_ranks))


def needs_first_pass(run: Run, layout: Layout) -> bool:
    """Whether the `global` balance scope must count rows in a forward pass of its own, before the one with gradient.

    It must where the step has several micro-batches, or several ranks and a forward pass that cannot hold a collective.
    """
    moe = run.model.moe
    if moe is None or not any(b.scope == "global" and b.weight > 0 for _, b in balances(moe.router)):
        return False
    several = layout.data_ranks * layout.context > 1
    return accumulation(run, layout) > 1 or (several and (run.train.activation_checkpointing or run.train.compile))


@lru_cache(maxsize=8)
def counted(model: Model) -> Parameters:
    """`parameters`, kept for the many layouts of one search."""
    return parameters(model)


@lru_cache(maxsize=1024)
def stage_parameters(model: Model, blocks: range) -> tuple[Held, ...]:
    """One entry per block of a stage, and one for what is around the blocks there; a tied head is on both ends."""
    counts, vectors = counted(model), vectors_by_layer(model)
    held = []
    for layer in blocks:
        parts = counts.layers[layer]
        experts, whole = parts.get("experts", 0), parts.get("router", 0) + vectors[layer]
        matrices, biases = sum(parts.values()) - whole - experts, expert_biases(model, layer)
        held.append(Held(layer, matrices, _alike(model, layer), whole, experts - biases, biases))
    first, last = blocks.start == 0, blocks.stop == model.num_layers
    matrices = counts.components["embedding"] * (first or (last and model.tied_head))
    matrices += last * counts.components["head"]
    return (*held, Held(-1, matrices, matrices, last * model.dim, 0))


def _alike(model: Model, layer: int) -> int:
    """Elements of a block's matrices that every tensor rank has whole."""
    attention, D = model.attention, model.dim
    count = 0
    if isinstance(attention, LatentAttention):
        count += D * (attention.q_rank + attention.kv_rank + attention.rope_dim)
    if model.moe is not None and is_moe_layer(model, layer):
        count += D * (model.moe.shared_gate + 2 * model.moe.latent_dim)
    return count


def parameters_per_rank(layout: Layout, held: tuple[Held, ...]) -> float:
    """Parameters that a rank keeps, with their gradients and optimizer states."""
    matrices = sum(part.matrices_on(layout.tensor) for part in held) / layout.dense_shards
    experts = sum(part.experts for part in held) / (layout.expert * layout.expert_shard)
    biases = sum(part.expert_biases for part in held) / layout.expert
    return matrices + sum(part.whole for part in held) + experts + biases

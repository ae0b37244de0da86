"""Rules of low-rank adapters: what they can be put on, and what their training does not go with."""

from collections.abc import Iterator

from moe.config.schema import Model, Run, expert_widths, is_moe_layer


def adapter_problems(run: Run) -> Iterator[str]:
    """Sentences about every rule that a run with `model.lora` breaks."""
    lora = run.model.lora
    if lora is None:
        return
    targets = list(lora.targets)
    if len(set(targets)) < len(targets):
        yield f"model.lora.targets {targets} names one twice: name each once"
    missing = [target for target in dict.fromkeys(targets) if not _there(run.model, target)]
    if missing:
        there = [target for target in ("attention", "experts", "shared", "ffn") if _there(run.model, target)]
        yield f"model.lora.targets {targets} has {', '.join(missing)}, and this model has only {', '.join(there)}: use those"
    moe = run.model.moe
    if moe is not None and "experts" in targets and len(set(expert_widths(moe))) > 1:
        yield (
            f"model.lora.targets {targets} has experts, whose {len(set(expert_widths(moe)))} widths (model.moe.expert_widths) are "
            "packed into matrices that take no adapters: leave experts out"
        )
    if run.train.optimizer.name == "muon":
        yield "train.optimizer 'muon' is for whole matrices, and model.lora trains thin ones: use train.optimizer=adamw"
    for name in ("shard", "expert", "tensor", "pipeline"):
        size = getattr(run.parallel, name)
        if size > 1:
            yield (
                f"parallel.{name} ({size}) cuts matrices, and model.lora adds to whole ones: use parallel.{name}=1 "
                "(replicate and context go with adapters), or merge them first: 'moe lora merge'"
            )


def _there(model: Model, target: str) -> bool:
    """Whether a model has what a target names."""
    if target == "attention":
        return True
    if target == "ffn":
        return any(not is_moe_layer(model, layer) for layer in range(model.num_layers))
    return model.moe is not None and (target == "experts" or model.moe.shared_hidden > 0)

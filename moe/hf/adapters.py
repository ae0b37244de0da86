"""The adapters of a run in the files of the package peft: adapter_config.json and adapter_model.safetensors.

peft puts them on the exported base: `PeftModel.from_pretrained(base_model, folder)`. A linear map's A [in, J] and B [J, out] are
its lora_A [J, in] and lora_B [out, J], with the rows of B in the family's order. transformers holds all experts of a layer in two
tensors, which peft adapts as parameters: gate and up share one, so their two adapters become one of rank 2J, whose B is 0 where
one's A would meet the other's columns. The other tensor's is filled up with zeros to 2J: peft has a rank per module, and warns of
ranks per parameter. Nothing is approximated. peft (0.21) takes any gate_proj of a sparse model for its experts', so that adapters
of shared and dense layers cannot be told to it there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe import checkpoint
from moe.config.load import load as load_run
from moe.config.lora import Lora, lora_scale
from moe.errors import CheckpointError, ConfigError
from moe.files import write_json
from moe.hf.convert import family_of
from moe.hf.links import Entry, Link, entries
from moe.lora import adapter_names, base_name

_PREFIX = "base_model.model."
_GATE_UP = "experts.gate_up_proj"
_DOWN = "experts.down_proj"


def export_adapters(run_folder: Path, folder: Path, *, family: str = "auto", base: str = "") -> tuple[str, int]:
    """Write the adapters of a run's newest checkpoint for peft; returns the family's name and the step.

    `base` is the folder or hub name of the base as exported, which the files name. Raises ConfigError for a run without adapters, a
    folder that is not free, or a model that no family can hold.
    """
    run, saved = load_run(run_folder / "run.json"), checkpoint.newest(run_folder)
    if run.model.lora is None:
        raise ConfigError(f"{run_folder} has no adapters (model.lora is null): 'moe export' writes it whole")
    if saved is None:
        raise CheckpointError(f"{run_folder} has no checkpoint: train it until it saves one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: choose another folder, or remove it")
    unsaid = [target for target in run.model.lora.targets if target in ("shared", "ffn") and run.model.moe is not None]
    if unsaid:
        raise ConfigError(
            f"peft takes adapters of {' and '.join(unsaid)} layers of a sparse model (model.lora.targets) for those of experts: "
            f"'moe export {run_folder}' writes the model with its adapters merged"
        )
    model = replace(run.model, lora=None)
    chosen = family_of(model, family)
    adapters = checkpoint.read_tensors(saved, adapter_names(checkpoint.stored_names(saved)))
    # the names of transformers' modules, where its files have older ones
    table = list(entries(model, replace(chosen.names, moe="mlp"), fused=True))
    written, named = converted(table, adapters, transposed=chosen.names.gpt_oss)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", _settings(run.model.lora, named, base))
    return chosen.model_type, saved.step


def _settings(lora: Lora, named: list[str], base: str) -> dict[str, Any]:
    """adapter_config.json. peft divides alpha by the rank, so its alpha is our scale times the rank, whichever our scaling is."""
    alpha = lora_scale(lora) * lora.rank
    experts = [name for name in named if name.endswith((_GATE_UP, _DOWN))]
    modules = [name.removesuffix(".weight") for name in named if name not in experts]
    leaves = sorted({name.rpartition(".")[2] for name in modules}) if experts else []
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": 2 * lora.rank if experts else lora.rank,
        "lora_alpha": 2 * alpha if experts else alpha,
        "rank_pattern": dict.fromkeys(leaves, lora.rank),
        "alpha_pattern": dict.fromkeys(leaves, alpha),
        "target_modules": modules,
        "target_parameters": experts or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def converted(
    table: list[Entry], adapters: dict[str, Tensor], *, transposed: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """peft's tensors, and the family's names of what they adapt. `transposed`: its experts are [E, in, out], as ours."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapters.items():
        pairs.setdefault(base_name(name), {})[name.rpartition(".")[2][0]] = tensor
    written, named = {}, []
    for entry in table:
        if not any(link.ours in pairs for link in entry.links):
            continue
        stacked = entry.name.endswith((_GATE_UP, _DOWN))
        a, b = _experts(entry, pairs, transposed) if stacked else _linear(entry, pairs[entry.links[0].ours])
        module = entry.name.removesuffix(".weight")
        if stacked:
            # peft wraps the module once per parameter, gate_up_proj first, so that one is the inner
            module = module.rpartition(".")[0] + (".base_layer" if entry.name.endswith(_GATE_UP) else "")
        written |= {f"{_PREFIX}{module}.lora_{letter}.weight": t.contiguous() for letter, t in (("A", a), ("B", b))}
        named.append(entry.name)
    lost = set(pairs) - {link.ours for entry in table for link in entry.links}
    if lost:
        raise ConfigError(
            f"the family has no place for the adapters of {', '.join(sorted(lost)[:5])}: nothing was written"
        )
    return written, named


def _linear(entry: Entry, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """lora_A [J, in] and lora_B [out, J]; links move rows only, so B goes through them as the first columns of a matrix."""
    (out, inner), rank = entry.shape, pair["a"].shape[1]
    if rank > inner:
        raise ConfigError(
            f"model.lora.rank ({rank}) is more than the {inner} that go into {entry.name}: merge and export instead"
        )
    ours, theirs = torch.zeros(out, inner), torch.zeros(out, inner)
    ours[:, :rank] = pair["b"].t()
    for link in entry.links:
        link.their_view(theirs).copy_(link.our_view(ours))
    return pair["a"].t(), theirs[:, :rank]


def _experts(entry: Entry, pairs: dict[str, dict[str, Tensor]], transposed: bool) -> tuple[Tensor, Tensor]:
    """lora_A [E·R, in] with experts first, lora_B [out, R·E] with experts last; R = 2J, J for each part or for zeros."""
    parts: list[tuple[Link, Tensor, Tensor]] = [(k, pairs[k.ours]["a"], pairs[k.ours]["b"]) for k in entry.links]
    E, inner, rank = parts[0][1].shape
    R = 2 * rank
    a_ERI = torch.zeros(E, R, inner)
    out = entry.shape[2] if transposed else entry.shape[1]
    b_ERO = torch.zeros(E, R, out)
    for place, (link, a, b) in enumerate(parts):
        a_ERI[:, place * rank : (place + 1) * rank] = a.transpose(1, 2)
        here = b_ERO[:, place * rank : (place + 1) * rank]
        # their views find gate's and up's places along the output, which is the last dimension where experts are [E, in, out]
        link.their_view(here if transposed else here.transpose(1, 2)).copy_(b if transposed else b.transpose(1, 2))
    return a_ERI.flatten(0, 1), b_ERO.permute(2, 1, 0).flatten(1, 2)

"""The table of what every config field does: two values each, and something to look at that differs between them.

Keys are paths from the run: `model.attention[latent].q_rank` is a field of one member of a family, and
`model.attention[latent]` the choice of that member. `fields` walks the config classes, so that a field without an entry
here is found. What can be looked at is in lab.py.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curve_files import rows, write
from fake_counters import powercap
from lab import (
    Lab,
    calls,
    checkpoints,
    corpus,
    corpus_folder,
    drops,
    evaluations,
    files,
    folder_name,
    has_mfu,
    is_readable,
    kept_bytes,
    losses,
    parameters,
    passes,
    place,
    placed,
    printed,
    rates,
    routing_steps,
    spread_over_eight,
    steps,
    stopped_at,
    streams,
    threads,
    travellers,
    waits,
)

from moe.config.load import known_routers, resolve_router
from moe.config.schema import Run
from moe.config.tree import Slot, fields_of
from moe.config.words import typed
from moe.model import Transformer
from moe.moe_layer import MoELayer, auxiliary_loss
from moe.routing import Tokens


def fields() -> list[str]:
    """The key of everything that can be set in a run: fields, and the members that a family's name can choose."""
    return fields_below(Run)


def fields_below(cls: type) -> list[str]:
    """The keys below any config class."""
    return list(_fields(cls, ""))


def _below(slot: Slot, path: str) -> Iterator[str]:
    if slot.items is not None:
        yield from _below(slot.items, path) if slot.items.is_node else ()
        return
    if slot.config is not None:
        yield from _fields(slot.config, path)
    routers = {name: resolve_router(name).Config for name in known_routers()} if slot.is_router else {}
    for name, cls in {**slot.members, **routers}.items():
        yield f"{path}[{name}]"
        yield from _fields(cls, f"{path}[{name}]", but="name")


def _fields(cls: type, path: str, but: str = "") -> Iterator[str]:
    for name, child in fields_of(cls).items():
        key = f"{path}.{name}".removeprefix(".")
        # a field that always holds one class is that class's fields
        if name != but and not child.is_family and (child.config is None or child.optional):
            yield key
        yield from _below(child, key)


def frequencies_file(lab: Lab) -> str:
    """How often each byte occurs, falling with its value."""
    path = lab.folder / "frequencies.npy"
    np.save(path, 1000 // np.arange(1, 258))
    return str(path)


def routed(lab: Lab, run: Run) -> Any:
    """Routing, losses, gradients and state of one expert layer, forward, backward and updated: in training, and once not."""
    assert run.model.moe is not None
    generator = torch.Generator().manual_seed(0)
    layer = MoELayer(run.model.moe, run.model.dim, layer=0, seed=run.seed, init_std=0.3)
    seen = []
    for step in range(4):
        layer.train(step < 3)
        ids = torch.randint(0, 100, (4, 12), generator=generator)
        x = torch.randn(4, 12, run.model.dim, generator=generator)
        y, routing = layer(x, Tokens.of(ids, step=step))
        (y.square().mean() + auxiliary_loss(routing)).backward()
        layer.update(routing.statistics)
        seen.append(
            [routing.expert_R.tolist(), routing.weight_R.tolist(), auxiliary_loss(routing).item(), y.sum().item()]
        )
    grads = [p.grad.abs().sum().item() for p in layer.router.parameters() if p.grad is not None]
    return seen, grads, [buffer.tolist() for buffer in layer.router.buffers()]


def adapted(lab: Lab, run: Run) -> Any:
    """The gradient of every parameter that has one, of a forward and backward pass over fixed ids."""
    model = Transformer(run.model, seed=run.seed)
    ids = torch.arange(32).view(2, 16)
    objective = model(ids, ids.roll(-1, 1)).objective
    assert objective is not None
    objective.backward()
    return {name: p.grad.abs().sum().item() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------- the table

EVALUATED = ("train.steps=10", "evaluation.every_steps=1", "evaluation.fresh_rows=1")
FORECAST = (*EVALUATED, lambda lab: f"forecast.dense={twin(lab)}")
TAUGHT = (lambda lab: f"train.distil={typed({'teacher': twin(lab)})}",)
LEARNT = (*FORECAST, lambda lab: f"forecast.past={past_file(lab)}")

Value = Any | Callable[[Lab], Any]
"""A value, or a function of the lab that makes the files it names."""


@dataclass(frozen=True)
class Effect:
    """What differs between two values of a field, in a run with the overrides `given`."""

    see: Callable[[Lab, Run], Any]
    first: Value
    second: Value
    given: tuple[str | Callable[[Lab], str], ...] = ()

    def runs(self, key: str, lab: Lab) -> tuple[Run, Run]:
        """The two runs of the field `key`."""
        given = [text(lab) if callable(text) else text for text in self.given]
        values = [value(lab) if callable(value) else value for value in (self.first, self.second)]
        first, second = (lab.run(*given, f"{setting(key)}={typed(value)}") for value in values)
        return first, second


def setting(key: str) -> str:
    """The path of an override for a key: the first source, and no names of members."""
    return re.sub(r"\[\w+\]", "", key.replace("data.sources[", "data.sources.0["))


def rates_charged(lab: Lab, run: Run) -> Any:
    """The meters and the rates of a run's ledger."""
    start = lab.train(run).rows("ledger")[0]
    return start["meters"], start["rates"]


def recording(lab: Lab) -> str:
    """The recorded routing of a run with other weights at the start."""
    return str(lab.train(lab.run("model.init_std=0.5", "logging.record_routing=true")).folder / "replay")


def watched(lab: Lab, run: Run) -> Any:
    """What a run says of its gain while it trains."""
    folder = lab.train(run).folder
    return lab.train(run).rows("forecast") if (folder / "forecast.jsonl").exists() else []


def past_file(lab: Lab) -> str:
    """Past runs of the tiny runs' top-k and share of sparse layers."""
    return str(write(lab.folder / "past.csv", rows(noise=0.001, shape=0.02, kind=(2, 1.0))))


def twin(lab: Lab) -> str:
    """The dense twin of the tiny run, trained over the steps of FORECAST."""
    return str(lab.train(lab.run("model.moe=null", *EVALUATED)).folder)


def other_twin(lab: Lab) -> str:
    """A dense model of another width."""
    return str(lab.train(lab.run("model.moe=null", "model.ffn_hidden=40")).folder)


def lines(words: str, field: str = "text") -> str:
    """jsonl of 60 short documents."""
    return "".join(f'{{"{field}": "{words} {i} {words} {i * i}"}}\n' for i in range(60))


def text_file(name: str, words: str, field: str = "text") -> Callable[[Lab], Any]:
    return lambda lab: [lab.write(name, lines(words, field))]


def files_source(lab: Lab, name: str, words: str) -> dict[str, Any]:
    return {"name": "files", "paths": text_file(name, words)(lab)}


def two_fields(lab: Lab) -> str:
    rows = "".join(f'{{"text": "plain {i} words", "other": "further {i} text"}}\n' for i in range(80))
    return f"data.sources.0.data_files={typed([lab.write('two.jsonl', rows)])}"


def with_bad_file(lab: Lab) -> str:
    good, bad = lab.write("good.jsonl", lines("good")), lab.write("bad.jsonl", "no json\n")
    return f"data.sources.0.paths={typed([good, bad])}"


def local_dataset(lab: Lab) -> str:
    """A data set in a folder, with two configurations of two splits each."""
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}-{split}.jsonl\n" for split in ("train", "held"))
        for name in ("one", "two")
    )
    readme = lab.write("dataset/README.md", f"---\nconfigs:\n{configs}---\n")
    for name in ("one", "two"):
        for split in ("train", "held"):
            lab.write(f"dataset/{name}-{split}.jsonl", lines(f"{name} {split}"))
    return str(Path(readme).parent)


def tokenizer_file(name: str, words: str) -> Callable[[Lab], str]:
    """A tokenizer.json that was trained on some words."""

    def make(lab: Lab) -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([words * 20], trainer)
        return lab.write(name, tokenizer.to_str())

    return make


GROUPED = {"name": "grouped_query", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
LATENT_ATTENTION = {"name": "latent", "num_heads": 2, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}
LATENT = tuple(f"model.attention.{name}={value}" for name, value in LATENT_ATTENTION.items())
LLAMA3 = ('model.rotary.llama3={"factor": 8, "original_length": 16}',)
LORA = ('model.lora={"rank": 2}',)
YARN = ('model.rotary.yarn={"factor": 4, "original_length": 4096}',)
HUB = ("data.sources.0=hub", "data.sources.0.dataset=json", two_fields)
FOLDER = ("data.sources.0=hub", lambda lab: f"data.sources.0.dataset={local_dataset(lab)}")
OTHER_SOURCE = ("data.sources.1=files", lambda lab: f"data.sources.1.paths={typed(text_file('b.jsonl', 'zebra')(lab))}")
BPE = ("data.tokenizer=bpe", "data.tokenizer.vocab_size=300", "model.vocab_size=400")
THREE_STEPS = ("train.steps=3",)
MUON = ("train.optimizer=muon",)
EIGHT = ("train.batch_rows=8", "train.micro_rows=1")
LOSS_FREE = ("model.moe.router=loss_free",)
EXPERT_CHOICE = ("model.moe.router=expert_choice",)


def without(settings: tuple, field: str) -> tuple:
    """Settings without that of one field, which an entry sets itself."""
    return tuple(text for text in settings if callable(text) or not text.startswith(f"{field}="))


def of_router(name: str, **changes: tuple[Any, Any] | tuple[Any, Any, tuple[str, ...]]) -> dict[str, Effect]:
    """Entries of a router and its fields (`balance_weight` is balance.weight), seen on one layer in training."""
    choice = f"model.moe.router={name}"
    entries = {f"model.moe.router[{name}]": Effect(routed, name, "random" if name != "random" else "topk")}
    for field, (first, second, *given) in changes.items():
        path = f"model.moe.router[{name}].{field.replace('balance_', 'balance.')}"
        entries[path] = Effect(routed, first, second, (choice, *(given[0] if given else ())))
    return entries


WEIGHT = (0.0, 10.0)
SCOPE = ("sequence", "micro_batch")
CAPACITY = (0.0, 0.5)
ESTIMATOR = ("chosen", "dense_mixer")
TWO_GROUPS = ("model.moe.router.num_groups=2",)
GROUPS: dict[str, Any] = {
    "num_groups": (1, 2),
    "top_groups": (1, 2, TWO_GROUPS),
    "normalize": (True, False),
    "scaling_factor": (1.0, 2.5),
}
LOADED: dict[str, Any] = {"balance_weight": WEIGHT, "balance_scope": SCOPE, "z_weight": WEIGHT}
LIMIT = {"max_experts": (0, 2)}

NEW_ROUTERS: dict[str, Effect] = (
    of_router("base", z_weight=WEIGHT)
    | of_router(
        "deepseek_v2",
        **GROUPS,
        balance_weight=WEIGHT,
        balance_scope=SCOPE,
        device_weight=(*WEIGHT, TWO_GROUPS),
        communication_weight=(*WEIGHT, TWO_GROUPS),
        estimator=ESTIMATOR,
    )
    | of_router("expert_threshold", memory=(0.0, 0.9), z_weight=WEIGHT, **LIMIT)
    | of_router("frozen_random")
    | of_router("gpt_oss", normalize=(True, False), estimator=ESTIMATOR, **LOADED)
    | of_router("grin", jitter=(0.01, 0.5), **LOADED)
    | of_router("gshard", normalize=(True, False), balance_weight=WEIGHT, balance_scope=SCOPE, capacity_factor=CAPACITY)
    | of_router("llama4", **LOADED)
    | of_router("longcat", num_null=(1, 4), budget=(0.5, 1.0), bias_rate=(0.0, 0.5), scaling_factor=(1.0, 2.5))
    | of_router(
        "moe_plus_plus",
        num_zero=(0, 2),
        num_copy=(0, 2),
        num_constant=(0, 3),
        tau=(0.5, 1.0),
        balance_weight=WEIGHT,
        balance_scope=SCOPE,
    )
    | of_router("noisy_topk", normalize=(True, False), importance_weight=WEIGHT, load_weight=WEIGHT)
    | of_router(
        "quantile",
        memory=(0.0, 0.9),
        normalize=(True, False),
        scaling_factor=(1.0, 2.5),
        estimator=("chosen", "default_vector"),
        z_weight=WEIGHT,
    )
    | of_router("quantile_batch", iterations=(1, 8), normalize=(True, False), z_weight=WEIGHT)
    | of_router("remoe", start=(1e-8, 1.0), factor=(1.2, 3.0), **LIMIT)
    | of_router("simbal", normalize=(True, False), orthogonal_weight=WEIGHT, z_weight=WEIGHT)
    | of_router("sinkhorn", score=("softmax", "sigmoid"), iterations=(1, 20), z_weight=WEIGHT)
    | of_router(
        "smebu",
        score=("sigmoid", "sqrt_softplus"),
        estimator=ESTIMATOR,
        **GROUPS,
        **LOADED,
        bias_rate=(0.0, 0.5),
        kappa=(0.1, 2.0, ("model.moe.router.bias_rate=0.5",)),
        momentum=(0.0, 0.9, ("model.moe.router.bias_rate=0.5",)),
        capacity_factor=CAPACITY,
    )
    | of_router("st_moe", normalize=(True, False), **LOADED, capacity_factor=CAPACITY, eval_capacity_factor=(0.0, 0.5))
    | of_router(
        "switch",
        score=("softmax", "sigmoid"),
        gate=("full", "selected"),
        scaling_factor=(1.0, 2.5),
        noise=("jitter", "gaussian"),
        noise_scale=(0.01, 0.5),
        estimator=ESTIMATOR,
        **LOADED,
        capacity_factor=CAPACITY,
    )
    | of_router(
        "top_p", threshold=(0.2, 0.9), entropy_weight=WEIGHT, **LIMIT, balance_weight=WEIGHT, balance_scope=SCOPE
    )
)

EFFECTS: dict[str, Effect] = {
    **NEW_ROUTERS,
    "name": Effect(folder_name, "a", "b"),
    "seed": Effect(losses, 0, 1),
    # model
    "model.vocab_size": Effect(parameters, 257, 300),
    "model.dim": Effect(parameters, 16, 32),
    "model.num_layers": Effect(parameters, 2, 3),
    "model.ffn_hidden": Effect(parameters, 32, 40, ("model.moe.first_dense=1",)),
    "model.ffn_hidden_per_layer": Effect(parameters, [], [16, 8], ("model.moe=null",)),
    "model.norm_eps": Effect(losses, 1e-6, 0.1),
    "model.tied_head": Effect(parameters, False, True),
    "model.document_mask": Effect(losses, True, False),
    "model.init_std": Effect(losses, 0.02, 0.1),
    "model.init_depth_scaling": Effect(losses, True, False),
    "model.attention[grouped_query]": Effect(parameters, GROUPED, LATENT_ATTENTION),
    "model.attention[grouped_query].num_heads": Effect(parameters, 2, 4),
    "model.attention[grouped_query].num_kv_heads": Effect(parameters, 1, 2),
    "model.attention[grouped_query].head_dim": Effect(parameters, 8, 4),
    "model.attention[grouped_query].qkv_bias": Effect(parameters, False, True),
    "model.attention[grouped_query].out_bias": Effect(parameters, False, True),
    "model.attention[grouped_query].qk_norm": Effect(parameters, "head", "full"),
    "model.attention[grouped_query].clip_qkv": Effect(losses, 0.0, 0.01),
    "model.attention[grouped_query].windows": Effect(losses, [0], [0, 4]),
    "model.attention[grouped_query].sinks": Effect(losses, False, True),
    "model.attention[latent]": Effect(losses, LATENT_ATTENTION, GROUPED),
    "model.attention[latent].num_heads": Effect(parameters, 2, 4, without(LATENT, "model.attention.num_heads")),
    "model.attention[latent].q_rank": Effect(parameters, 0, 4, LATENT),
    "model.attention[latent].kv_rank": Effect(parameters, 8, 4, without(LATENT, "model.attention.kv_rank")),
    "model.attention[latent].nope_dim": Effect(parameters, 4, 8, without(LATENT, "model.attention.nope_dim")),
    "model.attention[latent].rope_dim": Effect(parameters, 4, 8, without(LATENT, "model.attention.rope_dim")),
    "model.attention[latent].value_dim": Effect(parameters, 4, 8, without(LATENT, "model.attention.value_dim")),
    "model.attention[latent].bias": Effect(parameters, False, True, LATENT),
    "model.attention[latent].norm_eps": Effect(losses, 0.0, 0.1, LATENT),
    "model.rotary.base": Effect(losses, 10_000.0, 100.0),
    "model.rotary.fraction": Effect(losses, 1.0, 0.5),
    "model.rotary.linear": Effect(losses, 1.0, 4.0),
    "model.rotary.llama3": Effect(losses, None, {"factor": 8.0, "original_length": 16}),
    "model.rotary.llama3.factor": Effect(losses, 8.0, 2.0, LLAMA3),
    "model.rotary.llama3.original_length": Effect(losses, 16, 64, LLAMA3),
    "model.rotary.llama3.low_freq_factor": Effect(losses, 1.0, 0.5, LLAMA3),
    "model.rotary.llama3.high_freq_factor": Effect(losses, 4.0, 8.0, LLAMA3),
    "model.rotary.yarn": Effect(losses, None, {"factor": 4.0, "original_length": 64}),
    "model.rotary.yarn.factor": Effect(losses, 4.0, 2.0, ('model.rotary.yarn={"factor": 4, "original_length": 4096}',)),
    "model.rotary.yarn.original_length": Effect(losses, 4096, 64, YARN),
    "model.rotary.yarn.beta_fast": Effect(losses, 32.0, 512.0, YARN),
    "model.rotary.yarn.beta_slow": Effect(losses, 1.0, 16.0, YARN),
    "model.rotary.yarn.mscale": Effect(losses, 1.0, 0.5, YARN),
    "model.rotary.yarn.mscale_all_dim": Effect(losses, 0.0, 0.5, YARN),
    "model.rotary.yarn.truncate": Effect(losses, True, False, YARN),
    "model.moe": Effect(parameters, None, {"num_experts": 2, "top_k": 1, "expert_hidden": 8, "router": "hash"}),
    "model.moe.num_experts": Effect(parameters, 4, 8),
    "model.moe.top_k": Effect(losses, 2, 3),
    "model.moe.expert_hidden": Effect(parameters, 8, 16),
    "model.moe.expert_widths": Effect(parameters, [], [8, 16, 8, 8]),
    "model.moe.activation": Effect(losses, "swiglu", "swiglu_oai"),
    "model.moe.activation_alpha": Effect(losses, 1.0, 1.5, ("model.moe.activation=swiglu_oai",)),
    "model.moe.activation_limit": Effect(losses, 0.001, 7.0, ("model.moe.activation=swiglu_oai",)),
    "model.moe.expert_bias": Effect(parameters, False, True),
    "model.moe.shared_hidden": Effect(parameters, 0, 8),
    "model.moe.shared_gate": Effect(parameters, False, True, ("model.moe.shared_hidden=8",)),
    "model.lora": Effect(adapted, None, {"rank": 2}),
    "model.lora.rank": Effect(adapted, 2, 4, LORA),
    "model.lora.alpha": Effect(adapted, 16.0, 8.0, LORA),
    "model.lora.scaling": Effect(adapted, "rank", "root", LORA),
    "model.lora.targets": Effect(adapted, ["attention", "experts"], ["experts"], LORA),
    "model.moe.latent_dim": Effect(parameters, 0, 4),
    "model.moe.backend": Effect(calls, "reference", "torch"),
    "model.backend": Effect(calls, "torch", "cpu"),
    "model.moe.precision": Effect(losses, "native", "fp8_row", ("model.moe.backend=reference",)),
    "model.moe.first_dense": Effect(parameters, 0, 1),
    "model.moe.num_experts_per_layer": Effect(parameters, [], [4, 3]),
    "model.moe.every": Effect(parameters, 1, 2),
    "model.moe.dense_layers": Effect(parameters, [], [1]),
    # routers
    "model.moe.router[expert_choice]": Effect(losses, "expert_choice", "topk"),
    "model.moe.router[hash]": Effect(losses, "hash", "random"),
    "model.moe.router[loss_free]": Effect(losses, "loss_free", "topk"),
    "model.moe.router[random]": Effect(losses, "random", "topk"),
    "model.moe.router[topk]": Effect(losses, "topk", "hash"),
    "model.moe.router[expert_choice].capacity_factor": Effect(losses, 1.0, 2.0, EXPERT_CHOICE),
    "model.moe.router[expert_choice].z_weight": Effect(losses, 0.0, 10.0, EXPERT_CHOICE),
    "model.moe.router[hash].frequencies": Effect(routed, "", frequencies_file, ("model.moe.router=hash",)),
    "model.moe.router[hash].ngram": Effect(losses, 1, 2, ("model.moe.router=hash",)),
    "model.moe.router[loss_free].score": Effect(routed, "sigmoid", "sqrt_softplus", LOSS_FREE),
    "model.moe.router[loss_free].num_groups": Effect(routed, 1, 2, LOSS_FREE),
    "model.moe.router[loss_free].top_groups": Effect(routed, 1, 2, (*LOSS_FREE, *TWO_GROUPS)),
    "model.moe.router[loss_free].estimator": Effect(routed, "chosen", "dense_mixer", LOSS_FREE),
    "model.moe.router[topk].estimator": Effect(losses, "chosen", "sparse_mixer"),
    "model.moe.router[loss_free].bias_rate": Effect(losses, 0.0, 10.0, LOSS_FREE),
    "model.moe.router[loss_free].normalize": Effect(losses, True, False, LOSS_FREE),
    "model.moe.router[loss_free].scaling_factor": Effect(losses, 1.0, 2.5, LOSS_FREE),
    "model.moe.router[loss_free].balance.weight": Effect(losses, 0.0, 10.0, LOSS_FREE),
    "model.moe.router[loss_free].balance.scope": Effect(losses, "sequence", "global", LOSS_FREE),
    "model.moe.router[loss_free].z_weight": Effect(losses, 0.0, 10.0, LOSS_FREE),
    "model.moe.router[loss_free].capacity_factor": Effect(drops, 0.0, 0.5, LOSS_FREE),
    "model.moe.router[topk].score": Effect(losses, "softmax", "sigmoid"),
    "model.moe.router[topk].gate": Effect(losses, "selected", "full"),
    "model.moe.router[topk].scaling_factor": Effect(losses, 1.0, 2.5),
    "model.moe.router[topk].noise": Effect(losses, "jitter", "gaussian", ("model.moe.router.noise_scale=0.5",)),
    "model.moe.router[topk].noise_scale": Effect(losses, 0.5, 0.9, ("model.moe.router.noise=jitter",)),
    "model.moe.router[topk].balance.weight": Effect(losses, 0.0, 10.0),
    "model.moe.router[topk].balance.scope": Effect(losses, "sequence", "global"),
    "model.moe.router[topk].z_weight": Effect(losses, 0.0, 10.0),
    "model.moe.router[topk].capacity_factor": Effect(drops, 0.0, 0.5),
    # data
    "data.sources": Effect(
        corpus,
        lambda lab: [files_source(lab, "a.jsonl", "apple")],
        lambda lab: [files_source(lab, "a.jsonl", "apple"), files_source(lab, "b.jsonl", "zebra")],
    ),
    "data.tokenizer[bytes]": Effect(corpus, "bytes", {"name": "bpe", "vocab_size": 300}, ("model.vocab_size=300",)),
    "data.tokenizer[bpe]": Effect(corpus, {"name": "bpe", "vocab_size": 300}, "bytes", ("model.vocab_size=300",)),
    "data.tokenizer[pretrained]": Effect(
        corpus,
        lambda lab: {"name": "pretrained", "path": tokenizer_file("first.json", "one two red old ")(lab)},
        "bytes",
        ("model.vocab_size=400",),
    ),
    "data.sequence_length": Effect(corpus, 32, 16),
    "data.validation_fraction": Effect(corpus, 0.3, 0.5),
    "data.cache_dir": Effect(corpus_folder, lambda lab: str(lab.folder / "one"), lambda lab: str(lab.folder / "two")),
    "data.sources[stdlib]": Effect(corpus, "stdlib", lambda lab: files_source(lab, "a.jsonl", "apple")),
    "data.sources[files]": Effect(corpus, lambda lab: files_source(lab, "a.jsonl", "apple"), "stdlib"),
    "data.sources[hub]": Effect(
        corpus,
        lambda lab: {"name": "hub", "dataset": local_dataset(lab), "subset": "one"},
        lambda lab: files_source(lab, "a.jsonl", "apple"),
    ),
    "data.sources[stdlib].weight": Effect(corpus, 1.0, 3.0, ("data.sources.0=stdlib", *OTHER_SOURCE)),
    "data.sources[files].paths": Effect(corpus, text_file("a.jsonl", "apple"), text_file("b.jsonl", "zebra")),
    "data.sources[files].text_field": Effect(corpus, "text", "other"),
    "data.sources[files].prompt_field": Effect(corpus, "", "ask"),
    "data.sources[files].on_bad_file": Effect(is_readable, "error", "skip", (with_bad_file,)),
    "data.sources[files].weight": Effect(corpus, 1.0, 3.0, OTHER_SOURCE),
    "data.sources[hub].dataset": Effect(corpus, "json", "text", without(HUB, "data.sources.0.dataset")),
    "data.sources[hub].subset": Effect(corpus, "one", "two", FOLDER),
    "data.sources[hub].data_files": Effect(
        corpus, text_file("a.jsonl", "apple"), text_file("b.jsonl", "zebra"), HUB[:2]
    ),
    "data.sources[hub].split": Effect(corpus, "train", "held", (*FOLDER, "data.sources.0.subset=one")),
    "data.sources[hub].text_field": Effect(corpus, "text", "other", HUB),
    "data.sources[hub].streaming": Effect(streams, True, False, HUB),
    "data.sources[hub].max_bytes": Effect(corpus, 10_000, 1000, HUB),
    "data.sources[hub].weight": Effect(corpus, 1.0, 3.0, (*HUB, *OTHER_SOURCE)),
    "data.tokenizer[bpe].vocab_size": Effect(corpus, 300, 320, without(BPE, "data.tokenizer.vocab_size")),
    "data.tokenizer[bpe].training_bytes": Effect(corpus, 100, 100_000, BPE),
    "data.tokenizer[pretrained].path": Effect(
        corpus,
        tokenizer_file("first.json", "one two red old "),
        tokenizer_file("second.json", "what is this here "),
        ("data.tokenizer=pretrained", "model.vocab_size=400"),
    ),
    # training
    "train.steps": Effect(steps, 2, 3),
    "train.batch_rows": Effect(losses, 4, 8),
    "train.micro_rows": Effect(calls, 4, 2),
    "train.clip_norm": Effect(losses, 0.0, 0.001, ("train.optimizer.eps=0.1",)),
    "train.precision": Effect(losses, "float32", "bfloat16"),
    "train.compile": Effect(calls, False, True),
    "train.activation_checkpointing": Effect(kept_bytes, False, True),
    "train.distil": Effect(losses, None, lambda lab: {"teacher": twin(lab)}),
    "train.distil.teacher": Effect(losses, twin, other_twin, TAUGHT),
    "train.distil.temperature": Effect(losses, 1.0, 3.0, TAUGHT),
    "train.distil.share": Effect(losses, 0.5, 1.0, TAUGHT),
    "train.loss_chunk": Effect(kept_bytes, 0, 8),
    "train.device": Effect(place, "cpu", "cuda"),
    "train.threads": Effect(threads, 1, 2),
    "train.max_nonfinite_steps": Effect(stopped_at, 1, 2, ("train.steps=3", "model.init_std=1e38")),
    "train.optimizer[adamw]": Effect(losses, {"name": "adamw", "lr": 0.01}, "muon"),
    "train.optimizer[muon]": Effect(losses, "muon", {"name": "adamw", "lr": 0.001}),
    "train.optimizer[adamw].lr": Effect(rates, 0.01, 0.02),
    "train.optimizer[adamw].beta1": Effect(losses, 0.9, 0.5),
    "train.optimizer[adamw].beta2": Effect(losses, 0.95, 0.5),
    "train.optimizer[adamw].eps": Effect(losses, 1e-8, 0.1),
    "train.optimizer[adamw].weight_decay": Effect(losses, 0.1, 10.0),
    "train.optimizer[muon].lr": Effect(rates, 0.01, 0.02, MUON),
    "train.optimizer[muon].momentum": Effect(losses, 0.95, 0.5, MUON),
    "train.optimizer[muon].iterations": Effect(losses, 5, 1, MUON),
    "train.optimizer[muon].update_rms": Effect(losses, 0.2, 1.0, MUON),
    "train.optimizer[muon].beta1": Effect(losses, 0.9, 0.5, MUON),
    "train.optimizer[muon].beta2": Effect(losses, 0.95, 0.5, MUON),
    "train.optimizer[muon].eps": Effect(losses, 1e-8, 0.1, MUON),
    "train.optimizer[muon].weight_decay": Effect(losses, 0.1, 10.0, MUON),
    "train.schedule[cosine]": Effect(rates, "cosine", {"name": "wsd", "decay_steps": 1}, THREE_STEPS),
    "train.schedule[wsd]": Effect(rates, {"name": "wsd", "decay_steps": 2}, "cosine", THREE_STEPS),
    "train.schedule[cosine].warmup_steps": Effect(rates, 0, 2, THREE_STEPS),
    "train.schedule[cosine].final_fraction": Effect(rates, 0.1, 0.5, THREE_STEPS),
    "train.schedule[wsd].warmup_steps": Effect(
        rates, 0, 2, ("train.steps=4", "train.schedule=wsd", "train.schedule.decay_steps=2")
    ),
    "train.schedule[wsd].decay_steps": Effect(rates, 1, 3, ("train.steps=4", "train.schedule=wsd")),
    "train.schedule[wsd].final_fraction": Effect(
        rates, 0.0, 0.5, ("train.steps=4", "train.schedule=wsd", "train.schedule.decay_steps=2")
    ),
    # evaluation, checkpoints, logs
    "parallel.replicate": Effect(spread_over_eight, 8, 4, EIGHT),
    "parallel.shard": Effect(spread_over_eight, 2, 4, EIGHT),
    "parallel.expert": Effect(spread_over_eight, 2, 4, EIGHT),
    "parallel.context": Effect(spread_over_eight, 1, 2, EIGHT),
    "parallel.tensor": Effect(spread_over_eight, 1, 2, EIGHT),
    "parallel.pipeline": Effect(spread_over_eight, 1, 2, EIGHT),
    "parallel.pipeline_schedule": Effect(passes, "gpipe", "1f1b"),
    "parallel.pipeline_blocks": Effect(
        spread_over_eight, (1, 2), (2, 1), (*EIGHT, "parallel.pipeline=2", "model.num_layers=3")
    ),
    "parallel.dispatch": Effect(travellers, "deduplicated", "rows"),
    "parallel.dispatch_capacity_factor": Effect(travellers, 1.0, 2.0, ("parallel.dispatch=capacity",)),
    "parallel.placement": Effect(placed, "index", "load", ("parallel.expert=2", *EIGHT)),
    "parallel.timeout_seconds": Effect(waits, 600.0, 5.0),
    "evaluation.every_steps": Effect(evaluations, 0, 1),
    "evaluation.rows": Effect(evaluations, 2, 3),
    "evaluation.final_rows": Effect(evaluations, 4, 5),
    "evaluation.probe_rows": Effect(files, 0, 2),
    "evaluation.fresh_rows": Effect(files, 0, 2),
    "forecast.dense": Effect(watched, "", twin, EVALUATED),
    "forecast.past": Effect(watched, "", past_file, FORECAST),
    "forecast.promise": Effect(watched, 0.0, 0.5, FORECAST),
    "forecast.bound": Effect(watched, 1.0, 2.0, (*FORECAST, "forecast.promise=0.5")),
    "forecast.anchor": Effect(watched, 0.1, 0.5, FORECAST),
    "forecast.confidence": Effect(watched, 0.5, 0.9, LEARNT),
    "forecast.false_alarm_rate": Effect(watched, 0.05, 0.2, LEARNT),
    "checkpoint.every_steps": Effect(checkpoints, 0, 1),
    "checkpoint.keep_last": Effect(checkpoints, 1, 2, ("checkpoint.every_steps=1",)),
    # with a rate at which every step is worse than the one before, the best is the first
    "checkpoint.keep_best": Effect(
        checkpoints,
        False,
        True,
        (
            "train.steps=3",
            "evaluation.every_steps=1",
            "checkpoint.keep_last=1",
            "train.optimizer.lr=30",
            "train.schedule.final_fraction=1.0",
        ),
    ),
    "checkpoint.asynchronous": Effect(calls, True, False),
    "logging.routing_every": Effect(routing_steps, 1, 2),
    "logging.console": Effect(printed, "off", "plain"),
    "logging.wandb": Effect(calls, "off", "offline"),
    "logging.tensorboard": Effect(files, False, True),
    "logging.peak_tflops": Effect(has_mfu, 0.0, 1.0),
    "logging.record_routing": Effect(files, False, True),
    "logging.replay_routing": Effect(losses, "", recording),
    "logging.promise": Effect(lambda lab, run: lab.train(run).json("summary")["promise"], "", "5ea1"),
    # accounting
    "cost.region": Effect(rates_charged, "FRA", "POL"),
    "cost.grid_gco2e_per_kwh": Effect(rates_charged, 0.0, 50.0),
    "cost.pue": Effect(rates_charged, 1.0, 1.5),
    "cost.price_per_hour": Effect(rates_charged, 0.0, 2.0),
    "cost.price_per_kwh": Effect(rates_charged, 0.0, 0.3),
    "cost.watts_per_thread": Effect(rates_charged, 3.5, 7.0),
    "cost.powercap": Effect(rates_charged, "", lambda lab: str(powercap(lab.folder / "powercap"))),
}

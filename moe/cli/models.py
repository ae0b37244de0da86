"""Commands that take a model away or make another of it: export, import, eval, generate, upcycle, prune, and so on."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from moe.cli.common import JsonOption, OverridesArgument, RecipeArgument, RunByDefault, lazy, print_result
from moe.errors import ConfigError

app = typer.Typer()
store = typer.Typer(help="Keep many variants of one model, every number once.")
app.add_typer(store, name="store")
lora = typer.Typer(cls=RunByDefault, help="Fine-tune by low-rank adapters on a frozen base, and merge them.")
app.add_typer(lora, name="lora")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the model")],
    family: Annotated[str, typer.Option(help="auto, or a model family: mixtral, olmoe, qwen3_moe, ...")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="type of the stored weights")] = "float32",
    shard_mib: Annotated[int, typer.Option(min=1, help="largest file, in MiB")] = 4096,
) -> None:
    """Write a run's newest checkpoint in a format that transformers and others load, with its tokenizer."""
    chosen, step = lazy("moe.hf", "export_run")(
        folder, out, family=family, dtype=dtype, max_shard_bytes=shard_mib * 2**20
    )
    typer.echo(f"step {step} as {chosen}: {out}")


@app.command()
def quantise(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of an export: 'moe export' writes one")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the smaller model")],
    bits: Annotated[int, typer.Option(metavar="8|4", help="of a stored weight")] = 8,
) -> None:
    """Store an export's matrices as integers with scales (torchao); 'moe eval' and 'moe generate' read the result."""
    module = import_module("moe.hf.quantised")
    typer.echo(module.describe(module.quantise(folder, out, bits), out, bits))


@app.command()
def gguf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of an export: 'moe export' writes one")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="new file")],
    dtype: Annotated[str, typer.Option("--type", metavar="f32|f16|bf16|q8_0|q4_0", help="of the matrices")] = "f16",
) -> None:
    """Write an export as one file for llama.cpp, or say what llama.cpp would compute otherwise."""
    module = import_module("moe.hf.gguf_file")
    typer.echo(module.describe(module.write_gguf(folder, out, dtype), out, dtype))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a model in transformers' format")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the run")],
    overrides: OverridesArgument = None,
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="data and training settings; small defaults without")
    ] = "",
) -> None:
    """Make a run that starts from a model of others, to resume, evaluate, prune or export."""
    notices: list[str] = []
    run = lazy("moe.hf", "import_model")(folder, out, recipe=recipe, overrides=overrides or [], notices=notices)
    for notice in notices:
        typer.echo(notice)
    typer.echo(f"{run.name}: step 0 in {out}; 'moe resume {out}' trains it for {run.train.steps} steps")


@app.command()
def upcycle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run: dense, or sparse with fewer experts")],
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the run")],
    overrides: OverridesArgument = None,
    method: Annotated[str, typer.Option(metavar="copy|drop|noise", help="what becomes of the copies")] = "copy",
    ratio: Annotated[float, typer.Option(help="share of a copy's hidden units that starts anew (drop)")] = 0.5,
    noise: Annotated[float, typer.Option(help="deviation of the noise over the weights' (noise)")] = 0.05,
    rows: Annotated[int, typer.Option(min=1, help="validation rows of the receipt")] = 64,
) -> None:
    """Make a sparse run out of a dense one, or more experts out of fewer; 'moe resume' goes on from there."""
    module = import_module("moe.surgery.upcycle")
    change = module.Change(method=method, ratio=ratio, noise=noise)
    typer.echo(module.describe(module.upcycle(folder, recipe, out, change, overrides or [], rows=rows), out))
    typer.echo(f"'moe resume {out}' trains it")


@app.command()
def distil(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="folder of a trained run, sparse as a rule")],
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the student's run")],
    overrides: OverridesArgument = None,
    temperature: Annotated[float, typer.Option(help="divides both models' logits")] = 1.0,
    share: Annotated[float, typer.Option(help="of the divergence in the loss; the rest is cross-entropy")] = 0.5,
    plain: Annotated[
        Path | None, typer.Option(metavar="RUN", help="the same model trained on text alone, to compare with")
    ] = None,
) -> None:
    """Train a model on another's probabilities and report how much of its gain is retained; 'moe resume' goes on."""
    module = import_module("moe.surgery.distil")
    receipt = module.distil(teacher, recipe, out, overrides or [], temperature=temperature, share=share, plain=plain)
    typer.echo(module.describe(receipt, out))


@app.command()
def retained(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run that learnt from a teacher")],
    plain: Annotated[
        Path | None, typer.Option(metavar="RUN", help="the same model trained on text alone, to compare with")
    ] = None,
) -> None:
    """Measure a distilled run, its teacher and the plain run on the same rows: what share of the gain it retained."""
    module = import_module("moe.surgery.distil")
    typer.echo(module.describe(module.measure(run, plain), run))


@app.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a sparse run")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the pruned run")],
    overrides: OverridesArgument = None,
    keep: Annotated[float, typer.Option(help="share of each layer's experts that stays")] = 0.5,
    method: Annotated[str, typer.Option(metavar="drop|merge|cluster", help="drop by score, or merge groups")] = "drop",
    score: Annotated[
        str, typer.Option(metavar="reap|mean_norm|weighted_norm|frequency|random", help="what to drop by")
    ] = "reap",
    budget: Annotated[
        str, typer.Option(metavar="uniform|global", help="as many in each layer, or the best of all")
    ] = "uniform",
    rows: Annotated[int, typer.Option(min=1, help="rows of training text to look at")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="of that text, and of random scores")] = 0,
) -> None:
    """Make a run with fewer experts out of a trained one; 'moe resume' on it is the recovery training."""
    module = import_module("moe.surgery.prune")
    plan = module.Plan(keep=keep, budget=budget, method=method, score=score, rows=rows, seed=seed)
    typer.echo(module.describe(module.prune(folder, out, plan, overrides or []), out))
    typer.echo(f"'moe eval {out}' measures it, 'moe resume {out}' trains it on")


@app.command()
def esft(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a sparse run")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the fine-tuned run")],
    overrides: OverridesArgument = None,
    score: Annotated[
        str, typer.Option(metavar="token|gate", help="share of routed rows, or of gate weights")
    ] = "token",
    threshold: Annotated[float, typer.Option(help="share that the trained experts of a layer reach together")] = 0.2,
) -> None:
    """Fine-tune only the experts that a task uses; the overrides name its data, train.steps and train.optimizer.lr."""
    module = import_module("moe.surgery.esft")
    receipt = module.fine_tune(folder, out, overrides or [], score=score, threshold=threshold)
    typer.echo(module.describe(receipt, out))


@lora.command("run")
def lora_run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the fine-tuned run")],
    overrides: OverridesArgument = None,
    rank: Annotated[int, typer.Option(help="of the products that are added")] = 8,
    alpha: Annotated[float, typer.Option(help="they are multiplied by alpha / rank")] = 16.0,
    scaling: Annotated[
        str, typer.Option(metavar="rank|root", help="what alpha is divided by: rank, or its root")
    ] = "rank",
    targets: Annotated[
        str, typer.Option(metavar="TARGET,TARGET", help="of attention, experts, shared, ffn")
    ] = "attention,experts",
) -> None:
    """Train adapters on a run's newest checkpoint; the overrides name the data, train.steps and train.optimizer.lr."""
    module = import_module("moe.surgery.lora")
    settings = {"rank": rank, "alpha": alpha, "scaling": scaling, "targets": targets.split(",")}
    typer.echo(module.describe(module.fine_tune(folder, out, overrides or [], settings), out))


@lora.command("merge")
def lora_merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run with adapters")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the run")],
) -> None:
    """Write a run with adapters as an ordinary one that starts from the sums."""
    typer.echo(str(import_module("moe.surgery.lora").merge(folder, out)))


@lora.command("export")
def lora_export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run with adapters")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the adapters")],
    family: Annotated[str, typer.Option(help="auto, or a model family: mixtral, olmoe, qwen3_moe, ...")] = "auto",
    base: Annotated[str, typer.Option(metavar="DIR", help="where the base's export is; the files name it")] = "",
) -> None:
    """Write the adapters alone for the package peft, which puts them on the base's export."""
    chosen, step = lazy("moe.hf", "export_adapters")(folder, out, family=family, base=base)
    typer.echo(f"step {step}, adapters of a {chosen}: {out}")


@app.command()
def ticket(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the pruned run")],
    overrides: OverridesArgument = None,
    keep: Annotated[float, typer.Option(help="share of the matrices' weights that stays")] = 0.2,
    rounds: Annotated[int, typer.Option(help="of training and removing")] = 3,
    rewind: Annotated[int, typer.Option(help="step whose weights the kept ones go back to")] = 0,
    block: Annotated[int, typer.Option(help="side of the blocks that go together; 1 for single weights")] = 1,
    control: Annotated[str, typer.Option(metavar="none|random|reinitialised", help="train this instead")] = "none",
) -> None:
    """Look for a lottery ticket: train, remove the smallest weights, rewind, repeat; then train what is left alone."""
    module = import_module("moe.surgery.ticket")
    search = module.Search(keep=keep, rounds=rounds, rewind=rewind, block=block, control=control)
    typer.echo(module.describe(module.find(recipe, out, search, overrides or []), out))


@store.command("put")
def store_put(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store, made if there is none")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the variant")],
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a run")],
) -> None:
    """Add a run's newest checkpoint; what the store has already costs nothing."""
    module = import_module("moe.surgery.store")
    counts = module.put(folder, name, run)
    typer.echo(
        f"{name}: {counts['new_shards']} new of {counts['shards']} shards, {counts['new_bytes']:,} bytes; {folder} has "
        f"{len(module.names(folder))} variants in {module.size(folder):,} bytes"
    )


@store.command("get")
def store_get(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the variant")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="new folder for the run")],
) -> None:
    """Write a variant as a run that starts from it."""
    typer.echo(str(import_module("moe.surgery.store").get(folder, name, out)))


@store.command("list")
def store_list(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store")],
) -> None:
    """Every variant: its step, the bytes that it needs, and those that it alone needs."""
    module = import_module("moe.surgery.store")
    for row in module.listing(folder):
        typer.echo(
            f"{row['name']:<24} step {row['step']:>8,}  {row['bytes']:>16,} bytes, {row['own_bytes']:,} of them its own"
        )
    typer.echo(f"{folder}: {len(module.names(folder))} variants in {module.size(folder):,} bytes")


@store.command("remove")
def store_remove(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the variant")],
) -> None:
    """Forget a variant, and delete what no other variant needs."""
    module = import_module("moe.surgery.store")
    freed = module.remove(folder, name)
    typer.echo(
        f"{name}: {freed:,} bytes freed; {folder} has {len(module.names(folder))} variants in {module.size(folder):,} bytes"
    )


@app.command("eval")
def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of a run, or of a model in transformers' format")
    ],
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option(min=2, help="validation rows to read")] = 256,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="take the text from here; needed for an export")] = "",
    tasks: Annotated[str, typer.Option(metavar="TASK,TASK", help="tasks of lm-evaluation-harness, or 'offline'")] = "",
    json: JsonOption = False,
) -> None:
    """Perplexity and bits per byte on validation text, whole and by source; or tasks of lm-evaluation-harness."""
    if tasks and (recipe or overrides):
        raise ConfigError("tasks bring their own text: leave out --recipe and settings, or --tasks")
    if tasks:
        module = import_module("moe.evaluation.harness")
        result = module.run_tasks(folder, tasks.split(","), limit=rows)
    else:
        module = import_module("moe.evaluation.perplexity")
        result = module.evaluate_folder(folder, rows=rows, recipe=recipe, overrides=overrides or [])
    print_result(result, module.describe, json)


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of a run, or of a model in transformers' format")
    ],
    prompt: Annotated[list[str], typer.Option(help="text to continue; may be given several times")],
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to add")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="draw from the smallest set of this probability")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the draws")] = 0,
    show_routing: Annotated[
        bool, typer.Option(help="one line per token, with the experts of the one before in every layer")
    ] = False,
) -> None:
    """Continue a text, as it is written."""
    module = import_module("moe.generate")
    sampling = module.Sampling(temperature=temperature, top_p=top_p)
    opened = lazy("moe.opened", "open_model")(folder)
    several = len(prompt) > 1
    for text in prompt:  # what is refused is refused before anything is printed
        module.encode_prompt(opened, text)
    if not several and not show_routing:
        typer.echo(prompt[0], nl=False)

    def on_text(index: int, text: str, experts: dict[int, list[int]]) -> None:
        if show_routing:
            routes = "  ".join(f"{layer}: {chosen}" for layer, chosen in experts.items())
            typer.echo(f"prompt {index + 1}  {text!r:12}  experts of the token before, by layer: {routes}")
        elif not several:
            typer.echo(text, nl=False)

    texts = module.generate(opened, prompt, max_tokens, sampling=sampling, seed=seed, on_text=on_text)
    if several and not show_routing:
        for start, text in zip(prompt, texts, strict=True):
            typer.echo(f"{start}{text}\n")
    else:
        typer.echo()

"""Bytes, quality and tokens per second of runs' exports: bfloat16, int8, int4, and GGUF where llama.cpp is installed.

    .venv/bin/python scripts/bench_exports.py RUN [RUN ...] [--rounds 7] [--tokens 48] [--write docs/reuse.md]

A RUN is a folder of a run, pruned or not. Every form continues the same prompt greedily, on two threads, in rounds that take each
form once, in turn; a form's figure is the median of its rounds, with the smallest and the largest. `--write` renews the table
between the page's markers. Needs the extra quantise, and for the rest gguf and xllamacpp.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_common import keep, machine, options, parse, spread

from moe import hf, parallel
from moe.data import prepare
from moe.generate import Sampling, generate
from moe.hf import quantised
from moe.hf.gguf_file import write_gguf
from moe.opened import Opened, open_model
from moe.surgery.start import read_run
from moe.train.evaluate import evaluate

PROMPT = "def __init__(self"
ROWS = 64
NAME = "bench_exports"


@dataclass
class Form:
    """One export: what it is, its bytes, and how it continues the prompt by a number of tokens."""

    name: str
    bytes: int
    reader: str
    go_on: Callable[[int], str]
    bits_per_byte: float | None = None
    model: str = ""


def transformers_form(name: str, folder: Path, model: Any) -> Form:
    """transformers' own class on a folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def go_on(count: int) -> str:
        written = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return tokenizer.decode(written[0, ids.shape[1] :])

    return Form(name, _bytes(folder), "transformers", go_on)


def own_form(folder: Path) -> Form:
    """`moe generate` on an export."""
    opened = open_model(folder)
    endless = Opened(opened.model, opened.encode, opened.decode, None)

    def go_on(count: int) -> str:
        return generate(endless, [PROMPT], count, sampling=Sampling(temperature=0))[0]

    return Form("bfloat16", _bytes(folder), "moe generate", go_on)


def llama_cpp_form(name: str, path: Path) -> Form:
    """llama.cpp's Python binding on a GGUF file."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = str(path), 256, 2
    params.n_parallel, params.warmup, params.verbosity = 1, True, -1
    server = xllamacpp.Server(params)

    def go_on(count: int) -> str:
        request = {"prompt": PROMPT, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return server.handle_completions(request)["choices"][0]["text"]

    return Form(name, path.stat().st_size, "llama.cpp", go_on)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forms_of(run: Path, place: Path) -> list[Form]:
    """Every form of the run's newest checkpoint that can be made here, evaluated where it is read as a model of ours."""
    forms = _forms_of(run, place)
    for form in forms:
        form.model = described(run)
    return forms


def _forms_of(run: Path, place: Path) -> list[Form]:
    from transformers import AutoModelForCausalLM

    whole = place / "bfloat16"
    hf.export_run(run, whole, dtype="bfloat16")
    forms = [own_form(whole)]
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    forms.append(transformers_form("bfloat16", whole, model))
    forms[0].bits_per_byte = forms[1].bits_per_byte = quality(run, whole)
    for bits in (8, 4):
        small = place / f"int{bits}"
        quantised.quantise(whole, small, bits)
        form = transformers_form(f"int{bits}", small, quantised.load_transformers(small))
        form.bits_per_byte = quality(run, small)
        forms.append(form)
    if find_spec("xllamacpp") is None or find_spec("gguf") is None:
        print("without llama.cpp: pip install gguf xllamacpp")
        return forms
    for dtype in ("f16", "q8_0", "q4_0"):
        write_gguf(whole, place / f"{dtype}.gguf", dtype)
        forms.append(llama_cpp_form(f"GGUF {dtype}", place / f"{dtype}.gguf"))
    return forms


def quality(run: Path, folder: Path) -> float:
    """Bits per byte of an export on some validation rows of the run."""
    settings = read_run(run).run
    model = hf.load(folder)
    model.config = settings.model
    return evaluate(model, prepare(settings.data), parallel.start("cpu"), rows=ROWS, micro_rows=16).bits_per_byte


def measure(forms: list[Form], rounds: int, tokens: int) -> list[list[float]]:
    """Tokens per second of every form, by round; one round before is not counted."""
    rates: list[list[float]] = [[] for _ in forms]
    for number in range(rounds + 1):
        for form, found in zip(forms, rates, strict=True):
            clock = time.perf_counter()
            form.go_on(tokens)
            if number:
                found.append(tokens / (time.perf_counter() - clock))
    return rates


def described(run: Path) -> str:
    """What model a run has."""
    config = read_run(run).run.model
    experts = f"{config.moe.num_experts} experts, {config.moe.top_k} a token, " if config.moe is not None else ""
    return f"{experts}{config.num_layers} layers of {config.dim}"


def table(runs: list[Path], forms: list[Form], rates: list[list[float]], tokens: int) -> str:
    """The page's part."""
    lines = [
        f"`python scripts/bench_exports.py {' '.join(run.name for run in runs)}`: {tokens} tokens after a prompt of "
        f"{len(PROMPT)} bytes, greedy, two threads, {len(rates[0])} interleaved rounds; bits per byte on {ROWS} validation rows.",
        "",
        "| model | stored as | bytes of weights | bits per byte | read by | tokens/s, median | smallest to largest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for form, found in zip(forms, rates, strict=True):
        bits = f"{form.bits_per_byte:.4f}" if form.bits_per_byte is not None else ""
        spread = f"{min(found):.0f} to {max(found):.0f}"
        middle = statistics.median(found)
        lines.append(
            f"| {form.model} | {form.name} | {form.bytes:,} | {bits} | {form.reader} | {middle:.0f} | {spread} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the forms, time them, print, write."""
    parser = options(__doc__, rounds=7)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--tokens", type=int, default=48, help="that each form writes in a round")
    given = parse(parser, NAME)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        forms = [form for number, run in enumerate(given.runs) for form in forms_of(run, Path(place) / str(number))]
        for form in forms:
            print(f"{form.name}, {form.reader}: {form.go_on(24)!r}")
        rates = measure(forms, given.rounds, given.tokens)
    text = table(given.runs, forms, rates, given.tokens)
    print(text)
    speeds = zip(forms, rates, strict=True)
    figures = {f"{form.model}: {form.name}, {form.reader}, tokens/s": spread(found) for form, found in speeds}
    keep(given, NAME, text, {"facts": machine(), "figures": figures})


if __name__ == "__main__":
    main()

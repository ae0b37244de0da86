"""Generation with cached keys and values against the whole forward pass, and against transformers' own generate."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe import hf
from moe.cli import main
from moe.config.load import router_config
from moe.config.schema import GroupedQueryAttention, LatentAttention, Model, MoE, Rotary, Yarn
from moe.errors import ConfigError, UserError
from moe.generate import Sampling, generate, next_token, stream
from moe.model import Transformer
from moe.opened import Opened
from tests.tiny_runs import tiny_dict

GROUPED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
ATTENTION = {
    "grouped": GroupedQueryAttention(**GROUPED),
    "windows": GroupedQueryAttention(**GROUPED, windows=(3, 0), qk_norm="head"),
    "sinks": GroupedQueryAttention(**GROUPED, windows=(4,), sinks=True),
    "latent": LatentAttention(num_heads=4, q_rank=12, kv_rank=10, nope_dim=6, rope_dim=4, value_dim=7),
}


def model_of(attention="grouped", **moe) -> Transformer:
    settings = {"num_experts": 4, "top_k": 2, "expert_hidden": 24, "first_dense": 1, "router": router_config("topk")}
    config = Model(
        vocab_size=61,
        dim=32,
        num_layers=3,
        ffn_hidden=48,
        attention=ATTENTION[attention],
        rotary=Rotary(yarn=Yarn(factor=2.0, original_length=8)) if attention == "latent" else Rotary(),
        moe=MoE(**{**settings, **moe}),
        init_std=0.3,
    )
    torch.manual_seed(1)
    model = Transformer(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sink_N"):
            torch.nn.init.normal_(parameter)
    return model


IDS = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_steps_equal_the_whole_forward_pass(attention):
    model = model_of(attention)
    ids = IDS
    for step in stream(model, IDS, 8, sampling=Sampling(temperature=0)):
        with torch.no_grad():
            whole = model(ids)
        assert torch.equal(step.token_B, whole.logits_BSV[:, -1].argmax(1))
        for report in whole.routing:
            last = torch.arange(3) * ids.shape[1] + ids.shape[1] - 1
            for row in range(3):
                chosen = report.selection.expert_R[report.selection.token_R == last[row]].tolist()
                assert step.experts_BLK[row][report.layer] == chosen
        ids = torch.cat((ids, step.token_B.unsqueeze(1)), dim=1)
    assert ids.shape == (3, 17)


@pytest.mark.parametrize(
    ("family", "attention", "moe"),
    [
        ("mixtral", "grouped", {}),
        ("deepseek_v3", "latent", {"shared_hidden": 24, "router": router_config("loss_free")}),
    ],
)
def test_greedy_continuations_equal_transformers(family, attention, moe, tmp_path):
    model = model_of(attention, first_dense=0, **moe)
    hf.save(model, tmp_path / "out", family=family)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = reference.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    found = [step.token_B for step in stream(model, IDS, 12, sampling=Sampling(temperature=0))]
    assert torch.equal(torch.stack(found, dim=1), expected[:, 9:])


@pytest.mark.parametrize("router", ["switch", "gshard", "st_moe", "topk"])
def test_nothing_is_dropped_while_a_text_is_written(router):
    """How many rows an expert takes depends on the length of a row; the reference has no limit, and no cache."""
    tight = model_of(router=router_config(router, capacity_factor=0.25))
    free = model_of(router=router_config(router, capacity_factor=0.0))
    for experts in (layer.router for _, layer in [*tight.moe_layers(), *free.moe_layers()]):
        if router == "st_moe":
            experts.config = replace(experts.config, eval_capacity_factor=experts.config.capacity_factor)
    free.load_state_dict(tight.state_dict())
    ids = IDS
    for step in stream(tight, IDS, 4, sampling=Sampling(temperature=0)):
        with torch.no_grad():
            assert torch.equal(step.token_B, free(ids).logits_BSV[:, -1].argmax(1))
            assert not torch.allclose(tight(ids).logits_BSV, free(ids).logits_BSV)
        ids = torch.cat((ids, step.token_B.unsqueeze(1)), dim=1)


@pytest.mark.parametrize("router", ["frozen_random", "random", "hash", "remoe"])
def test_routers_without_settings_or_rows_continue_like_the_whole_forward_pass(router):
    model = model_of(router=router_config(router))
    tokens = torch.stack([s.token_B for s in stream(model, IDS, 3, sampling=Sampling(temperature=0))], 1)
    with torch.no_grad():
        assert torch.equal(model(torch.cat((IDS, tokens), 1)).logits_BSV[:, 8:-1].argmax(2), tokens)


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_any_temperature_near_0_takes_the_most_probable_token(temperature):
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    drawn = next_token(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, logits.argmax(1))


def test_every_token_is_reported_with_its_text_and_its_experts():
    """Bytes of characters that take up to four of them, some broken: pieces join to the text, the last one included."""
    model = model_of()
    opened = Opened(
        model, lambda text: list(text.encode()), lambda ids: bytes(128 + i for i in ids).decode("utf8", "replace"), 60
    )
    pieces = {0: [], 1: [], 2: []}
    prompts = ["\x01\x02", "\x03\x04", "\x07"]
    texts = generate(opened, prompts, 20, on_text=lambda i, text, experts: pieces[i].append((text, sorted(experts))))
    assert ["".join(text for text, _ in of_one) for of_one in pieces.values()] == texts
    assert max(map(len, pieces.values())) == 20 and all(
        layers == [1, 2] for one in pieces.values() for _, layers in one
    )
    alone = [generate(opened, [prompt], 20, sampling=Sampling(temperature=0))[0] for prompt in prompts]
    assert generate(opened, prompts, 20, sampling=Sampling(temperature=0)) == alone


def test_a_broken_model_is_named_instead_of_drawn_from():
    model = model_of()
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(UserError, match="not finite after 9 tokens"):
        next(stream(model, IDS, 2))


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = next_token(logits, Sampling(top_p=0.75), generator).bincount(minlength=4) / 20_000
    torch.testing.assert_close(drawn, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.02, rtol=0)
    drawn = next_token(logits, Sampling(temperature=0.5), generator).bincount(minlength=4) / 20_000
    square = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(drawn, square / square.sum(), atol=0.02, rtol=0)


def test_a_seed_repeats_and_another_differs():
    model = model_of()
    texts = [torch.stack([s.token_B for s in stream(model, IDS, 10, seed=seed)]) for seed in (5, 5, 6)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_rows_end_at_the_end_token():
    model = model_of()
    first = next(stream(model, IDS, 1, sampling=Sampling(temperature=0))).token_B
    end = int(first[0])
    steps = [s.token_B for s in stream(model, IDS[:1], 10, sampling=Sampling(temperature=0), end=end)]
    assert [int(token) for token in steps] == [end]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: list(stream(model_of(router=router_config("expert_choice")), IDS, 2)), UserError, "whole row"),
        (lambda: list(stream(model_of(router=router_config("hash", ngram=2)), IDS, 2)), UserError, "hashes 2 ids"),
        (lambda: list(stream(model_of(), IDS[:, :0], 2)), UserError, "no text to continue"),
        (lambda: list(stream(model_of(), IDS + 61, 2)), UserError, "vocabulary of 61"),
        (lambda: Sampling(temperature=-1.0), ConfigError, "temperature"),
        (lambda: Sampling(top_p=0.0), ConfigError, "top_p"),
    ],
)
def test_what_cannot_be_continued_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_command_continues_prompts_of_a_run_and_of_its_export(tmp_path, capsys):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(tiny_dict(tmp_path)))
    assert main(["train", str(config), f"out={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    prompts = ["--prompt", "one7 two14 ", "--prompt", "im", "--max-tokens", "12", "--seed", "3"]
    assert main(["generate", str(tmp_path / "run"), *prompts]) == 0
    first = capsys.readouterr().out
    assert "one7 two14 " in first
    assert main(["generate", str(tmp_path / "run"), *prompts]) == 0
    assert capsys.readouterr().out == first
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "hf"), *prompts]) == 0
    assert capsys.readouterr().out == first
    assert main(["generate", str(tmp_path / "run"), *prompts, "--show-routing"]) == 0
    assert "experts" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "run"), "--prompt", "\udcff"]) == 2
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2

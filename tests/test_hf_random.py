"""Random tiny configurations against transformers' own classes: equal logits in both directions, or refused by name.

`tests/hf_draws.py` draws them, awkward settings and ones that we do not model included. An expected refusal names the setting;
any other error, or any other logits, fails.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe import hf
from moe.errors import CheckpointError, ConfigError
from tests.hf_draws import FAMILIES, draw

IDS = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(3))
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""transformers' plainest arithmetic; its grouped products want sizes that are multiples of 16 bytes."""
REFUSED = (
    "mlp_bias=true",
    "attention_factor=",
    "clip_qkv=0",
    "leave no expert layer",
)
"""What the draws hold and we do not model."""


def theirs(family: str, seed: int):
    """transformers' model of a draw, every tensor random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **draw(family, seed)), **PLAIN).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(("norm" in name) + 0.3 * torch.randn(tensor.shape))
            if name.endswith("_proj_bias") and (model.config.swiglu_alpha, model.config.swiglu_limit) == (1.0, 1e30):
                tensor.zero_()  # how a SwiGLU of ours is written in gpt-oss's files
                if name.endswith("gate_up_proj_bias"):
                    tensor[:, 1::2] = -1.0
    return model


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, over the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def close(found: torch.Tensor, expected: torch.Tensor, model) -> bool:
    """To 1e-5; where the draw is ill-conditioned, to four times what transformers' own last bits change.

    Those are the distance of its float32 from its float64, which share the rotary frequencies in float32, and what the last
    bit of these changes.
    """
    if distance(found, expected) < 1e-5:
        return True
    exact = model.double()(IDS).logits
    frequencies = model.float().model.rotary_emb.inv_freq
    bits = [distance(expected, exact)]
    for change in (1 + 2**-23, (1 - 2**-23) / (1 + 2**-23)):
        frequencies.mul_(change)
        bits.append(distance(model(IDS).logits, expected))
    return distance(found, exact) < 4 * max(bits)


@torch.no_grad()
def outcome(family: str, seed: int, folder) -> str:
    """`equal`, or why the draw was refused. Asserts that it is equal both ways, bitwise after a round trip."""
    reference = theirs(family, seed)
    expected = reference(IDS).logits
    reference.save_pretrained(folder / "theirs")
    refusal, ours = "", None
    try:
        ours = hf.load(folder / "theirs")
    except ConfigError as error:
        refusal = str(error)
    if ours is None:
        assert any(reason in refusal for reason in REFUSED), f"{family} {seed}: {refusal}"
        return refusal
    assert close(ours(IDS).logits_BSV, expected, reference), f"{family} {seed}: {draw(family, seed)}"
    hf.save(ours, folder / "ours", family=family, context_length=64)
    again = AutoModelForCausalLM.from_pretrained(folder / "ours", **PLAIN).eval()
    assert close(again(IDS).logits, expected, reference), f"{family} {seed} back: {draw(family, seed)}"
    if draw(family, seed).get("rope_interleave", True):  # ours are always written as pairs
        back = again.state_dict()
        assert all(torch.equal(tensor, back[name]) for name, tensor in reference.state_dict().items()), (family, seed)
    second = hf.load(folder / "ours").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in ours.state_dict().items()), (family, seed)
    return "equal"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_draws_are_equal_or_refused_by_name(family, tmp_path):
    outcomes = [outcome(family, seed, tmp_path / str(seed)) for seed in range(3, 7)]
    assert "equal" in outcomes


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_many_draws_are_equal_or_refused_by_name(family, tmp_path):
    outcomes = [outcome(family, seed, tmp_path / str(seed)) for seed in range(100, 200)]
    assert outcomes.count("equal") > 50


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_files_and_arithmetic_differ_from_float32_by_rounding(family, tmp_path):
    """A bfloat16 export holds rounded weights, and our bfloat16 arithmetic is as near its float32 as transformers' is."""
    ours_off, theirs_off = [], []
    for seed in range(100, 115):
        reference, folder = theirs(family, seed).to(torch.bfloat16), tmp_path / str(seed)
        reference.save_pretrained(folder)
        try:
            ours = hf.load(folder, dtype="bfloat16")
        except ConfigError:
            continue
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **PLAIN).eval()(IDS).logits
        assert close(
            hf.load(folder)(IDS).logits_BSV, exact, AutoModelForCausalLM.from_pretrained(folder, **PLAIN).float()
        )
        # the median token: rounding may send single tokens to other experts, on both sides
        ours_off.append((ours(IDS).logits_BSV - exact).norm(dim=-1).median() / exact.norm(dim=-1).median())
        theirs_off.append((reference(IDS).logits - exact).norm(dim=-1).median() / exact.norm(dim=-1).median())
        hf.save(hf.load(folder), folder / "back", family=family, dtype="bfloat16")
        before, after = (load_file(path / "model.safetensors") for path in (folder, folder / "back"))
        if draw(family, seed).get("rope_interleave", True):
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(ours_off) > 3
    assert torch.stack(ours_off).median() < 2 * torch.stack(theirs_off).median()


def test_names_of_modules_are_read_where_files_have_older_ones(tmp_path):
    """Mixtral's files say block_sparse_moe.experts.0.w1, its modules mlp.experts.gate_up_proj."""
    model = theirs("mixtral", 1)
    model.save_pretrained(tmp_path)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert close(hf.load(tmp_path)(IDS).logits_BSV, model(IDS).logits, model)


def test_a_selection_bias_stays_float32_in_a_bfloat16_export(tmp_path):
    model = theirs("deepseek_v3", 1)
    model.save_pretrained(tmp_path / "theirs")
    hf.save(hf.load(tmp_path / "theirs"), tmp_path / "ours", family="deepseek_v3", dtype="bfloat16")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    biases = {name: tensor for name, tensor in stored.items() if name.endswith("e_score_correction_bias")}
    assert biases and all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in biases.items())
    assert {tensor.dtype for name, tensor in stored.items() if name not in biases} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=lambda dtype: str(dtype)[6:])
def test_a_tensor_that_float32_does_not_hold_is_named(dtype, tmp_path):
    theirs("llama", 1).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"].to(dtype)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as"):
        hf.load(tmp_path)

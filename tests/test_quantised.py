"""int8 and int4 exports: integers against rounding written out here, and transformers' model of them against ours."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe import hf
from moe.errors import ConfigError
from moe.hf import quantised

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs the extra quantise (torchao)")
VALUES = {
    "vocab_size": 67,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_local_experts": 4,
}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "theirs"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **VALUES), attn_implementation="eager")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    model.eval().save_pretrained(folder)
    return folder


def test_two_integers_share_a_byte():
    values = torch.randint(-7, 8, (3, 5, 8), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    pairs = quantised.packed(values)
    assert pairs.shape == (3, 5, 4) and pairs.dtype == torch.uint8
    assert torch.equal(quantised.unpacked(pairs), values)
    assert int(quantised.packed(torch.tensor([[1, -2]], dtype=torch.int8))) == 9 + 16 * 6


@needs_torchao
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "highest", "group"), [(8, 127, 64), (4, 7, 32)])
def test_a_weight_is_the_nearest_multiple_of_its_scale(bits, highest, group):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    values, scale = quantised.rounded(weight, bits)
    parts = weight.view(6, -1, group)
    expected = (parts.abs().amax(2) / highest).bfloat16().float()
    torch.testing.assert_close(scale, expected)
    nearest = (parts / expected.unsqueeze(2)).round().clamp(-highest, highest)
    assert (values.view(6, -1, group) - nearest).abs().max() <= 1, "ties may go either way"
    found = quantised.widened(values, scale)
    assert ((found - weight).view(6, -1, group).abs() <= 0.51 * expected.unsqueeze(2) + 0.005 * parts.abs()).all()


@needs_torchao
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantised_export_computes_alike_here_and_in_transformers_and_generates(bits, export, tmp_path):
    counts = quantised.quantise(export, tmp_path / "small", bits)
    assert 32 / bits * 0.8 < quantised.ratio(counts) < 32 / bits
    ours, theirs = hf.load(tmp_path / "small"), quantised.load_transformers(tmp_path / "small")
    ids = torch.randint(0, 67, (2, 15), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(export)(ids).logits
        found = theirs(ids).logits
        assert (found - ours(ids).logits_BSV).abs().max() < 1e-4 * whole.abs().max()
        error = (found - whole).abs().mean() / whole.abs().mean()
    assert 0 < error < (0.03 if bits == 8 else 0.5)
    assert quantised.resident_bytes(theirs) < 1.1 * counts["bytes"]
    assert theirs.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 18)


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_routers_and_vectors_stay(export, tmp_path):
    quantised.quantise(export, tmp_path / "small", 4)
    kinds = {name: scale is not None for name, _, scale in quantised.integers(tmp_path / "small")}
    assert not any(rounded for name, rounded in kinds.items() if name.endswith(("gate.weight", "norm.weight")))
    assert sum(kinds.values()) == 2 + 2 * (4 + 4 * 3)
    with pytest.raises(ConfigError, match="not empty"):
        quantised.quantise(export, tmp_path / "small", 8)
    with pytest.raises(ConfigError, match="8 or 4"):
        quantised.quantise(export, tmp_path / "x", 3)

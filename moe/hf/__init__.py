"""Models in the files that others load: configuration, tensors and tokenizer of a transformers model family, in and out.

    model = moe.hf.load("path/to/model")               # a Transformer
    moe.hf.save(model, "path/to/out", family="olmoe")  # loads with AutoModelForCausalLM.from_pretrained

Every tensor is accounted for in both directions or nothing is written or returned. Needs the extra `hf` (transformers).
"""

from importlib.util import find_spec

from moe.errors import ConfigError

if find_spec("transformers") is None:
    raise ConfigError("reading and writing models for others needs the package transformers: pip install 'moe-lab[hf]'")

from moe.hf.adapters import export_adapters
from moe.hf.bring import import_model
from moe.hf.convert import export_run, family_of, save
from moe.hf.families import FAMILIES, Family
from moe.hf.reading import load, read_config

__all__ = [
    "FAMILIES",
    "Family",
    "export_adapters",
    "export_run",
    "family_of",
    "import_model",
    "load",
    "read_config",
    "save",
]

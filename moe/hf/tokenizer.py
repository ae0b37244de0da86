"""The corpus's tokenizer in the files that transformers reads: equal ids, and the document separator as end of text."""

from pathlib import Path

from moe.data.tokenizers import SEPARATOR, AnyTokenizer, Bytes


def save_tokenizer(tokenizer: AnyTokenizer, folder: Path, context_length: int) -> int:
    """Write tokenizer.json and tokenizer_config.json; returns the separator's id, which ends a text."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = _byte_backend() if isinstance(tokenizer, Bytes) else tokenizer.backend
    end = SEPARATOR if isinstance(tokenizer, Bytes) else tokenizer.separator_token or SEPARATOR
    if backend.token_to_id(end) is None:
        backend.add_special_tokens([AddedToken(end, special=True)])
    assert backend.token_to_id(end) == tokenizer.separator
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, model_max_length=context_length, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return tokenizer.separator


def _byte_backend():
    """UTF-8 bytes as a byte-level BPE without merges: the id of a byte is its value."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend

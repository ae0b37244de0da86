"""Bad corpora, tokenizers and caches, each against the words its error must hold; none may leave anything behind."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from huggingface_hub.errors import RepositoryNotFoundError

from moe.config.schema import Data, FilesSource, HubSource, PretrainedTokenizer, StdlibSource
from moe.data import prepare, shards
from moe.errors import DataError

TEXTS = [f"passage {i} " + "x" * 60 for i in range(40)]


def good(folder: Path) -> None:
    for i, text in enumerate(TEXTS):
        (folder / f"good_{i:02}.txt").write_text(text)


def jsonl(*lines: object) -> bytes:
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def records(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def parquet(**columns: list) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def data(folder: Path, *sources, **fields) -> Data:
    fields = {"sequence_length": 32, "validation_fraction": 0.25, "cache_dir": str(folder / "cache")} | fields
    return Data(sources=sources, **fields)


def refuse(folder: Path, settings: Data, *words: str) -> None:
    """prepare fails with one paragraph that holds all the words, and leaves no folder, whole or partial."""
    with pytest.raises(DataError) as caught:
        prepare(settings)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    left = list((folder / "cache").rglob("*")) if (folder / "cache").exists() else []
    assert not [path for path in left if path.name != "corpora"], left


BAD_FILES = {
    "empty": ("bad.txt", b"", ["is empty"], "empty file"),
    "blank": ("bad.txt", b" \n\n", ["is empty"], "empty file"),
    "binary": ("bad.txt", b"abc\0def", ["is binary", "offset 3"], "binary"),
    "binary late": ("bad.txt", b"a" * 100_000 + b"\0", ["is binary", "offset 100000"], "binary"),
    "UTF-16": ("bad.txt", "text".encode("utf-16"), ["UTF-16", "convert"], "binary"),
    "Latin-1": ("bad.txt", b"caf\xe9 au lait", ["not UTF-8", "0xe9", "offset 3"], "not UTF-8"),
    "Latin-1 after a mark": ("bad.txt", b"\xef\xbb\xbfcaf\xe9", ["offset 6"], "not UTF-8"),
    "compressed": ("bad.jsonl.gz", b"\x1f\x8b123", ["compressed", "unpack"], "compressed"),
    "jsonl not JSON": ("bad.jsonl", jsonl({"text": "fine"}, b"{oops\n"), ["line 2", "not JSON"], "bad JSON line"),
    "jsonl huge number": ("bad.jsonl", b"9" * 5000, ["line 1", "not JSON"], "bad JSON line"),
    "jsonl list": ("bad.jsonl", jsonl(["a"]), ["line 1", "must be a JSON object"], "bad JSON line"),
    "jsonl encoding": (
        "bad.jsonl",
        jsonl({"text": "fine"}, b'{"text": "\xff"}\n'),
        ["line 2", "not UTF-8", "0xff", "offset 27"],
        "not UTF-8",
    ),
    "jsonl surrogate": ("bad.jsonl", b'{"text": "\\ud800"}', ["line 1", "surrogate"], "not UTF-8"),
    "jsonl binary": ("bad.jsonl", b"\0\1\2", ["is binary"], "binary"),
    "jsonl empty": ("bad.jsonl", b"\n\n", ["is empty"], "empty file"),
    "jsonl field": ("bad.jsonl", jsonl({"body": "x", "id": "1"}), ["'text'", "body, id"], "missing field"),
    "jsonl number": ("bad.jsonl", jsonl({"text": 3}), ["'text'", "has int", "must be text"], "not text"),
    "parquet broken": ("bad.parquet", b"PAR1 is not all", ["cannot be read as parquet"], "unreadable"),
    "parquet cut": ("bad.parquet", parquet(text=TEXTS)[:-20], ["cannot be read as parquet"], "unreadable"),
    "parquet column": ("bad.parquet", parquet(body=["x"], id=[1]), ["no column 'text'", "body, id"], "missing field"),
    "parquet numbers": ("bad.parquet", parquet(text=[1, 2]), ["row 1", "must be text"], "not text"),
    "parquet empty": ("bad.parquet", parquet(text=pa.array([], pa.string())), ["is empty"], "empty file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(tmp_path, case):
    name, content, words, _ = BAD_FILES[case]
    good(tmp_path)
    (tmp_path / name).write_bytes(content)
    pattern = str(tmp_path / "*.*")
    refuse(tmp_path, data(tmp_path, FilesSource(paths=(pattern,))), str(tmp_path / name), *words)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_skipped_counted_and_reported_on_request(tmp_path, case):
    name, content, _, reason = BAD_FILES[case]
    good(tmp_path)
    (tmp_path / name).write_bytes(content)
    corpus = prepare(data(tmp_path, FilesSource(paths=(str(tmp_path / "*.*"),), on_bad_file="skip")))
    source = corpus.manifest["sources"][0]
    expected = 2 if case == "parquet numbers" else 1  # both of its rows
    assert source["skipped"] == {reason: expected}
    assert f"{expected} skipped as {reason} (" in corpus.describe()
    assert name in corpus.describe()
    documents = source["train"]["documents"] + source["validation"]["documents"]
    assert documents == len(TEXTS) + (case in ("jsonl not JSON", "jsonl encoding"))


def test_odd_things_in_a_folder_are_named_or_counted(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    good(texts)
    (texts / ".git").mkdir()
    (texts / ".git" / "config").write_bytes(b"\0")
    (texts / ".hidden").write_text("x")
    (texts / "loop").symlink_to(texts)
    corpus = prepare(data(tmp_path, FilesSource(paths=(str(texts),))))
    assert corpus.manifest["sources"][0]["skipped"] == {"hidden": 2}
    assert corpus.manifest["sources"][0]["files"] == len(TEXTS)
    shutil.rmtree(tmp_path / "cache")
    (texts / "nowhere").symlink_to(texts / "missing")
    refuse(tmp_path, data(tmp_path, FilesSource(paths=(str(texts),))), "nowhere does not exist", "broken link")
    (texts / "nowhere").unlink()
    os.mkfifo(texts / "pipe")
    refuse(tmp_path, data(tmp_path, FilesSource(paths=(str(texts),))), "pipe is not a plain file")


@pytest.mark.parametrize(
    "path, words",
    [
        ("missing.txt", ["missing.txt", "does not exist"]),
        ("nothing/*.txt", ["pattern that matches no file"]),
        ("empty", ["folder without files"]),
    ],
)
def test_a_path_without_files_is_refused(tmp_path, path, words):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, data(tmp_path, FilesSource(paths=(str(tmp_path / path),))), *words)


def test_prompts_of_a_text_file_are_refused(tmp_path):
    good(tmp_path)
    source = FilesSource(paths=(str(tmp_path / "*.txt"),), prompt_field="question", on_bad_file="skip")
    refuse(tmp_path, data(tmp_path, source), "prompt_field='question'", "good_00.txt is a text file")


def test_null_and_blank_records_are_counted_in_any_case(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*records(TEXTS), {"text": None}, {"text": ""}, {"text": "  "}))
    corpus = prepare(data(tmp_path, FilesSource(paths=(str(tmp_path / "a.jsonl"),))))
    assert corpus.manifest["sources"][0]["skipped"] == {"empty record": 3}


def test_a_source_without_documents_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*records(TEXTS)))
    (tmp_path / "b.txt").write_bytes(b"\0")
    one = FilesSource(paths=(str(tmp_path / "a.jsonl"),))
    refuse(tmp_path, data(tmp_path, one, one), "source 1", "gives no documents", "40 are duplicates")
    skipped = FilesSource(paths=(str(tmp_path / "b.txt"),), on_bad_file="skip")
    refuse(tmp_path, data(tmp_path, one, skipped), "source 1", "gives no documents", "'binary': 1")


def test_too_small_a_budget_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*records(TEXTS)))
    source = HubSource(dataset="json", data_files=(str(tmp_path / "a.jsonl"),), max_bytes=10)
    refuse(tmp_path, data(tmp_path, source), "gives no documents", "larger than max_bytes=10")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sequence_length": 5000}, ["training tokens", "sequence_length + 1 = 5001", "lower data.sequence_length"]),
        ({"validation_fraction": 1e-6}, ["validation has 0 of the 40 documents", "raise data.validation_fraction"]),
        ({"validation_fraction": 1 - 1e-6}, ["0 training tokens in 0 documents", "lower data.validation_fraction"]),
    ],
)
def test_a_split_without_a_full_row_is_refused(tmp_path, fields, words):
    good(tmp_path)
    settings = data(tmp_path, FilesSource(paths=(str(tmp_path / "*.txt"),)), **fields)
    with pytest.raises(DataError) as caught:
        prepare(settings)
    for word in words:
        assert word in str(caught.value)


def test_rows_beyond_the_validation_set_are_refused(tmp_path):
    good(tmp_path)
    corpus = prepare(data(tmp_path, FilesSource(paths=(str(tmp_path / "*.txt"),))))
    rows = corpus.num_validation_rows
    with pytest.raises(DataError, match=f"has {rows} rows of 32 tokens, and row {rows} was.*final_rows"):
        corpus.validation_batch(range(rows - 1, rows + 1))


def test_a_weight_too_small_for_one_row_is_refused(tmp_path):
    sources = (StdlibSource(), FilesSource(paths=("missing",), weight=1e-5))
    refuse(tmp_path, data(tmp_path, *sources), "data.sources[1]", "1/4096", "raise its weight")


# Hub data sets; the tests have no network


def test_an_unreachable_hub_names_the_way_out(tmp_path):
    words = ["'nobody/nothing'", "cannot be reached", "local copy"]
    refuse(tmp_path, data(tmp_path, HubSource(dataset="nobody/nothing")), *words)


def test_an_unknown_dataset_is_named(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unknown)
    refuse(tmp_path, data(tmp_path, HubSource(dataset="nobody/nothing")), "neither on the hub", "nor a local path")
    monkeypatch.undo()
    refuse(tmp_path, data(tmp_path, HubSource(dataset="no name at all")), "'no name at all'", "local copy")


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "fields, words",
    [
        ({"split": "test"}, ["split 'test'", "cannot be read"]),
        ({"text_field": "body"}, ["record 1", "no field 'body'", "it has: text"]),
        ({"data_files": ()}, ["is a file format and needs data_files"]),
        ({"data_files": ("missing.jsonl",)}, ["'missing.jsonl' does not exist"]),
        ({"data_files": ("https://example.org/a.jsonl",)}, ["must be local files", "download it first"]),
        ({"dataset": "."}, ["must be inside it", "relative to the data set"]),
        ({"dataset": "parquet"}, ["data set 'parquet'", "cannot be read"]),
    ],
)
def test_a_wrong_setting_of_a_dataset_is_named(tmp_path, fields, words, streaming):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*records(TEXTS)))
    settings = {"dataset": "json", "data_files": (str(tmp_path / "a.jsonl"),), "streaming": streaming} | fields
    refuse(tmp_path, data(tmp_path, HubSource(**settings)), *words)


def test_a_stream_that_breaks_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*records(TEXTS), b"{oops\n"))
    source = HubSource(dataset="json", data_files=(str(tmp_path / "a.jsonl"),))
    refuse(tmp_path, data(tmp_path, source), "data set 'json'", "cannot be read")


# Tokenizers


def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path):
    good(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    for path, words in {
        str(tmp_path / "none.json"): ["none.json' does not exist"],
        "./nowhere": ["'./nowhere' does not exist"],
        str(tmp_path / "tokenizer.json"): ["is not a tokenizer.json"],
        str(tmp_path / "folder"): ["has no tokenizer.json"],
        "nobody/nothing": ["'nobody/nothing' is no local path", "from the hub", "tokenizer.json"],
    }.items():
        source = FilesSource(paths=(str(tmp_path / "*.txt"),))
        refuse(tmp_path, data(tmp_path, source, tokenizer=PretrainedTokenizer(path=path)), *words)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    good(tmp_path)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"passage": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.save(str(tmp_path / "tokenizer.json"))
    source = FilesSource(paths=(str(tmp_path / "*.txt"),))
    tokenizer = PretrainedTokenizer(path=str(tmp_path / "tokenizer.json"))
    refuse(tmp_path, data(tmp_path, source, tokenizer=tokenizer), "loses or adds text", "bits per byte")


# The cache


def test_a_damaged_cache_is_refused_with_its_folder(tmp_path):
    good(tmp_path)
    settings = data(tmp_path, FilesSource(paths=(str(tmp_path / "*.txt"),)))
    corpus = prepare(settings)
    tokens = corpus.folder / "0.train.tokens"
    size = tokens.stat().st_size
    os.truncate(tokens, size - 2)
    with pytest.raises(DataError, match=f"{corpus.folder} is damaged.*{size - 2} bytes instead of {size}: delete"):
        prepare(settings)
    tokens.unlink()
    with pytest.raises(DataError, match="tokens is missing: delete"):
        prepare(settings)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    good(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot be written.*data\.cache_dir"):
        prepare(data(tmp_path, FilesSource(paths=(str(tmp_path / "*.txt"),))))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    good(tmp_path)
    monkeypatch.setattr(shards.np, "save", full)
    refuse(tmp_path, data(tmp_path, FilesSource(paths=(str(tmp_path / "*.txt"),))), "No space left", "make room")


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    good(tmp_path)
    original = shards._stage

    def slow(*arguments):
        stage = original(*arguments)
        (tmp_path / "good_07.txt").write_text("something else " * 5)
        return stage

    monkeypatch.setattr(shards, "_stage", slow)
    refuse(tmp_path, data(tmp_path, FilesSource(paths=(str(tmp_path / "*.txt"),))), "changed while it was read")

"""Prepared corpora and their batches, against the files they were made of and against hand-worked rows.

Where positions matter, a tokenizer built here gives every character of the corpus an id of its own, so that a token
that is lost, doubled or in both splits shows.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import torch

from moe.config.schema import BpeTokenizer, Data, FilesSource, HubSource, PretrainedTokenizer, StdlibSource
from moe.data import Batch, Corpus, prepare, shards
from moe.data import tokenizers as moe_tokenizers
from moe.data.sampling import make_schedule, permute
from moe.data.tokenizers import Bytes, open_tokenizer

ROOT = Path(__file__).parents[1]
SEPARATOR = 256
FIRST_CHARACTER = 0x4E00


def passages(number: int, letter: str = "x") -> list[str]:
    """Distinct texts of 60 to 100 bytes; the letter tells whose they are."""
    return [f"{letter} passage {i}: " + letter * (45 + i * 7 % 40) for i in range(number)]


def write_jsonl(path: Path, texts: list[str], **more: str) -> str:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return str(path)


def write_parquet(path: Path, texts: list[str], column: str = "text") -> str:
    pyarrow.parquet.write_table(pa.table({"number": list(range(len(texts))), column: texts}), path)
    return str(path)


def write_folder(path: Path, texts: list[str]) -> str:
    for i, text in enumerate(texts):
        file = path / f"{i % 3}" / f"{i:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, newline="")
    return str(path)


def files(*paths: str | Path, **fields) -> FilesSource:
    return FilesSource(paths=tuple(map(str, paths)), **fields)


def data(tmp_path: Path, *sources, **fields) -> Data:
    fields = {"sequence_length": 32, "validation_fraction": 0.25, "cache_dir": str(tmp_path / "cache")} | fields
    return Data(sources=sources, **fields)


def assert_equal(left: Batch, right: Batch) -> None:
    for name in Batch.__slots__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def joined(*batches: Batch) -> Batch:
    return Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in Batch.__slots__})


def stream(corpus: Corpus, split: str, source: int = 0) -> np.ndarray:
    """Tokens as they lie in the cache."""
    entry = corpus.manifest["sources"][source][split]
    return np.fromfile(corpus.folder / entry["names"]["tokens"], dtype=entry["dtype"])


def documents(corpus: Corpus, split: str, source: int = 0) -> list[str]:
    """The texts between the separators, decoded by Python itself (bytes tokenizer)."""
    return [bytes(part.tolist()).decode() for part in parts(corpus, split, source)]


def parts(corpus: Corpus, split: str, source: int = 0) -> list[np.ndarray]:
    """The tokens between the separators."""
    ids = stream(corpus, split, source)
    ends = np.flatnonzero(ids == corpus.manifest["tokenizer"]["separator"])
    return [part[:-1] for part in np.split(ids, ends + 1)[:-1]]


def prepared_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "corpora").iterdir())


@pytest.fixture
def unique(tmp_path):
    """A corpus in which no token occurs twice: 40 documents of 97 characters each, every character a token."""
    characters = [chr(FIRST_CHARACTER + i) for i in range(40 * 97)]
    write_folder(tmp_path / "texts", ["".join(characters[i * 97 : (i + 1) * 97]) for i in range(40)])
    vocabulary = {"<eos>": 0} | {character: i + 1 for i, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.enable_truncation(10)
    backend.add_special_tokens(["<eos>"])
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    tokenizer = PretrainedTokenizer(path=str(tmp_path / "tokenizer"))
    return prepare(data(tmp_path, files(tmp_path / "texts"), tokenizer=tokenizer))


def epoch(corpus: Corpus, number: int, seed: int = 0) -> Batch:
    return corpus.train_batch(number, range(corpus.num_train_rows), batch_rows=corpus.num_train_rows, seed=seed)


# Rows, worked by hand and counted


def test_rows_of_two_short_documents_are_as_worked_by_hand(tmp_path, monkeypatch):
    write_folder(tmp_path / "texts", ["abc", "training text", "de"])  # sorted: 0/000.txt, 1/001.txt, 2/002.txt
    monkeypatch.setattr(shards, "split_of", lambda key, _: "train" if key == "1/001.txt" else "validation")
    corpus = prepare(data(tmp_path, files(tmp_path / "texts"), sequence_length=4))
    # The stream is a b c | d e |, seven tokens: four inputs in the first row, two and padding in the second.
    assert corpus.num_validation_rows == 2
    batch = corpus.validation_batch(range(2))
    first = batch.ids_BS[:, 0].argsort()
    a, b, c, d, e = b"abcde"
    assert batch.ids_BS[first].tolist() == [[a, b, c, SEPARATOR], [d, e, SEPARATOR, SEPARATOR]]
    assert batch.targets_BS[first].tolist() == [[b, c, SEPARATOR, -100], [e, SEPARATOR, -100, -100]]
    assert batch.document_BS[first].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert batch.valid_BS[first].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.bytes_B[first].tolist() == [2.0, 1.0]
    assert batch.row_B.tolist() == [0, 1]
    dtypes = {name: getattr(batch, name).dtype for name in Batch.__slots__}
    assert dtypes.pop("valid_BS") == torch.bool
    assert dtypes.pop("bytes_B") == torch.float64
    assert set(dtypes.values()) == {torch.int64}


@pytest.mark.parametrize("number", [0, 1, 5])
def test_every_training_token_is_seen_exactly_once_in_an_epoch(unique, number):
    batch = epoch(unique, number)
    tokens = stream(unique, "train")
    num_documents = int((tokens == 0).sum())
    inputs = batch.ids_BS[batch.valid_BS]
    assert sorted(inputs.tolist()) == sorted(tokens.tolist())
    targets = Counter(batch.targets_BS[batch.targets_BS != -100].tolist())
    firsts = {tokens[0], *tokens[np.flatnonzero(tokens == 0)[:-1] + 1]}
    # The first token of a document follows a separator, which predicts nothing; every document ends with one.
    assert targets.pop(0) == num_documents
    assert set(targets) == set(tokens.tolist()) - firsts - {0}
    assert set(targets.values()) == {1}
    assert batch.bytes_B.sum() == 3 * num_documents * 96


def test_targets_are_the_next_characters_of_the_document(unique):
    batch = epoch(unique, 0)
    counted = (batch.targets_BS != -100) & (batch.targets_BS != 0)
    assert torch.equal(batch.targets_BS[counted], batch.ids_BS[counted] + 1)
    inside = (batch.document_BS[:, 1:] == batch.document_BS[:, :-1]) & batch.valid_BS[:, 1:]
    following = batch.ids_BS[:, 1:][inside] - batch.ids_BS[:, :-1][inside]
    assert set(following[batch.ids_BS[:, 1:][inside] != 0].tolist()) == {1}
    assert (batch.document_BS.diff(dim=1) >= 0).all()
    assert (batch.document_BS[:, 0] == 0).all()


def test_windows_and_their_order_change_with_the_epoch_and_the_seed(unique):
    firsts = [epoch(unique, number, seed).ids_BS[:, 0].tolist() for number, seed in ((0, 0), (1, 0), (0, 1))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len(set(firsts[i]) & set(firsts[j])) < len(firsts[i]) / 2  # other cuts
    assert not any(first == sorted(first) for first in firsts)


def test_validation_shares_no_token_with_training_and_none_is_lost(unique):
    batch = unique.validation_batch(range(unique.num_validation_rows))
    validation = set(batch.ids_BS[batch.valid_BS].tolist()) - {0}
    training = set(epoch(unique, 0).ids_BS.flatten().tolist()) - {0}
    assert not validation & training
    assert validation | training == set(range(1, 40 * 97 + 1))
    targets = batch.targets_BS[batch.targets_BS > 0].tolist()
    assert len(targets) == len(set(targets))  # windows do not overlap


def test_prompts_carry_no_loss(tmp_path):
    records = [{"question": "PPP" + "Q" * i, "answer": "t" * (i + 20)} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    source = files(tmp_path / "a.jsonl", text_field="answer", prompt_field="question")
    corpus = prepare(data(tmp_path, source))
    batch = epoch(corpus, 0)
    targets = Counter(batch.targets_BS[batch.targets_BS != -100].tolist())
    assert set(targets) == {ord("t"), SEPARATOR}
    # The last token of a prompt predicts the first of the text, so all of them count.
    assert targets[ord("t")] == sum(document.count("t") for document in documents(corpus, "train"))
    assert batch.bytes_B.sum() == targets[ord("t")]
    assert ord("P") in batch.ids_BS


# The same batch for any number of ranks, at any moment


@pytest.fixture
def mixed(tmp_path):
    """Two sources 3:1, parquet and jsonl, under a BPE trained on both."""
    big = files(write_parquet(tmp_path / "a.parquet", passages(200, "a")), weight=3.0)
    small = files(write_jsonl(tmp_path / "b.jsonl", passages(120, "b")))
    return data(tmp_path, big, small, tokenizer=BpeTokenizer(vocab_size=280), sequence_length=16)


def test_a_batch_is_the_same_in_one_piece_or_several_and_after_opening_again(mixed):
    corpus = prepare(mixed)
    for step in (0, 17, int(np.random.default_rng(0).integers(10_000))):
        whole = corpus.train_batch(step, range(12), batch_rows=12, seed=3)
        for ranks in (2, 4):
            each = 12 // ranks
            pieces = [
                corpus.train_batch(step, range(r * each, (r + 1) * each), batch_rows=12, seed=3) for r in range(ranks)
            ]
            assert_equal(joined(*pieces), whole)
        again = prepare(mixed)
        assert again.fingerprint == corpus.fingerprint
        assert_equal(again.train_batch(step, range(12), batch_rows=12, seed=3), whole)
    assert not torch.equal(whole.ids_BS, corpus.train_batch(0, range(12), batch_rows=12, seed=3).ids_BS)


def test_two_sources_are_mixed_three_to_one(mixed):
    corpus = prepare(mixed)
    batch = corpus.train_batch(0, range(400), batch_rows=400, seed=0)
    is_a = np.array(["a" * 9 in corpus.tokenizer.decode(row.tolist()).replace(" ", "") for row in batch.ids_BS])
    is_b = np.array(["b" * 9 in corpus.tokenizer.decode(row.tolist()).replace(" ", "") for row in batch.ids_BS])
    assert (is_a ^ is_b).all()
    assert abs(is_a.mean() - 0.75) < 0.01
    assert np.abs(np.cumsum(is_a) - 0.75 * np.arange(1, 401)).max() <= 1  # evenly, not on average only


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (0.2, 0.5, 0.3), (1000, 1), (5,)])
def test_schedule_keeps_every_prefix_near_the_weights(weights):
    schedule = make_schedule(weights)
    rows = [schedule.locate(n) for n in range(10_000)]
    shares = np.array(weights) / sum(weights)
    taken = np.cumsum([np.arange(len(weights)) == source for source, _ in rows], axis=0)
    assert np.abs(taken - shares * np.arange(1, 10_001)[:, None]).max() < 2.5  # rounding to 1/4096 adds up to 1.2
    for source in range(len(weights)):
        assert [draw for s, draw in rows if s == source] == list(range(taken[-1][source]))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_permute_is_a_permutation(size):
    images = [[permute(i, size, key) for i in range(size)] for key in range(20)]
    assert all(sorted(image) == list(range(size)) for image in images)
    if size > 16:
        assert len({tuple(image) for image in images}) == 20
        # Where the first index goes is spread over the range.
        assert len({image[0] for image in images}) > 8


def test_a_step_in_the_far_future_costs_no_more_than_the_first(unique):
    start = time.perf_counter()
    unique.train_batch(10**15, range(8), batch_rows=8, seed=0)
    assert time.perf_counter() - start < 1.0


def test_first_validation_rows_are_a_sample_of_all_sources(tmp_path):
    sources = [
        files(write_jsonl(tmp_path / f"{letter}.jsonl", passages(400, letter)), weight=weight)
        for letter, weight in (("a", 9.0), ("b", 1.0))
    ]
    corpus = prepare(data(tmp_path, *sources))
    batch = corpus.validation_batch(range(corpus.num_validation_rows // 2))
    share = float((batch.ids_BS == ord("a")).sum() / ((batch.ids_BS == ord("a")) | (batch.ids_BS == ord("b"))).sum())
    sizes = [source["validation"]["bytes"] for source in corpus.manifest["sources"]]
    assert abs(share - sizes[0] / sum(sizes)) < 0.1


# Sources


def test_parquet_jsonl_and_a_stream_of_the_same_texts_give_the_same_batches(tmp_path):
    texts = passages(60)
    write_jsonl(tmp_path / "a.jsonl", texts)
    sources = {
        "jsonl": files(tmp_path / "a.jsonl"),
        "parquet": files(write_parquet(tmp_path / "a.parquet", texts, "body"), text_field="body"),
        "stream": HubSource(dataset="json", data_files=(str(tmp_path / "a.jsonl"),)),
        "parquet stream": HubSource(
            dataset="parquet", data_files=(str(tmp_path / "a.parquet"),), text_field="body", streaming=True
        ),
        "folder": HubSource(dataset=str(tmp_path), data_files=("*.jsonl",)),
        "loaded": HubSource(dataset="json", data_files=(str(tmp_path / "*.jsonl"),), streaming=False),
    }
    corpora = {name: prepare(data(tmp_path, source)) for name, source in sources.items()}
    assert sorted(documents(corpora["jsonl"], "train") + documents(corpora["jsonl"], "validation")) == sorted(texts)
    for name, corpus in corpora.items():
        assert corpus.fingerprint == corpora["jsonl"].fingerprint, name
        assert_equal(epoch(corpus, 0), epoch(corpora["jsonl"], 0))


def test_text_files_keep_their_bytes_and_moving_the_folder_keeps_the_split(tmp_path):
    texts = [f"Zeile {i}\r\n\tüber 🦉 {'y' * i}\n" for i in range(40)]
    texts[3] = "\ufeff" + texts[3]
    write_folder(tmp_path / "here", texts)
    write_folder(tmp_path / "there", texts)
    corpus = prepare(data(tmp_path, files(tmp_path / "here")))
    found = documents(corpus, "train") + documents(corpus, "validation")
    assert sorted(found) == sorted(text.removeprefix("\ufeff") for text in texts)
    assert 0 < len(documents(corpus, "validation")) < 20
    moved = prepare(data(tmp_path, files(str(tmp_path / "there" / "**" / "*.txt")), cache_dir=str(tmp_path / "other")))
    assert moved.fingerprint == corpus.fingerprint


def test_duplicates_across_files_and_sources_are_dropped_and_counted(tmp_path):
    texts = passages(40)
    first = files(write_jsonl(tmp_path / "a.jsonl", texts + texts[:7]))
    second = files(write_parquet(tmp_path / "b.parquet", texts[:5] + passages(40, "z")))
    corpus = prepare(data(tmp_path, first, second))
    assert [source["duplicates"] for source in corpus.manifest["sources"]] == [7, 5]
    kept = [documents(corpus, split, source) for source in (0, 1) for split in ("train", "validation")]
    everything = [text for part in kept for text in part]
    assert sorted(everything) == sorted({*texts, *passages(40, "z")})
    assert "7 duplicates dropped" in corpus.describe()


def test_a_stream_stops_at_its_byte_budget(tmp_path):
    texts = passages(200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = prepare(
        data(tmp_path, HubSource(dataset="json", data_files=(str(tmp_path / "a.jsonl"),), max_bytes=9_000))
    )
    source = corpus.manifest["sources"][0]
    taken = source["train"]["bytes"] + source["validation"]["bytes"]
    assert 8_800 < taken <= 9_000
    assert source["budget_reached"]
    assert "ended at max_bytes" in corpus.describe()


def test_standard_library_is_prepared_without_its_tests(tmp_path):
    corpus = prepare(data(tmp_path, StdlibSource(), sequence_length=256, validation_fraction=0.1))
    source = corpus.manifest["sources"][0]
    total = source["train"]["bytes"] + source["validation"]["bytes"]
    assert 5e6 < total < 30e6
    texts = {split: documents(corpus, split) for split in ("train", "validation")}
    everything = texts["train"] + texts["validation"]
    assert Path(textwrap.__file__).read_text() in everything
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = [
        *library.glob("test/test_d*.py"),
        *library.glob("*/test*/test_*.py"),
        *library.glob("*-packages/*/*.py"),
    ]
    assert not {path.read_text(errors="replace") for path in left_out} - {""} & set(everything)
    assert not set(texts["train"]) & set(texts["validation"])
    skipped = sum(source["skipped"].values())
    assert len(everything) + source["duplicates"] + skipped == source["files"]
    assert 0.02 < source["validation"]["bytes"] / total < 0.25


def test_hub_dataset_is_pinned_to_its_commit_and_opens_without_a_network(tmp_path, monkeypatch):
    commits = iter(["c1", "c1", "c2"])
    loaded = []

    def load(name, subset, *, revision, **options):
        loaded.append((name, subset, revision))
        return datasets.Dataset.from_dict({"text": passages(40, letter="m" if revision == "c1" else "n")})

    def online(*_, **__):
        return SimpleNamespace(sha=next(commits))

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", online)
    settings = data(tmp_path, HubSource(dataset="some/stories"))
    first = prepare(settings)
    assert prepare(settings).folder == first.folder
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    assert prepare(settings).folder == first.folder
    assert loaded == [("some/stories", None, "c1")]
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", online)
    assert prepare(settings).fingerprint != first.fingerprint
    assert loaded[1:] == [("some/stories", None, "c2")]


# Tokenizers

AWKWARD = [
    "",
    "a",
    "tab\t\n\n  spaces ",
    "naïve 🦉 “quotes” 中文",
    "<|document|> and <|endoftext|> are text",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_tokenizers_give_texts_back(text, mixed):
    for tokenizer in (Bytes(), prepare(mixed).tokenizer):
        (ids,) = tokenizer.encode([text])
        assert tokenizer.decode(ids) == text
        assert tokenizer.separator not in ids
        assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
        assert tokenizer.decode([*ids, tokenizer.separator]) == text


def test_texts_over_a_million_characters_come_back_whole(mixed, monkeypatch):
    monkeypatch.setattr(moe_tokenizers, "PIECE_CHARACTERS", 50)
    tokenizer = prepare(mixed).tokenizer
    text = "\n".join(f"line {i} 🦉" + "-" * (i % 90) for i in range(300))
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text


def test_bpe_learns_from_the_training_texts_of_all_sources(mixed, monkeypatch):
    seen = []
    train = moe_tokenizers._train_backend
    monkeypatch.setattr(
        moe_tokenizers, "_train_backend", lambda config, texts: seen.extend(texts) or train(config, texts)
    )
    corpus = prepare(mixed)
    assert corpus.vocab_size == 280
    training = [corpus.tokenizer.decode(part) for source in (0, 1) for part in parts(corpus, "train", source)]
    assert sorted(seen) == sorted(training)
    assert seen != training  # shuffled
    assert len(stream(corpus, "train")) < 0.8 * corpus.manifest["sources"][0]["train"]["bytes"]


def test_bpe_is_cached_apart_from_the_corpus_and_trained_again_for_other_text(mixed, monkeypatch):
    corpus = prepare(mixed)
    trained = []
    train = moe_tokenizers._train_backend
    monkeypatch.setattr(moe_tokenizers, "_train_backend", lambda *a: trained.append(a) or train(*a))
    before = corpus.fingerprint
    for path in corpus.folder.iterdir():
        path.unlink()
    corpus.folder.rmdir()
    assert prepare(mixed).fingerprint == before
    assert not trained
    path = Path(mixed.sources[1].paths[0])
    path.write_text(path.read_text() + "".join(json.dumps({"text": text}) + "\n" for text in passages(20, "c")))
    prepare(mixed)
    assert len(trained) == 1


def test_bpe_learns_from_no_more_than_training_bytes(tmp_path, monkeypatch):
    seen = []
    train = moe_tokenizers._train_backend
    monkeypatch.setattr(moe_tokenizers, "_train_backend", lambda c, texts: seen.append(texts) or train(c, texts))
    source = files(write_jsonl(tmp_path / "a.jsonl", passages(100)))
    corpus = prepare(data(tmp_path, source, tokenizer=BpeTokenizer(vocab_size=260, training_bytes=1000)))
    assert sum(len(text.encode()) for text in seen[0]) == 1000
    training = {corpus.tokenizer.decode(part) for part in parts(corpus, "train")}
    assert set(seen[0][:-1]) <= training  # whole documents, of the training split


def test_pretrained_tokenizer_is_read_from_file_or_folder_and_never_truncates(unique, tmp_path):
    assert unique.vocab_size == 40 * 97 + 1
    assert unique.manifest["tokenizer"]["separator"] == 0
    assert open_tokenizer(unique.folder).vocab_size == unique.vocab_size
    path = tmp_path / "tokenizer" / "tokenizer.json"
    by_file = prepare(data(tmp_path, files(tmp_path / "texts"), tokenizer=PretrainedTokenizer(path=str(path))))
    assert by_file.folder == unique.folder


def test_pretrained_tokenizer_without_an_end_token_gets_a_separator_of_its_own(mixed, tmp_path):
    corpus = prepare(mixed)  # its <|document|> is no usual end token
    path = PretrainedTokenizer(path=str(corpus.folder / "tokenizer.json"))
    other = prepare(data(tmp_path, *mixed.sources, tokenizer=path))
    assert (other.vocab_size, other.manifest["tokenizer"]["separator"]) == (281, 280)
    assert other.tokenizer.decode(stream(other, "train")) == corpus.tokenizer.decode(stream(corpus, "train"))


# The cache


def test_a_second_prepare_reads_the_cache(mixed, monkeypatch):
    first = prepare(mixed)
    monkeypatch.setattr(shards, "_build", lambda *_: pytest.fail("prepared again"))
    assert prepare(mixed).folder == first.folder
    other_rows = replace(mixed, sequence_length=8)
    assert prepare(other_rows).folder == first.folder
    assert prepare(other_rows).fingerprint != first.fingerprint


def test_an_edit_that_keeps_size_and_time_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, passages(40))
    times = path.stat()
    before = prepare(data(tmp_path, files(path)))
    path.write_text(path.read_text().replace("passage 7:", "passage Z:"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    after = prepare(data(tmp_path, files(path)))
    assert after.fingerprint != before.fingerprint
    assert any("passage Z:" in text for split in ("train", "validation") for text in documents(after, split))


CHILD = """
import os, signal, sys, time
from pathlib import Path
from moe.config.schema import Data, FilesSource
from moe.data import cache, prepare, shards
data = Data(sources=(FilesSource(paths=(sys.argv[1],)),), cache_dir=sys.argv[2], sequence_length=32,
            validation_fraction=0.25)
{patch}
print(prepare(data).fingerprint)
"""


def child(patch: str, *arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD.format(patch=patch), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["shards._tokenise", "shards.np.save", "cache._publish"])
def test_a_killed_preparation_leaves_nothing_that_is_picked_up(tmp_path, moment):
    path = write_jsonl(tmp_path / "a.jsonl", passages(40))
    cache = tmp_path / "cache"
    process = child(f"{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", path, cache)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (left,) = prepared_in(cache)
    assert left.startswith(".")
    assert left.endswith(".tmp")
    corpus = prepare(data(tmp_path, files(path)))
    clean = prepare(data(tmp_path, files(path), cache_dir=str(tmp_path / "clean")))
    assert corpus.fingerprint == clean.fingerprint
    assert_equal(epoch(corpus, 0), epoch(clean, 0))
    # A day later, the next preparation clears up.
    old = time.time() - 25 * 3600
    for remains in (cache / "corpora" / left, *(cache / "corpora" / left).iterdir()):
        os.utime(remains, (old, old))
    prepare(data(tmp_path, files(path), validation_fraction=0.3))
    assert left not in prepared_in(cache)


def test_two_processes_may_prepare_at_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", passages(40))
    # Both reach the last moment before either publishes.
    patch = """
real = cache._publish
def publish(temporary, final):
    Path(sys.argv[3], str(os.getpid())).touch()
    while len(os.listdir(sys.argv[3])) < 2:
        time.sleep(0.01)
    real(temporary, final)
cache._publish = publish
"""
    (tmp_path / "waiting").mkdir()
    both = [child(patch, path, tmp_path / "cache", tmp_path / "waiting") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len({output for output, _ in outputs}) == 1
    (folder,) = prepared_in(tmp_path / "cache")
    assert not folder.startswith(".")
    assert prepare(data(tmp_path, files(path))).fingerprint == outputs[0][0].strip()

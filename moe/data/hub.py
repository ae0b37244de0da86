"""Documents out of what `datasets.load_dataset` loads: a hub data set by name, a local folder, or a file format.

What a data set holds is identified before it is read: local files by their content, a hub data set by its commit. The
commit last seen is remembered in the cache folder, so that a prepared corpus opens without a network.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe.config.schema import HubSource
from moe.data.cache import digest
from moe.data.documents import Document, Intake, document_from_record
from moe.data.files import digest_files, find_files
from moe.errors import DataError
from moe.files import write_text

BUILDERS = ("arrow", "csv", "json", "parquet", "text")
HUB_TIMEOUT_SECONDS = 20


def identify(source: HubSource, cache_dir: Path) -> dict[str, str]:
    """{"files": hash of content} for local data, {"revision": commit} for the hub; raises DataError if unknown."""
    if source.dataset in BUILDERS:
        return {"files": digest_files(find_files(_local_data_files(source), Intake()))}
    outside = [path for path in source.data_files if "://" in path or os.path.isabs(path) or ".." in Path(path).parts]
    if outside:
        raise DataError(
            f"data_files of data set {source.dataset!r} must be inside it, and {outside[0]!r} is not: name files "
            f"relative to the data set, or take the file format ({', '.join(BUILDERS)}) as the data set"
        )
    if os.path.exists(os.path.expanduser(source.dataset)):
        return {"files": digest_files(find_files([source.dataset], Intake()))}
    return {"revision": _hub_revision(source.dataset, cache_dir)}


def read_hub(source: HubSource, identity: dict[str, str], intake: Intake) -> Iterator[Document]:
    """Documents of the data set in its order, up to source.max_bytes of text; raises DataError for what is wrong."""
    taken_bytes = 0
    for number, record in enumerate(_records(source, identity), start=1):
        document = document_from_record(
            record,
            name=f"data set {source.dataset!r}, record {number}",
            text_field=source.text_field,
            prompt_field="",
            intake=intake,
        )
        if document is None:
            continue
        taken_bytes += len(document.text.encode())
        if taken_bytes > source.max_bytes:
            intake.budget_reached = True
            return
        yield document


def _records(source: HubSource, identity: dict[str, str]) -> Iterator[dict[str, Any]]:
    import datasets

    arguments: dict[str, Any] = {}
    if source.data_files:
        local = source.dataset in BUILDERS
        arguments["data_files"] = _local_data_files(source) if local else list(source.data_files)
    if "revision" in identity:
        arguments["revision"] = identity["revision"]
    dataset = os.path.expanduser(source.dataset)
    try:
        yield from datasets.load_dataset(
            dataset, source.subset or None, split=source.split, streaming=source.streaming, **arguments
        )  # pyright: ignore[reportReturnType] - a split was named, so this is one data set of dicts
    except Exception as error:
        # The library raises whatever its readers raise: every cause is put under the name of the data set.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data set {source.dataset!r} (subset {source.subset or 'default'!r}, split {source.split!r}) cannot "
            f"be read: {reason}. {_WAY_OUT}"
        ) from error


_WAY_OUT = (
    "Check its name, subset, split and data_files; without a network, use a local copy: "
    'HubSource(dataset="json", data_files=("file.jsonl",)) or FilesSource'
)


def _local_data_files(source: HubSource) -> list[str]:
    """Existing files that data_files of a file format names; links are refused: their content has no identity."""
    if not source.data_files:
        raise DataError(
            f"dataset={source.dataset!r} is a file format and needs data_files: name the files, e.g. "
            f'("my.{source.dataset}",)'
        )
    remote = [path for path in source.data_files if "://" in path]
    if remote:
        raise DataError(
            f"data_files of the format {source.dataset!r} must be local files, and {remote[0]!r} is a link: "
            "download it first, or name the hub data set that holds it"
        )
    paths: list[str] = []
    for path in map(os.path.expanduser, source.data_files):
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise DataError(
                f"data path {path!r} does not exist (seen from {os.getcwd()}): correct data_files or create the file"
            )
        paths += matches
    return paths


def _hub_revision(dataset: str, cache_dir: Path) -> str:
    """The data set's current commit, or, where the hub cannot be reached, the one that was last seen from here."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    remembered = cache_dir / "revisions" / digest(dataset)
    try:
        revision = HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT_SECONDS).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"data set {dataset!r} is neither on the hub (or it is private and you are not logged in) nor a local "
            f"path, nor a format ({', '.join(BUILDERS)}). {_WAY_OUT}"
        ) from error
    except Exception as error:
        # Offline mode, no route, a proxy's refusal and a time-out come as unrelated classes.
        if remembered.is_file():
            return remembered.read_text()
        raise DataError(
            f"data set {dataset!r} was not prepared here before and the hub cannot be reached. {_WAY_OUT}"
        ) from error
    if not revision:
        raise DataError(f"data set {dataset!r} has no commit on the hub, so it cannot be cached: it may be empty")
    try:
        write_text(remembered, revision)
    except OSError as error:
        raise DataError(
            f"the data cache {cache_dir} cannot be written ({error.strerror}): set data.cache_dir"
        ) from error
    return revision

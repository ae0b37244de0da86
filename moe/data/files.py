"""Documents out of local files: text (one document a file), jsonl and parquet (one a record), and Python's own library.

Files come sorted by their path relative to the folder or glob that named them; that relative path is also a text
file's split key, so moving the folder does not move documents between training and validation.
"""

import codecs
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config.schema import FilesSource
from moe.data.documents import Document, Intake, document_from_record
from moe.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PROBE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class File:
    """A file and its key, the relative path that orders it and decides its split."""

    key: str
    path: Path


def find_stdlib() -> list[File]:
    """The Python files of the running interpreter's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(
            f"Python's standard library has no source files in {root} (it may be zipped): use a full Python "
            "installation, or data.sources with files of your own"
        )
    return _sorted_files(root, files)


def find_files(paths: Sequence[str], intake: Intake) -> list[File]:
    """Files that the paths (files, folders, globs) name, each once; hidden ones in folders are counted skips.

    Raises DataError for a path that does not exist, a folder without files or a glob without a match.
    """
    found: dict[str, File] = {}
    for path in paths:
        expanded = os.path.expanduser(path)
        if os.path.isdir(expanded):
            files = _sorted_files(Path(expanded), _walk(expanded, intake))
            problem = "is a folder without files (hidden ones do not count)"
        elif os.path.lexists(expanded):
            files, problem = [File(os.path.basename(expanded), Path(expanded))], ""
        elif glob.has_magic(expanded):
            matches = [Path(match) for match in glob.glob(expanded, recursive=True) if not os.path.isdir(match)]
            files, problem = _sorted_files(_fixed_part(expanded), matches), "is a pattern that matches no file"
        else:
            files, problem = [], "does not exist"
        if not files:
            raise DataError(f"data path {path!r} {problem} (seen from {os.getcwd()}): correct it or create the files")
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    return list(found.values())


def digest_files(files: Sequence[File]) -> str:
    """Hash of every file's key, size and content; files that cannot be read count as such, for the reader to report."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            # A pipe or device would block or never end.
            with file.path.open("rb") if file.path.is_file() else open(os.devnull, "rb") as stream:
                size, content = os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "blake2b").hexdigest()
        except OSError:
            size, content = -1, "unreadable"
        digest.update(json.dumps([file.key, size, content]).encode())
    return digest.hexdigest()


def read_files(files: Sequence[File], source: FilesSource, intake: Intake) -> Iterator[Document]:
    """Documents of the files, in order; raises DataError or counts what is bad, as source.on_bad_file says."""
    for file in files:
        intake.files += 1
        suffix = file.path.suffix.lower()
        try:
            if not _is_usable(file, intake):
                continue
            if suffix in (".jsonl", ".ndjson"):
                yield from _read_jsonl(file, source, intake)
            elif suffix == ".parquet":
                yield from _read_parquet(file, source, intake)
            elif source.prompt_field:
                reason = f"prompt_field={source.prompt_field!r} needs jsonl or parquet, and {file.path} is a text file"
                raise DataError(f"{reason}: leave prompt_field empty, or give the file a source of its own")
            else:
                yield from read_text(file, intake)
        except OSError as error:
            message = f"{file.path} cannot be read ({error.strerror}): check its permissions, or {_SKIP}"
            intake.reject("unreadable", file.key, message)


def read_text(file: File, intake: Intake) -> Iterator[Document]:
    """The one document of a UTF-8 text file; a leading byte-order mark is dropped, line ends stay as they are."""
    content = file.path.read_bytes()
    if not content.strip():
        return intake.reject("empty file", file.key, f"{file.path} is empty: remove it from the source, or {_SKIP}")
    if b"\0" in content:
        return intake.reject("binary", file.key, _binary_message(file.path, content))
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(content.removeprefix(codecs.BOM_UTF8))
        return intake.reject("not UTF-8", file.key, _encoding_message(file.path, content[offset], offset))
    yield Document(str(file.path), file.key, text)


def _read_jsonl(file: File, source: FilesSource, intake: Intake) -> Iterator[Document]:
    offset = 0
    records = 0
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            offset += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            records += 1
            name = f"{file.path}, line {number}"
            record = _parse_line(line, offset - len(line), name, intake)
            if record is None:
                continue
            document = document_from_record(
                record, name=name, text_field=source.text_field, prompt_field=source.prompt_field, intake=intake
            )
            if document is not None:
                yield document
    if not records:
        intake.reject("empty file", file.key, f"{file.path} is empty (no lines with records): remove it, or {_SKIP}")


def _parse_line(line: bytes, start: int, name: str, intake: Intake) -> dict[str, Any] | None:
    """The JSON object of a line that begins at byte `start` of its file; None if it was rejected and counted."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        intake.reject("not UTF-8", name, _encoding_message(name, line[error.start], start + error.start))
        return None
    except (ValueError, RecursionError) as error:
        intake.reject("bad JSON line", name, f"{name} is not JSON ({error}): correct the line, or {_SKIP}")
        return None
    if not isinstance(record, dict):
        message = f"{name} must be a JSON object with fields and is a {type(record).__name__}: correct it, or {_SKIP}"
        intake.reject("bad JSON line", name, message)
        return None
    return record


def _read_parquet(file: File, source: FilesSource, intake: Intake) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    fields = [source.text_field, *([source.prompt_field] if source.prompt_field else [])]
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            known = table.schema_arrow.names
            missing = [field for field in fields if field not in known]
            if missing:
                names = ", ".join(known)
                message = f"{file.path} has no column {missing[0]!r} (it has: {names}): name one of them in the source"
                return intake.reject("missing field", file.key, message)
            for batch in table.iter_batches(batch_size=1024, columns=fields):
                for record in batch.to_pylist():
                    row += 1
                    document = document_from_record(
                        record,
                        name=f"{file.path}, row {row}",
                        text_field=source.text_field,
                        prompt_field=source.prompt_field,
                        intake=intake,
                    )
                    if document is not None:
                        yield document
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f" after {row} rows" if row else ""
        reason = str(error).splitlines()[0]
        message = f"{file.path} cannot be read as parquet{where} ({reason}): write it again, or {_SKIP}"
        return intake.reject("unreadable", file.key, message)
    if not row:
        intake.reject("empty file", file.key, f"{file.path} is empty (no rows): remove it, or {_SKIP}")


_SKIP = 'set on_bad_file="skip" to count and leave out what cannot be used'


def _is_usable(file: File, intake: Intake) -> bool:
    """Whether the file is a plain, uncompressed text or parquet file; if not, rejected with the reason."""
    if not file.path.is_file():
        kind = "does not exist (a broken link?)" if not file.path.exists() else "is not a plain file"
        intake.reject("unreadable", file.key, f"{file.path} {kind}: remove it from the source, or {_SKIP}")
        return False
    if file.path.suffix.lower() in COMPRESSED_SUFFIXES:
        intake.reject("compressed", file.key, f"{file.path} is compressed and not read as it is: unpack it, or {_SKIP}")
        return False
    with file.path.open("rb") as stream:
        probe = stream.read(PROBE_BYTES)
    if b"\0" in probe and file.path.suffix.lower() != ".parquet":
        intake.reject("binary", file.key, _binary_message(file.path, probe))
        return False
    return True


def _binary_message(path: Path, content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return f"{path} is UTF-16 or UTF-32, and text must be UTF-8: convert it, or {_SKIP}"
    return f"{path} is binary (a NUL byte at offset {content.index(0)}), and text must be UTF-8: remove it, or {_SKIP}"


def _encoding_message(name: Path | str, byte: int, offset: int) -> str:
    return f"{name} is not UTF-8 (byte 0x{byte:02x} at offset {offset}): convert it (iconv -t UTF-8), or {_SKIP}"


def _sorted_files(root: Path, paths: Sequence[Path]) -> list[File]:
    return sorted((File(path.relative_to(root).as_posix(), path) for path in paths), key=lambda file: file.key)


def _fixed_part(pattern: str) -> Path:
    """The leading folders of a glob pattern that hold no wildcard."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _walk(root: str, intake: Intake) -> list[Path]:
    """Files below root, links followed once; hidden files and folders are counted, not entered."""
    files = []
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        for hidden in [name for name in (*folders, *names) if name.startswith(".")]:
            intake.skip("hidden", os.path.relpath(os.path.join(folder, hidden), root))
        visible = [name for name in folders if not name.startswith(".")]
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in visible}
        folders[:] = [name for name in visible if targets[name] not in seen]
        seen.update(targets.values())
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return files

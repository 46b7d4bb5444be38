"""A tiny large model on disk, and a tiny small model with a LoRA adapter that was really changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.adapter_pair import AdapterPair
from fedpt_secure.proxy.http_transport import HttpTransport, TransportSettings
from fedpt_secure.proxy.llama_cpp import LlamaCppSource
from fedpt_secure.proxy.local_transformers import LocalTransformersLM
from fedpt_secure.proxy.openai_api import OpenAISource

SHIPPED = Path(str(resources.files("fedpt_secure.lm.builtin"))) / "tokenizer.json"


def make_llama(seed: int, *, vocab_size: int, **changes) -> LlamaForCausalLM:
    """A random model with clear preferences: its logits have a standard deviation of about 3."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(settings | changes))).eval()


@pytest.fixture(scope="session")
def llama():
    return make_llama


@pytest.fixture(scope="session")
def large_directory(tmp_path_factory) -> Path:
    """A tiny Llama over the shipped tokenizer's 49,152 tokens, its output layer padded to 49,160."""
    path = tmp_path_factory.mktemp("large")
    make_llama(1, vocab_size=49_160).save_pretrained(path)
    shutil.copy(SHIPPED, path / "tokenizer.json")
    return path


@pytest.fixture(scope="session")
def large(large_directory) -> LocalTransformersLM:
    return LocalTransformersLM(large_directory, torch.device("cpu"))


def tuned_model(vocab_size: int):
    """A LoRA model as a run makes it: A frozen, B trainable, B not zero."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # PEFT 0.21 reads a name that Transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(make_llama(2, vocab_size=vocab_size), config).eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return model


@pytest.fixture
def pair() -> AdapterPair:
    """600 small classes, the last but one unknown; the small model's output layer is padded to 608."""
    table = np.random.default_rng(0).permutation(49_152)[:600]
    table[598] = -1
    return AdapterPair(tuned_model(608), TokenMap(table, 49_152))


def byte_tokenizer(merges: int = 40, *, skip: int = 0) -> Tokenizer:
    """A byte-level BPE tokenizer of 256 bytes, some merges of two letters and two control tokens.

    `skip` leaves out the first merges: another vocabulary of the same family.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "etaoin" for b in "Ġrstlhdu"][skip : skip + merges]
    vocab = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., Tokenizer]:
    return byte_tokenizer


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class ApiServer:
    """A real HTTP server on 127.0.0.1 that speaks llama.cpp's API or a dialect of OpenAI's, over a made-up model.

    `faults` are taken one per completion request, before it is answered: functions of the handler that return True
    where they have answered themselves. `spoil` changes the entries `[(id, logprob), ...]` of each position.
    """

    def __init__(self, tokenizer: Tokenizer, dialect: str) -> None:
        self.tokenizer = tokenizer
        self.dialect = dialect
        self.size = tokenizer.get_vocab_size()
        self.context = 64
        self.largest_top_k = self.size
        self.echo = True
        self.has_logprobs = True
        self.faults: deque[Callable[[BaseHTTPRequestHandler], bool | None]] = deque()
        self.spoil: Callable[[list[tuple[int, float]]], list[tuple[int, float]]] = lambda entries: entries
        self.requests: list[Request] = []
        self.connections = 0
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                super().setup()
                api.connections += 1

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                api.requests.append(Request(self.path, dict(self.headers), {}))
                self.answer(api.describe(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                api.requests.append(Request(self.path, dict(self.headers), body))
                if self.path.endswith(("/completion", "/completions")) and api.faults and api.faults.popleft()(self):
                    return
                try:
                    self.answer(api.respond(self.path, body))
                except ValueError as error:
                    self.answer({"error": {"message": str(error)}}, status=400)

            def answer(self, content, *, status=200, headers=()):
                payload = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(404 if content is None else status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that hangs up is part of the tests
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}" + ("" if self.dialect == "llama.cpp" else "/v1")

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def logprobs(self, text: list[int]) -> np.ndarray:
        """What the model says after a text: float64 `[V]`."""
        logits = np.random.default_rng([len(text), *text]).normal(scale=3.0, size=self.size)
        return logits - np.logaddexp.reduce(logits)

    def top(self, text: list[int], count: int) -> list[tuple[int, float]]:
        values = self.logprobs(text)
        order = np.argsort(-values)[:count]
        return self.spoil([(int(token), float(values[token])) for token in order])

    def text_of(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def describe(self, path: str):
        if path == "/props":
            return {"default_generation_settings": {"n_ctx": self.context}, "chat_template": "{{ messages }}"}
        if path == "/v1/models" and self.dialect == "llama.cpp":
            return {"data": [{"id": "tiny.gguf", "owned_by": "llamacpp", "meta": {"n_vocab": self.size}}]}
        if path == "/v1/models":
            owner = self.dialect if self.dialect != "other" else "someone"
            model = {"id": "tiny", "owned_by": owner}
            extra = {"vllm": {"max_model_len": self.context}, "llamacpp": {"meta": {"n_ctx": self.context}}}
            return {"data": [model | extra.get(self.dialect, {})]}
        return None

    def respond(self, path: str, body: dict[str, Any]):
        if path == "/tokenize" and self.dialect != "other":
            text = body.get("content", body.get("prompt"))
            tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
            tokenizer.encode_special_tokens = not body.get("parse_special", True)
            return {"tokens": tokenizer.encode(text, add_special_tokens=False).ids}
        if path == "/detokenize":
            return {"content": self.tokenizer.decode(body["tokens"], skip_special_tokens=False)}
        if path == "/completion":
            texts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            answers = [self._llama_cpp(index, text, body) for index, text in enumerate(texts)]
            return answers if isinstance(body["prompt"][0], list) else answers[0]
        if path == "/v1/completions":
            return self._openai(body)
        return None

    def _llama_cpp(self, index: int, text: list[int], body: dict[str, Any]):
        if len(text) > self.context:
            raise ValueError("request exceeds the available context size")
        values = self.logprobs(text)
        for token, offset in body.get("logit_bias", []):
            values[token] += offset
        answer = {"index": index, "tokens_evaluated": len(text), "truncated": False, "tokens": [int(values.argmax())]}
        if count := body.get("n_probs"):
            entries = [{"id": token, "logprob": value, "token": "?"} for token, value in self.top(text, count)]
            answer["completion_probabilities"] = [{"id": int(values.argmax()), "top_logprobs": entries}]
        return answer

    def _openai(self, body: dict[str, Any]):
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        texts = prompt if isinstance(prompt[0], list) else [prompt]
        asked = body.get("logprobs")
        if asked is not None and asked > self.largest_top_k:
            raise ValueError(f"logprobs must be at most {self.largest_top_k}")
        if body.get("echo") and not self.echo:
            raise ValueError("echo is not supported")
        choices = [self._choice(index, text, body) for index, text in enumerate(texts)]
        return {"choices": choices, "usage": {"prompt_tokens": sum(map(len, texts))}}

    def _choice(self, index: int, text: list[int], body: dict[str, Any]):
        values = self.logprobs(text)
        for token, offset in body.get("logit_bias", {}).items():
            values[int(token)] += offset
        chosen = int(values.argmax())
        choice: dict[str, Any] = {"index": index, "text": self.text_of(chosen), "logprobs": None}
        asked = body.get("logprobs")
        if asked is None or not self.has_logprobs:
            return choice
        if self.dialect == "llamacpp":
            entries = [{"id": token, "logprob": value} for token, value in self.top(text, asked)]
            choice["logprobs"] = {"content": [{"id": chosen, "logprob": 0.0, "top_logprobs": entries}]}
            return choice

        def name(token: int) -> str:
            return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self.text_of(token)

        def place(prefix: list[int]) -> dict[str, float]:
            return {name(token): value for token, value in self.top(prefix, asked)}

        tokens, scores, tops = [name(chosen)], [float(values[chosen])], [place(text)]
        if body.get("echo"):
            tokens = [name(token) for token in text] + tokens
            own = [float(self.logprobs(text[:end])[text[end]]) for end in range(1, len(text))]
            scores = [None, *own, *scores]
            # As OpenAI does, the text's own token is added to the most likely ones.
            inner = [place(text[:end]) | {name(text[end]): own[end - 1]} for end in range(1, len(text))]
            tops = [None, *inner, *tops]
        choice["logprobs"] = {"tokens": tokens, "token_logprobs": scores, "top_logprobs": tops}
        if (count := body.get("prompt_logprobs")) is not None:
            choice["prompt_logprobs"] = [None]
            for end in range(1, len(text)):
                entries = dict(self.top(text[:end], count)) | {text[end]: float(self.logprobs(text[:end])[text[end]])}
                choice["prompt_logprobs"].append({str(t): {"logprob": lp, "rank": 1} for t, lp in entries.items()})
        return choice


@pytest.fixture
def api_server() -> Iterator[Callable[..., ApiServer]]:
    """Starts servers: `api_server("vllm")`; stopped after the test."""
    running: list[ApiServer] = []

    def start(dialect: str, tokenizer: Tokenizer | None = None) -> ApiServer:
        running.append(ApiServer(tokenizer or byte_tokenizer(), dialect))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def impatient() -> TransportSettings:
    """Retries at once and gives up soon."""
    return TransportSettings(
        connect_timeout_s=2, read_timeout_s=0.7, total_timeout_s=1.0, attempts=2, first_backoff_s=0.01, longest_wait_s=2
    )


@pytest.fixture
def connect(impatient) -> Iterator[Callable[..., Any]]:
    """Connects to a server with the tokenizer it should have; closed after the test."""
    transports: list[HttpTransport] = []

    def start(server: ApiServer, *, tokenizer: Tokenizer | None = None, key=None, settings=None, **options):
        spec = f"llama.cpp:{server.url}" if server.dialect == "llama.cpp" else f"openai:{server.url}"
        backend = tokenizer or byte_tokenizer()
        vocabulary = Vocabulary.from_tokenizer(backend)
        transports.append(HttpTransport(Endpoint.parse(spec), settings or impatient, key=key))
        text_tokenizer = TextTokenizer(backend, separator_id=vocabulary.separator_id)
        if server.dialect == "llama.cpp":
            return LlamaCppSource.connect(transports[-1], vocabulary, text_tokenizer)
        options.setdefault("context_length", 64)
        return OpenAISource.connect(transports[-1], vocabulary, text_tokenizer, **options)

    yield start
    for transport in transports:
        transport.close()


@pytest.fixture
def other_tokenizer() -> Tokenizer:
    """As many tokens, other merges."""
    return byte_tokenizer(skip=8)


@pytest.fixture
def tuned_small() -> Callable[[int], Any]:
    """Makes a small LM with a changed adapter, of so many output columns."""
    return tuned_model


_LLAMA_SERVER = """
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = int(sys.argv[2])
parameters.n_parallel = 1
# One thread: beside a busy process the spinning barriers of two fall to a token in seconds.
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.hostnames = ["127.0.0.1"]
parameters.port = 0
# Float32 throughout: the cache would be float16, and so is what the kernel of flash attention sums in.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
parameters.warmup = False
server = xllamacpp.Server(parameters)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def llama_server() -> Iterator[Callable[..., str]]:
    """Starts llama.cpp's own server on a GGUF file, in a process of its own; yields its address. Stopped by its id."""
    running: list[subprocess.Popen[str]] = []

    def start(gguf: Path, *, context: int) -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", _LLAMA_SERVER, str(gguf), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        running.append(process)
        for line in process.stdout:
            if line.startswith("listening "):
                return line.split()[1]
        raise RuntimeError(f"llama.cpp's server ended with {process.wait()}")

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=20)
        process.stdin.close()
        process.stdout.close()


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, *, pre: str) -> None:
    """A float32 GGUF of a Transformers Llama and a byte-level tokenizer."""
    config, weights = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    described = json.loads(tokenizer.to_str())
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {token["content"] for token in described["added_tokens"]}
    tokens = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    padding = [f"[PAD{index}]" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + padding)
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * len(padding)])
    writer.add_token_merges(
        [" ".join(pair) if isinstance(pair, list) else pair for pair in described["model"]["merges"]]
    )
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_eos_token_id(ids["<|im_end|>"])

    def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
        """Rotary halves as llama.cpp's pairs."""
        rows, columns = value.shape
        return value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        query, key = weights[f"{ours}.self_attn.q_proj.weight"], weights[f"{ours}.self_attn.k_proj.weight"]
        writer.add_tensor(f"{theirs}.attn_q.weight", interleaved(query, config.num_attention_heads))
        writer.add_tensor(f"{theirs}.attn_k.weight", interleaved(key, config.num_key_value_heads))
        for name, place in (
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            writer.add_tensor(f"{theirs}.{name}.weight", weights[f"{ours}.{place}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> tuple[Path, Path]:
    """One random model over the small byte tokenizer, its output layer padded, as GGUF and as a Transformers folder."""
    folder = tmp_path_factory.mktemp("tiny-gguf")
    tokenizer = byte_tokenizer()
    model = make_llama(7, vocab_size=tokenizer.get_vocab_size() + 6, max_position_embeddings=128)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_gguf(folder / "tiny.gguf", model, tokenizer, pre="gpt-2")
    return folder / "tiny.gguf", folder


@pytest.fixture
def gguf_writer() -> Callable[..., None]:
    return write_gguf

"""Turn a quantised GGUF file into a folder in Transformers format, float32."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpt_secure.errors import ModelError
from fedpt_secure.progress import Progress, Task


def convert_gguf(gguf: Path, directory: Path, progress: Progress) -> None:
    """Read a Llama-type GGUF, write `config.json`, `model.safetensors` (float32) and the tokenizer.

    Float32 because dequantised values, a float16 scale times a small number plus a float16 offset, fit neither
    float16 nor bfloat16 exactly. Takes about 15 s and 1.2 GB of memory for SmolLM2-135M.

    Args:
        gguf: the file; its values are only as trusted as the file is.
        directory: created; on an error the caller removes it.
        progress: shows the tensors as they are read.

    Raises:
        ModelError: the file cannot be read as a Llama-type model.
        OSError, safetensors.SafetensorError: the disk is full or not writable.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, name = str(gguf.parent), gguf.name
    with progress.task("convert weights", None, unit="tensors") as task, _quiet(task):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        except Exception as error:  # transformers and gguf raise what their parsers happen to raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{gguf} cannot be read as GGUF: {reason}", hint="fetch it again, or use --large PATH"
            ) from error
        # A model loaded from GGUF remembers its quantisation and refuses to be saved; a fresh one with the same
        # values does not.
        config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        fresh = LlamaForCausalLM(LlamaConfig(**config))
        fresh.load_state_dict(model.state_dict())
        directory.mkdir(parents=True)
        fresh.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def _quiet(task: Task) -> Iterator[None]:
    """Inside the block Transformers writes nothing to the terminal; its GGUF reader's bar advances `task` instead."""
    from transformers.utils import logging as transformers_logging

    # The reader takes its bar straight from tqdm, past the library's own switch.
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    def counted(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        for item in items:
            yield item
            task.advance()

    verbosity = transformers_logging.get_verbosity()
    bars_shown = transformers_logging.is_progress_bar_enabled()
    reader_bar = reader.tqdm
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    reader.tqdm = counted
    try:
        yield
    finally:
        reader.tqdm = reader_bar
        transformers_logging.set_verbosity(verbosity)
        if bars_shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

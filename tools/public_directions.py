"""Measure the public directions that ship with the built-in proxy, for LoRA's frozen A matrices.

    python tools/public_directions.py

Reads the proxy and `public_text.txt` in `fedpt_secure/lm/builtin`, writes `directions.safetensors` beside them and puts
its hash into `manifest.json`. Run it after every export of the proxy.
"""

from __future__ import annotations

import hashlib
import json

from tokenizers import Tokenizer

from fedpt_secure.lm.base import builtin_directory, load_builtin_weights
from fedpt_secure.lm.directions import FILE, Directions, principal_directions
from fedpt_secure.lm.part import layer_of
from fedpt_secure.lm.vocabulary import Vocabulary

MODULES = ("q_proj", "o_proj", "gate_proj", "down_proj")
"""One of those that read the same input (`Directions`)."""
COUNT = 32
DEEP_COUNT, DEEP_LAYERS = 128, 3
"""Of the last layers, for runs with little noise: there a wide adapter on several layers learns more (docs/LOG.md)."""
WIDEST = {"down_proj": 512}
"""Of the last layer."""
PASSAGES = 400
CONTEXT = 128


def main() -> None:
    directory = builtin_directory()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    model, token_map = load_builtin_weights(directory, vocabulary)
    passages = (directory / "public_text.txt").read_text(encoding="utf-8").split("\n%%\n")[:PASSAGES]
    sequences = [
        token_map.to_small([vocabulary.separator_id, *tokenizer.encode(passage.strip()).ids][:CONTEXT])
        for passage in passages
        if passage.strip()
    ]
    directions = principal_directions(model, sequences, modules=MODULES, count=max(COUNT, *WIDEST.values()))
    last = model.config.num_hidden_layers - 1
    kept = {}
    for layer in directions.rows:
        index, module = layer_of(f".{layer}"), layer.rsplit(".", 1)[-1]
        if index is None:
            raise ValueError(f"{layer} is in no layer")
        deep = DEEP_COUNT if index > last - DEEP_LAYERS else COUNT
        kept[layer] = WIDEST.get(module, deep) if index == last else deep
    directions = Directions(
        {layer: directions.rows[layer][:count] for layer, count in kept.items()},
        {layer: directions.energies[layer][:count] for layer, count in kept.items()},
    )
    directions.save(directory / FILE)
    manifest_path = directory / "manifest.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    manifest["files"][FILE] = hashlib.sha256((directory / FILE).read_bytes()).hexdigest()
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for layer, rows in directions.rows.items():
        print(f"{layer}: {len(rows)} directions")


if __name__ == "__main__":
    main()

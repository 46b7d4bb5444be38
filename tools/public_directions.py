"""Measure the public directions that ship with the built-in proxy, for LoRA's frozen A matrices.

    python tools/public_directions.py

Reads the proxy and `public_text.txt` in `fedpt_secure/lm/builtin`, writes `directions.safetensors` beside them and puts
its hash into `manifest.json`. Run it after every export of the proxy.
"""

from __future__ import annotations

import hashlib
import json

from tokenizers import Tokenizer

from fedpt_secure.lm.directions import FILE, Directions, principal_directions
from fedpt_secure.lm.small import builtin_directory, load_builtin_weights
from fedpt_secure.lm.vocabulary import Vocabulary

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COUNT = 32
WIDE_COUNTS = {"down_proj": 512}
"""Of the last layer, which runs train: with little noise a wide adapter learns more (docs/LOG.md)."""
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
    directions = principal_directions(model, sequences, modules=MODULES, count=max(COUNT, *WIDE_COUNTS.values()))
    last = f"layers.{model.config.num_hidden_layers - 1}."
    kept = {
        layer: WIDE_COUNTS.get(layer.rsplit(".", 1)[-1], COUNT) if last in layer else COUNT for layer in directions.rows
    }
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

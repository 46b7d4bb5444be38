"""What a federation leaves on the server's disk, and in everybody's logs, holds no key and no word of a record."""

from __future__ import annotations

import json
from pathlib import Path

from fedpt_secure.crypto.key_agreement import KeyPair

# Words of no other file, so that finding one is finding a record.
PLANTED = ["zyxglobin", "quorvexil", "mnestrophy", "brindlewort"]


def _remembering(path: Path):
    """The client's process writes down, outside the federation, every round key it makes."""
    original = KeyPair.generate.__func__

    def generate(cls, random_bytes):
        pair = original(cls, random_bytes)
        with path.open("a") as stream:
            stream.write(bytes(pair.private).hex() + "\n")
        return pair

    KeyPair.generate = classmethod(generate)


def test_no_log_and_no_run_directory_holds_keys_or_text(make_network, tmp_path, clinic_file):
    records = tmp_path / "notes.jsonl"
    lines = [json.loads(line) for line in clinic_file.read_text().splitlines()]
    with records.open("w") as stream:
        for index, line in enumerate(lines):
            line["said"] += " " + PLANTED[index % len(PLANTED)]
            stream.write(json.dumps(line) + "\n")
    network = make_network({"data": {"source": str(records)}, "federation": {"rounds": 2}, "privacy": {"epsilon": 4.0}})
    keys = tmp_path / "keys"
    for name in network.clients:
        network.start_clients(name, before=lambda: _remembering(keys))
    assert network.finish(network.start_server()) == 0
    secrets = [bytes.fromhex(line) for line in keys.read_text().split()]
    assert len(secrets) == 2 * 2 * 8, "two keys a client and round"
    seeds = [bytes.fromhex(json.loads(folder.identity.read_text())["seed"]) for folder in network.clients.values()]
    needles = [form for secret in (*secrets, *seeds) for form in (secret, secret.hex().encode())]
    needles += [word.encode() for word in PLANTED]
    searched = [path for path in network.server.path.rglob("*") if path.is_file()]
    for folder in network.clients.values():
        searched += [folder.log, folder.status, folder.joined, *folder.ledger.iterdir()]
    assert len(searched) > 30
    for path in searched:
        content = path.read_bytes()
        found = [needle for needle in needles if needle in content]
        assert not found, f"{path} holds {found[:3]}"
    # The search finds what is there: the identity's own file, and the records.
    assert seeds[0].hex().encode() in next(iter(network.clients.values())).identity.read_bytes()
    assert PLANTED[0].encode() in records.read_bytes()

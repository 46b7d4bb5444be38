"""The public names of `fedpt_secure.data`, all of them and no others."""

from __future__ import annotations

import fedpt_secure.data


def test_public_names():
    assert sorted(fedpt_secure.data.__all__) == [
        "ARTEFACTS",
        "Artefact",
        "ArtefactStatus",
        "Cache",
        "ClientText",
        "Example",
        "FederatedText",
        "PairTemplate",
        "Preparation",
        "Record",
        "TextTokenizer",
        "encode",
        "load_federated_text",
    ]
    assert all(getattr(fedpt_secure.data, name).__module__.startswith("fedpt_secure.data.") for name in CLASSES)


CLASSES = [name for name in fedpt_secure.data.__all__ if name != "ARTEFACTS"]

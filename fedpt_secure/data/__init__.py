"""Text by client: fetched and verified, split before training, cut to token ids. Knows nothing of models or privacy.

`load_federated_text` turns a `DataConfig` into a `FederatedText`; `Cache` holds what is fetched; `encode` makes
examples.
"""

from fedpt_secure.data.artefacts import ARTEFACTS, Artefact
from fedpt_secure.data.examples import Example, PairTemplate, encode
from fedpt_secure.data.fetch import ArtefactStatus, Cache
from fedpt_secure.data.loading import load_federated_text
from fedpt_secure.data.records import ClientText, FederatedText, Preparation, Record
from fedpt_secure.data.tokenizer import TextTokenizer

__all__ = [
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

"""Federated proxy-tuning of black-box language models, with secure aggregation and differential privacy."""

from fedpt_secure.errors import FedptError

__version__ = "0.1.0"

__all__ = ["FedptError", "__version__"]

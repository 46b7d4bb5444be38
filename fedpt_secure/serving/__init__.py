"""A finished run behind an OpenAI-compatible HTTP interface (docs/serving.md)."""

from fedpt_secure.serving.app import create_app
from fedpt_secure.serving.engine import Engine
from fedpt_secure.serving.keys import ApiKeys, read_keys
from fedpt_secure.serving.run import ServedRun, load_run
from fedpt_secure.serving.server import HttpServer, Listener, serve
from fedpt_secure.serving.settings import ServeSettings, require_key_if_public

__all__ = [
    "ApiKeys",
    "Engine",
    "HttpServer",
    "Listener",
    "ServeSettings",
    "ServedRun",
    "create_app",
    "load_run",
    "read_keys",
    "require_key_if_public",
    "serve",
]

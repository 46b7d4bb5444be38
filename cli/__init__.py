"""The `fedpt-secure` command. Commands parse, call and print; the logic is in the package."""

from fedpt_secure.cli.app import app, main

__all__ = ["app", "main"]

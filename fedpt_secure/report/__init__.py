"""From a finished run to `summary.json` and the tables people read."""

from fedpt_secure.report.summary import SCHEMA, summarise

__all__ = ["SCHEMA", "summarise"]

"""One run: client side, server side, the engine that carries bytes between them, and what a run leaves on disk."""

from fedpt_secure.federation.aggregation import Aggregation, aggregation_of, privacy_document
from fedpt_secure.federation.audit_record import load_planted, load_releases, load_server_view
from fedpt_secure.federation.client import ClientTerms, ClientWorker
from fedpt_secure.federation.continuation import continuations
from fedpt_secure.federation.finished_run import FinishedRun, open_finished
from fedpt_secure.federation.local_engine import run_round
from fedpt_secure.federation.prepared_text import (
    held_out_sample,
    large_examples,
    seeded_sample,
)
from fedpt_secure.federation.run import RunResult, run_training
from fedpt_secure.federation.run_directory import Checkpoint, RunDirectory
from fedpt_secure.federation.server import AggregationServer, RoundAggregate
from fedpt_secure.federation.transcript import PHASES, Transcript

__all__ = [
    "PHASES",
    "Aggregation",
    "AggregationServer",
    "Checkpoint",
    "ClientTerms",
    "ClientWorker",
    "FinishedRun",
    "RoundAggregate",
    "RunDirectory",
    "RunResult",
    "Transcript",
    "aggregation_of",
    "continuations",
    "held_out_sample",
    "large_examples",
    "load_planted",
    "load_releases",
    "load_server_view",
    "open_finished",
    "privacy_document",
    "run_round",
    "run_training",
    "seeded_sample",
]

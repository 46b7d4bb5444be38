"""From a finished run to `summary.json` and the tables people read; what privacy would cost; what ledgers hold."""

from fedpt_secure.report.ledgers import LedgerSummary, change_budget, find_ledgers, summarise_ledger
from fedpt_secure.report.plan import Plan, PlanConfig, PlanRow, plan_privacy
from fedpt_secure.report.plan_figure import check_figure_path, write_figure
from fedpt_secure.report.summary import SCHEMA, summarise

__all__ = [
    "SCHEMA",
    "LedgerSummary",
    "Plan",
    "PlanConfig",
    "PlanRow",
    "change_budget",
    "check_figure_path",
    "find_ledgers",
    "plan_privacy",
    "summarise",
    "summarise_ledger",
    "write_figure",
]

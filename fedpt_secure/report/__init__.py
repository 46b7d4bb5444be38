"""From finished runs to what people read: `summary.json`, reports, comparisons, sweeps; privacy plans; ledgers."""

from fedpt_secure.report.compare import Comparison, compare_runs
from fedpt_secure.report.compose import compose_report
from fedpt_secure.report.device_plan import DeviceCosts, DevicePlan, DevicePlanConfig, plan_device
from fedpt_secure.report.document import Report
from fedpt_secure.report.evaluation import EvaluateConfig, evaluate_run
from fedpt_secure.report.html import render_html
from fedpt_secure.report.ledgers import LedgerSummary, change_budget, find_ledgers, summarise_ledger
from fedpt_secure.report.markdown import render_markdown
from fedpt_secure.report.plan import Plan, PlanConfig, PlanRow, plan_privacy
from fedpt_secure.report.plan_figure import check_figure_path, write_figure
from fedpt_secure.report.quantities import Rate, format_bytes, parse_bytes, parse_rate
from fedpt_secure.report.run_record import RunRecord, find_runs, load_run
from fedpt_secure.report.summary import SCHEMA, summarise
from fedpt_secure.report.sweep import SweepGrid, SweepResult, cells_of, read_sweep, run_sweep
from fedpt_secure.report.write import write_report

__all__ = [
    "SCHEMA",
    "Comparison",
    "DeviceCosts",
    "DevicePlan",
    "DevicePlanConfig",
    "EvaluateConfig",
    "LedgerSummary",
    "Plan",
    "PlanConfig",
    "PlanRow",
    "Rate",
    "Report",
    "RunRecord",
    "SweepGrid",
    "SweepResult",
    "cells_of",
    "change_budget",
    "check_figure_path",
    "compare_runs",
    "compose_report",
    "evaluate_run",
    "find_ledgers",
    "find_runs",
    "format_bytes",
    "load_run",
    "parse_bytes",
    "parse_rate",
    "plan_device",
    "plan_privacy",
    "read_sweep",
    "render_html",
    "render_markdown",
    "run_sweep",
    "summarise",
    "summarise_ledger",
    "write_figure",
    "write_report",
]

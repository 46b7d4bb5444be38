"""Ratios from the measurements, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from dp_training_cases import DEFAULT, NON_PRIVATE, Variant
from dp_training_measure import Seconds
from rich.console import Console
from rich.table import Table

from fedpt_secure.privacy import SmallExample

Results = dict[str, Any]
_BARRED = ("throughput_ratio", "memory_ratio", "max_norm_error")
_HEADINGS = (
    "gradients",
    "tokens/s",
    "ratio",
    "by processor time",
    "to fastest",
    "memory, MB",
    "ratio",
    "working, MB",
    "operations",
    "norm error",
)


def summarise(
    variants: Sequence[Variant],
    examples: Sequence[SmallExample],
    seconds: Seconds,
    memory: dict[str, dict[str, int]] | None,
    errors: dict[str, float | None],
    operations: dict[str, int],
) -> Results:
    """One case's results; those of the default variant at the top level, as the bars are stated for it."""
    tokens = sum(len(example.ids) for example in examples)
    plain = [variant for variant in variants if variant.method == NON_PRIVATE]
    fastest = min(plain, key=lambda variant: np.median([wall for wall, _ in seconds[variant.name]]))
    rows = []
    for variant in variants:
        same = f"{NON_PRIVATE} x{variant.examples_per_pass}"
        rows.append(
            {
                "name": variant.name,
                "method": variant.method,
                "examples_per_pass": variant.examples_per_pass,
                "tokens_per_second": tokens / float(np.median([wall for wall, _ in seconds[variant.name]])),
                "throughput_ratio": _ratio(seconds, same, variant.name, clock=0),
                "throughput_ratio_to_fastest": _ratio(seconds, fastest.name, variant.name, clock=0),
                "processor_time_ratio": _ratio(seconds, same, variant.name, clock=1),
                "memory_bytes": None if memory is None else sum(memory[variant.name].values()),
                "working_memory_bytes": None if memory is None else memory[variant.name]["working"],
                "memory_ratio": None
                if memory is None
                else sum(memory[variant.name].values()) / sum(memory[same].values()),
                "flops_ratio": operations[variant.name] / operations[same],
                "max_norm_error": errors[variant.name],
            }
        )
    default = next(row for row in rows if row["name"] == DEFAULT.name)
    return {**{key: default[key] for key in (*_BARRED, "processor_time_ratio")}, "variants": rows}


def print_table(results: Results, console: Console) -> None:
    """One table a case, with a line on how the default variant stands against the bars."""
    console.print(_conditions(results), markup=False)
    for name, case in _cases(results):
        table = Table(title=_title(name, case), title_justify="left")
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading == _HEADINGS[0] else "right")
        for row in case["variants"]:
            table.add_row(*_cells(row), style="bold" if row["name"] == DEFAULT.name else None)
        console.print(table)
        console.print(_verdict(case), markup=False)


def markdown(results: Results) -> str:
    """The same for documents."""
    lines = [_conditions(results), ""]
    for name, case in _cases(results):
        lines += [f"{_title(name, case)}.", "", f"| {' | '.join(_HEADINGS)} |", f"| --- |{' ---: |' * 9}"]
        for row in case["variants"]:
            cells = _cells(row)
            cells[0] = f"**{cells[0]}**" if row["name"] == DEFAULT.name else cells[0]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", _verdict(case), ""]
    return "\n".join(lines).rstrip()


def _ratio(seconds: Seconds, reference: str, name: str, *, clock: int) -> float:
    pairs = zip(seconds[reference], seconds[name], strict=True)
    return float(np.median([before[clock] / after[clock] for before, after in pairs]))


def _cases(results: Results) -> list[tuple[str, Results]]:
    return [(name, case) for name, case in results.items() if name != "conditions"]


def _conditions(results: Results) -> str:
    facts = results["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"Device {facts['device']}, processor {facts['processor']}, {facts['cores']} cores, {facts['threads']} "
        f"thread(s), load average at the start {facts['load_average']:.1f}; {versions}."
    )


def _title(name: str, case: Results) -> str:
    return (
        f"{name}: {case['model']}, {case['trained_parameters']:,} trained parameters, {case['examples']} examples with "
        f"{case['tokens']:,} tokens, {case['repetitions']} repetitions"
    )


def _cells(row: Results) -> list[str]:
    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[key] is None else format(row[key] * scale, form)

    return [
        row["name"],
        number("tokens_per_second", ",.0f"),
        number("throughput_ratio", ".2f"),
        number("processor_time_ratio", ".2f"),
        number("throughput_ratio_to_fastest", ".2f"),
        number("memory_bytes", ",.0f", 1e-6),
        number("memory_ratio", ".2f"),
        number("working_memory_bytes", ",.0f", 1e-6),
        number("flops_ratio", ".3f"),
        number("max_norm_error", ".1e"),
    ]


def _verdict(case: Results) -> str:
    memory = "not measured" if case["memory_ratio"] is None else f"{case['memory_ratio']:.2f} (bar: at most 1.2)"
    shapes = case["rounding"]
    return (
        f"Default ({DEFAULT.name}): throughput {case['throughput_ratio']:.2f} of non-private (bar: at least 0.9; "
        f"{case['processor_time_ratio']:.2f} by processor time), memory {memory}, norm error "
        f"{case['max_norm_error']:.1e} (bar: at most 1e-5). An example's gradient moves by {shapes['float32']:.1e} of "
        f"its norm in float32 and {shapes['bfloat16']:.1e} in bfloat16 when others share its pass."
    )

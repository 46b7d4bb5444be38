"""What per-example clipping costs: tokens per second and peak memory against non-private training, and exactness.

    python benchmarks/dp_training.py --large PATH         # the table; about 15 minutes on one core
    python benchmarks/dp_training.py --quick              # under a minute: the default adapter alone
    python benchmarks/dp_training.py --savings            # what precision, kept activations and sampling save
    python benchmarks/dp_training.py --json > dp.json     # --from dp.json prints it again, also as --markdown

Every variant sums the gradients of the same examples for the same trained parameters; "x8" means 8 examples per pass.
Non-private training is plain autograd; each private variant is compared with it at the same number of examples per
pass ("ratio", by the clock and by processor time, which other load on the machine disturbs less) and with the fastest
non-private one ("to fastest"). Times are interleaved, all variants in each repetition, and a ratio is the median over
repetitions. The limit is non-private training itself: its forward pass and the backward pass down to the lowest trained
layer ("operations": floating-point operations over its). Memory is the model and what a step needs beyond it
("working") at its peak.

The large model is a folder in Transformers format, or anything else that `fedpt-secure train --large` takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from dp_training_cases import CASES, Case, Variant, build, make_examples, variants
from dp_training_measure import conditions, flops, memory_in_a_fresh_process, norm_errors, peak_memory, rounding, times
from dp_training_report import Results, markdown, print_table, summarise
from dp_training_savings import measure_heads, measure_savings, savings_markdown, shortened
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedpt_secure.data.fetch import Cache
from fedpt_secure.errors import FedptError
from fedpt_secure.lm.devices import resolve_device
from fedpt_secure.lm.large_weights import resolve_large

_QUICK = {"examples": 8, "repetitions": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read measurements, and show them; the exit code."""
    options = _parse(arguments)
    console = Console(stderr=True)
    if options.memory_of:
        case, chosen = json.loads(options.memory_of)
        print(json.dumps(peak_memory(Case(**case), [Variant(**variant) for variant in chosen])))
        return 0
    if options.savings:
        results = savings(options, console)
        print(json.dumps(results, indent=2) if options.json else savings_markdown(results))
        return 0
    try:
        results = json.loads(options.read.read_text()) if options.read else measure(options, console)
    except FedptError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    if options.json:
        print(json.dumps(results, indent=2))
    elif options.markdown:
        print(markdown(results))
    else:
        print_table(results, Console(width=max(Console().width, 140)))
    return 0


def savings(options: argparse.Namespace, console: Console) -> Results:
    """The cases of the built-in model, with each saving, and heads of two vocabularies."""
    chosen = [
        shortened(
            replace(case, threads=options.threads, longest=options.longest), options.examples, options.repetitions
        )
        for case in CASES
        if case.model != "large" and case.name in (options.cases or [case.name])
    ]
    results: Results = {"conditions": conditions("cpu", options.threads), "savings": []}
    torch.set_num_threads(options.threads)
    results["heads"] = measure_heads(positions=options.longest, width=576, repetitions=chosen[0].repetitions)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        for case in chosen:
            task = progress.add_task(case.name, total=case.repetitions)
            results["savings"].append(measure_savings(case, lambda task=task: progress.advance(task)))
    return results


def measure(options: argparse.Namespace, console: Console) -> Results:
    """All cases, one after the other, as the JSON that the benchmark prints.

    Raises:
        FedptError: a model cannot be loaded, or the device is not there.
    """
    device = str(resolve_device(options.device))
    chosen = variants(options.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: Results = {"conditions": conditions(device, options.threads)}
    with Progress(*columns, console=console) as progress:
        for case in _cases(options, device):
            task = progress.add_task(f"{case.name}: memory", total=2 + case.repetitions)
            memory = memory_in_a_fresh_process(case, chosen)
            progress.update(task, advance=1, description=f"{case.name}: exactness")
            small = build(case)
            examples = make_examples(case, small)
            errors = norm_errors(small, examples, chosen)
            operations = flops(small, examples[:4], chosen)
            shapes = rounding(small, examples, options.batch)
            progress.update(task, advance=1, description=f"{case.name}: speed")
            seconds = times(small, examples, chosen, case.repetitions, lambda task=task: progress.advance(task))
            results[case.name] = {
                "model": case.model,
                "lora": asdict(case)["lora"],
                "trained_parameters": small.dimension,
                "examples": len(examples),
                "tokens": sum(len(example.ids) for example in examples),
                "repetitions": case.repetitions,
                **summarise(chosen, examples, seconds, memory, errors, operations),
                "rounding": shapes,
            }
            del small
    return results


def _cases(options: argparse.Namespace, device: str) -> list[Case]:
    cases = []
    for case in CASES:
        if case.name not in (options.cases or (["default"] if options.quick else [case.name])):
            continue
        if case.model == "large":
            if options.large is None:
                continue
            weights = resolve_large(options.large, cache=Cache(options.cache))
            case = replace(case, path=str(weights.path), model=weights.source)
        changes = dict(_QUICK) if options.quick else {}
        changes |= {"examples": options.examples} if options.examples else {}
        changes |= {"repetitions": options.repetitions} if options.repetitions else {}
        cases.append(replace(case, device=device, threads=options.threads, longest=options.longest, **changes))
    return cases


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", help="also measure this large model (SmolLM2-135M: smollm2, or its folder)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--examples", type=int, help="examples a repetition")
    parser.add_argument("--repetitions", type=int, help="times that each variant is timed")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest example (default 128)")
    parser.add_argument("--batch", type=int, default=8, help="examples in a shared pass (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default 1, as a client has)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--cache", type=Path, help="where --large smollm2 keeps its weights")
    parser.add_argument(
        "--savings", action="store_true", help="what each way to save work saves, and what a head costs"
    )
    parser.add_argument("--quick", action="store_true", help="the default case alone, few examples")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true")
    output.add_argument("--markdown", action="store_true")
    parser.add_argument("--from", dest="read", type=Path, help="show these results instead of measuring")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())

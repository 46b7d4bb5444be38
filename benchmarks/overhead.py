"""What a client pays: FedPT with two proxies, federated LoRA of the large model, full tuning of the large model.

    python benchmarks/overhead.py                                   # table; about 2 minutes of one quiet core
    python benchmarks/overhead.py --json > overhead.json
    python benchmarks/overhead.py --from overhead.json --plot docs/figures/overhead.svg --markdown
    python benchmarks/overhead.py --cost-model fedpt_secure/report/device_costs.json    # what `fedpt-secure plan` reads

Each arm is measured in a process of its own: operations (`torch.utils.flop_counter`: matrix products and attention),
processor and wall seconds of one thread, peak memory. Bytes are computed by the protocol's own encoders. A record has
128 tokens, all judged; a round of a client has 32 records and one step. Weights of the mid-size proxy and of the large
model are random: for costs they do not matter.

A whole run takes `--rounds`. For the direct arms 1 is a lower bound: no training takes fewer. PROJECTIONS for published
pairs are computed from their configurations and marked so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from overhead_arms import ARMS, CANDIDATES, CONTEXT, Arm, measure, payload
from overhead_projections import projections
from overhead_report import markdown, print_tables, write_plot

SCHEMA = "fedpt-secure/overhead/1"
COSTS_SCHEMA = "fedpt-secure/device-costs/1"
ROUNDS = {"fedpt_builtin": 4, "fedpt_midsize": 4, "lora_large": 1, "full_large": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plot", type=Path, help=".svg or .png")
    parser.add_argument("--from", dest="source", type=Path, help="results of an earlier --json instead of measuring")
    parser.add_argument("--cost-model", type=Path, help="measure the configurations of `fedpt-secure plan`, write them")
    parser.add_argument("--cohort", type=int, default=26)
    parser.add_argument("--records", type=int, default=32, help="of a client in a round")
    parser.add_argument("--rounds", default="", help="of a whole run, such as lora_large=2,full_large=2")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is not None:
        print(json.dumps(measure(next(arm for arm in (*ARMS, *CANDIDATES) if arm.name == options.arm))))
        return
    if options.cost_model is not None:
        write_costs(options.cost_model)
        return
    results = json.loads(options.source.read_text()) if options.source else run(options)
    if options.plot is not None:
        write_plot(results, options.plot)
    if options.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    elif options.markdown:
        print(markdown(results))
    else:
        print_tables(results)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all arms; per record, per client and round, and for a whole run."""
    rounds = ROUNDS | {
        name: int(count) for name, _, count in (e.partition("=") for e in options.rounds.split(",") if e)
    }
    arms = []
    for arm in ARMS:
        print(f"measuring {arm.name}", file=sys.stderr)
        found = in_a_fresh_process(arm)
        size = payload(found["trained_parameters"], cohort=options.cohort)
        a_round = {
            "flops": found["flops_per_record"] * options.records,
            "seconds": found["seconds_per_record"] * options.records,
            "wall_seconds": found["wall_seconds_per_record"] * options.records,
            "process_bytes": found["process_bytes"],
            "private_bytes": found["private_bytes"],
            "bytes_up": size["up"],
            "bytes_down": size["down"],
            "secure_aggregation_bytes": size["secure_aggregation"],
        }
        count = rounds[arm.name]
        summed = ("flops", "seconds", "bytes_up", "bytes_down")
        whole = {"rounds": count} | {name: a_round[name] * count for name in summed}
        arms.append(found | {"client_round": a_round, "whole_run": whole})
    return {
        "schema": SCHEMA,
        "conditions": conditions() | {"context": CONTEXT, "records": options.records, "cohort": options.cohort},
        "arms": arms,
        "projections": projections(tokens=CONTEXT, records=options.records),
    }


def write_costs(path: Path) -> None:
    """The committed costs that `fedpt-secure plan` reads."""
    entries = []
    for arm in CANDIDATES:
        print(f"measuring {arm.name}", file=sys.stderr)
        found = in_a_fresh_process(arm)
        entries.append(
            {
                "rank": (arm.lora or {})["rank"],
                "layers": (arm.lora or {})["layers"],
                "sampled_positions": arm.positions,
                "training_dtype": arm.dtype,
                "trained_parameters": found["trained_parameters"],
                "private_bytes": found["private_bytes"],
                "resident_bytes": found["process_bytes"],
                "seconds_per_record": round(found["seconds_per_record"], 5),
                "flops_per_record": found["flops_per_record"],
            }
        )
    content = {
        "schema": COSTS_SCHEMA,
        "command": f"python benchmarks/overhead.py --cost-model {path}",
        "conditions": conditions() | {"context": CONTEXT, "proxy": "builtin"},
        "configurations": entries,
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def in_a_fresh_process(arm: Arm) -> dict[str, Any]:
    """`measure`, where nothing else has been allocated yet."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--arm", arm.name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def conditions() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return {
        "processor": next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"
        ),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


if __name__ == "__main__":
    main()

"""Run targets under atheris, one after the other.

python -m fuzz all --seconds 600
python -m fuzz context roster --seconds 60 --json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fuzz.replay import CORPUS, file_name
from fuzz.target import MEGABYTES
from fuzz.targets import TARGETS

_STATUS = re.compile(r"#(\d+)\s.*cov: (\d+) ft: (\d+) corp: (\d+)")
_STALLED_SECONDS = 10
"""Wall time after which libFuzzer gives an input up. A slow one is found by its processor time (`atheris_target`)."""


@dataclass(slots=True)
class Outcome:
    """What a target went through.

    Attributes:
        edges, features: libFuzzer's coverage of `fedpt_secure.crypto` and `fedpt_secure.config`.
        finding: the file that holds the input, and beside it `log.txt`; empty if there is none.
    """

    target: str
    executions: int = 0
    edges: int = 0
    features: int = 0
    corpus: int = 0
    peak_megabytes: int = 0
    seconds: float = 0.0
    finding: str = ""


def fuzz(name: str, *, seconds: int, work: Path, place: str) -> Outcome:
    """Run one target in a process of its own for about `seconds`; what it learns stays in `work`."""
    found, folder = work / name / "found", work / name / "corpus"
    for directory in (found, folder):
        directory.mkdir(parents=True, exist_ok=True)
    for seed in TARGETS[name].seeds():
        (folder / file_name(seed)).write_bytes(seed)
    before = set(found.iterdir())
    outcome, started, shown = Outcome(name), time.monotonic(), 0.0
    command = [sys.executable, "-m", "fuzz.atheris_target", name, f"-max_total_time={seconds}", "-print_final_stats=1"]
    command += [f"-timeout={_STALLED_SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-artifact_prefix={found}/"]
    command += [str(folder), *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])]
    # libFuzzer ends the process without cleaning up; what it leaves is in a place of ours.
    scratch = tempfile.TemporaryDirectory(prefix="fedpt-fuzz-")
    environment = os.environ | {"TMPDIR": scratch.name}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    with open(work / name / "log.txt", "w") as log:
        for line in process.stdout or ():
            log.write(line)
            if status := _STATUS.match(line):
                outcome.executions, outcome.edges, outcome.features, outcome.corpus = map(int, status.groups())
            if line.startswith("stat::peak_rss_mb"):
                outcome.peak_megabytes = int(line.split()[-1])
            if sys.stderr.isatty() and time.monotonic() - shown > 1:
                shown = time.monotonic()
                done = f"{outcome.executions:,} inputs, {outcome.edges} edges, {shown - started:.0f}/{seconds} s"
                print(f"\r{place} {name}: {done}   ", end="", file=sys.stderr, flush=True)
    failed = process.wait()
    scratch.cleanup()
    outcome.seconds = round(time.monotonic() - started, 1)
    if failed:
        outcome.finding = str(max(set(found.iterdir()) - before, default=work / name / "log.txt"))
    found_what = f"FINDING {outcome.finding}" if outcome.finding else "nothing found"
    print(f"\r{place} {name}: {outcome.executions:,} inputs, {found_what}{' ' * 20}", file=sys.stderr, flush=True)
    return outcome


def main() -> int:
    """Zero if nothing was found, else one."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", metavar="TARGET", choices=["all", *TARGETS], help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together, split evenly")
    parser.add_argument("--work", type=Path, default=Path("build/fuzz"), help="found inputs and grown corpora")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = list(TARGETS) if "all" in arguments.targets else arguments.targets
    share = max(arguments.seconds // len(names), 1)
    outcomes = [
        fuzz(name, seconds=share, work=arguments.work, place=f"[{number}/{len(names)}]")
        for number, name in enumerate(names, 1)
    ]
    if arguments.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        print(f"| {'target':17} | {'inputs':>12} | edges | features | corpus | peak MB | finding |")
        for each in outcomes:
            print(
                f"| {each.target:17} | {each.executions:12,} | {each.edges:5} | {each.features:8} | {each.corpus:6} | "
                f"{each.peak_megabytes:7} | {each.finding or 'none'} |"
            )
    return int(any(outcome.finding for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

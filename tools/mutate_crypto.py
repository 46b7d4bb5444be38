"""Take the checks of `crypto/` out one at a time and see whether the tests notice.

    python tools/mutate_crypto.py                     # all modules, about half an hour on one core
    python tools/mutate_crypto.py client directory    # some
    python tools/mutate_crypto.py --list policy       # what would be changed, without running anything

Each mutant is one small change of one file, in a copy of what is committed:

    check       `if condition:` that raises, or notes a problem, never does
    boundary    a comparison in such a condition takes or leaves the equal case
    row         a row of a table of checks is gone
    handler     an exception that was turned into a typed error is swallowed
    call        a call that checks, wipes, records or forgets is gone
    part        one part is missing from what is hashed, derived or signed

A mutant is killed if a test of `tests/crypto` fails. The exit status is 1 if one survives that is not in `EQUIVALENT`,
which lists changes that alter no behaviour, each with the reason.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from threading import Timer

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "client",
    "single_use",
    "server",
    "identities",
    "directory",
    "policy",
    "recovery",
    "key_agreement",
    "sealing",
    "context",
    "messages",
    "masks",
    "neighbours",
    "parameters",
    "prg",
    "shamir",
    "encoding",
    "packing",
    "labels",
    "wiping",
)
LEFT_OUT = (
    "test_ckks",
    "test_fuzz",
    "test_identity_files",
    "test_masked_looks_uniform",
    "test_mutation_tool",
    "test_one_sum",
    "test_parameter_report",
    "test_server_memory",
    "test_stateful",
)
"""Tests that do not count: those of other modules, and those that notice by chance or take long. What only they would
notice is not held."""

LIKELIEST = {
    "client": ["test_attacks.py", "test_single_use.py"],
    "directory": ["test_attacks.py"],
    "masks": ["test_golden_vectors.py", "test_single_use.py"],
    "recovery": ["test_false_shares.py"],
    "server": ["test_single_use.py", "test_round.py", "test_false_shares.py"],
    "wiping": ["test_single_use.py"],
}
"""Tests to try first, where they are not those named after the module."""

SECONDS_A_STAGE = 300

EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("encoding", "boundary", "self.scale > 0"): "no level of at least 1 over a finite bound rounds to zero",
    ("packing", "boundary", "ring_bits < dtype.itemsize * 8"): "an element of a whole word has no bits above the ring",
    (
        "prg",
        "call",
        "encryptor.update_into(_ZEROS, buffer)",
    ): "it is timed to choose between two ways to the same bytes",
    ("prg", "boundary", "start < stop"): "an empty piece of the vector more, to which nothing is added",
}
"""(module, kind, source of what is changed) -> why no test can tell the mutant from the original."""

_CHECKING_CALL = re.compile(
    r"^_?(check|require|verify|wipe|erase|discard|abort|begin|release|clear|add|update|reduce)(_|$)"
)
_SWAPPED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_SYMBOLS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


@dataclass(frozen=True)
class Mutant:
    """One change: characters `start` to `stop` of a module become `replacement`."""

    module: str
    kind: str
    line: int
    original: str
    replacement: str
    start: int
    stop: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.module, self.kind, " ".join(self.original.split())

    def __str__(self) -> str:
        original = " ".join(self.original.split())
        return f"{self.module}.py:{self.line} {self.kind}: {original[:90]!r} -> {self.replacement!r}"


class _Source:
    """A module's text, with the character offsets of its syntax tree's nodes."""

    def __init__(self, folder: Path, module: str) -> None:
        self.module = module
        self.text = (folder / "crypto" / f"{module}.py").read_text()
        self.tree = ast.parse(self.text)
        self._lines = self.text.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def offset(self, line: int, column: int) -> int:
        # Columns of `ast` count UTF-8 bytes.
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def mutant(self, kind: str, node: ast.AST, replacement: str, *, span: tuple[int, int] | None = None) -> Mutant:
        start, stop = span or self.span(node)
        return Mutant(self.module, kind, node.lineno, self.text[start:stop], replacement, start, stop)


def mutants_of(folder: Path, module: str) -> Iterator[Mutant]:
    """Every mutant of one module of the package in `folder`, in the order of the source."""
    source = _Source(folder, module)
    found = [mutant for node in ast.walk(source.tree) for mutant in _mutants_at(source, node)]
    yield from sorted(set(found), key=lambda mutant: (mutant.start, mutant.stop, mutant.kind, mutant.replacement))


def _mutants_at(source: _Source, node: ast.AST) -> Iterator[Mutant]:
    match node:
        case ast.If() if _objects(node.body):
            yield source.mutant("check", node.test, "False")
            yield from _boundaries(source, node.test)
        case ast.For() | ast.comprehension() if isinstance(node.iter, ast.Tuple):
            yield from _without_each_row(source, node.iter)
        case ast.ListComp() | ast.GeneratorExp() if node.generators[-1].ifs:
            for condition in node.generators[-1].ifs:
                yield from _boundaries(source, condition)
        case ast.ExceptHandler() if isinstance(node.body[-1], ast.Raise):
            yield source.mutant("handler", node.body[-1], "pass")
        case ast.Expr(value=ast.Call(func=function)) if _CHECKING_CALL.match(_name(function)):
            yield source.mutant("call", node, "pass")
        case ast.Assign(targets=[ast.Name(id="parts")], value=ast.Tuple() as parts):
            yield from _without_each_row(source, parts, kind="part")
        case ast.Call(func=ast.Name(id="digest"), args=[_, ast.Tuple() as parts]):
            yield from _without_each_row(source, parts, kind="part")


def _objects(body: list[ast.stmt]) -> bool:
    """Whether a branch ends in an error, or adds to a list of problems."""
    match body[-1]:
        case ast.Raise() | ast.Expr(value=ast.Yield()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="problems"), attr="append"))):
            return True
    return False


def _boundaries(source: _Source, condition: ast.expr) -> Iterator[Mutant]:
    for node in ast.walk(condition):
        if not isinstance(node, ast.Compare):
            continue
        operands = [node.left, *node.comparators]
        for position, operator in enumerate(node.ops):
            if type(operator) not in _SWAPPED:
                continue
            start, stop = source.span(operands[position])[1], source.span(operands[position + 1])[0]
            symbol = _SYMBOLS[type(operator)]
            at = source.text.index(symbol, start, stop)
            yield Mutant(
                source.module,
                "boundary",
                node.lineno,
                source.text[source.span(node)[0] : source.span(node)[1]],
                _SWAPPED[type(operator)],
                at,
                at + len(symbol),
            )


def _without_each_row(source: _Source, table: ast.Tuple, *, kind: str = "row") -> Iterator[Mutant]:
    if kind == "row" and not all(isinstance(row, ast.Tuple) for row in table.elts):
        return
    for row in table.elts:
        start, stop = source.span(row)
        comma = re.compile(r"\s*,").match(source.text, stop)
        # Without its comma a last element leaves `(a, )`, which is still a tuple; a single one leaves `()`.
        yield source.mutant(kind, row, "", span=(start, comma.end() if comma else stop))


def _name(function: ast.expr) -> str:
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _copy_of_the_package(folder: Path) -> None:
    """What the last commit holds, so that half-done work in the tree does not matter."""
    paths = (
        "fedpt_secure",
        "crypto",
        "tests/crypto",
        "tests/vectors",
        "docs",
        "tools",
        "SECURITY.md",
        "pyproject.toml",
    )
    archive = folder / "package.tar"
    subprocess.run(["git", "archive", "--output", archive, "HEAD", *paths], cwd=ROOT, check=True)
    with tarfile.open(archive) as contents:
        contents.extractall(folder, filter="tar")
    archive.unlink()


def _test_files(folder: Path, module: str) -> list[list[str]]:
    """The tests that count, in the order of their chance to notice; what is collected for nothing costs most."""
    names = sorted(path.name for path in (folder / "tests" / "crypto").glob("test_*.py"))
    names = [name for name in names if not name.startswith(LEFT_OUT)]
    own = LIKELIEST.get(module, [f"test_{module}.py"])
    near = [name for name in ("test_boundaries.py", "test_golden_vectors.py", "test_attacks.py") if name not in own]
    rest = [name for name in names if name not in own and name not in near]
    stages = ([name for name in stage if name in names] for stage in (own, near, rest))
    return [[f"tests/crypto/{name}" for name in stage] for stage in stages if stage]


_SERVER = """
import importlib, json, os, sys, traceback
for name in ("numpy", "scipy.stats", "hypothesis", "pytest", "msgspec", "nacl.bindings", "nacl.signing",
             "cryptography.hazmat.primitives.ciphers", "cryptography.hazmat.primitives.kdf.hkdf"):
    importlib.import_module(name)
import pytest
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        sys.dont_write_bytecode = not order["first"]
        with open("pytest.log", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            # Hypothesis is loaded already, which is what the warning is about.
            quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
            code = int(pytest.main(["-x", "-q", *quiet, *order["tests"]]))
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the tests in a fork of a process that has the libraries loaded already, which takes most of the time."""


class _Bench:
    """One copy of the package, and a process that runs its tests."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        _copy_of_the_package(folder)
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()

    def passes(self, module: str, *, first: bool = False) -> bool:
        """Whether all tests pass; a hang counts as a failure, since somebody would notice."""
        return all(self._stage_passes(stage, first=first) for stage in _test_files(self.folder, module) if stage)

    def _stage_passes(self, tests: list[str], *, first: bool) -> bool:
        self._server.stdin.write(json.dumps({"tests": tests, "first": first}) + "\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        limit = Timer(SECONDS_A_STAGE, os.kill, (child, signal.SIGKILL))
        limit.start()
        code = int(self._server.stdout.readline())
        limit.cancel()
        if first and code:
            print((self.folder / "pytest.log").read_text()[-4000:])
        return code == 0

    def survives(self, mutant: Mutant) -> bool:
        """Apply a mutant, run the tests, and take it back."""
        path = self.folder / "crypto" / f"{mutant.module}.py"
        text = path.read_text()
        path.write_text(text[: mutant.start] + mutant.replacement + text[mutant.stop :])
        try:
            return self.passes(mutant.module)
        finally:
            path.write_text(text)


def _run(mutants: list[Mutant], benches: list[_Bench]) -> list[Mutant]:
    free: Queue[_Bench] = Queue()
    for bench in benches:
        if not bench.passes(mutants[0].module, first=True):
            raise SystemExit("error: the tests fail, or take too long, without any change")
        free.put(bench)

    def tried(mutant: Mutant) -> bool:
        bench = free.get()
        try:
            return bench.survives(mutant)
        finally:
            free.put(bench)

    survivors = []
    with ThreadPoolExecutor(len(benches)) as pool:
        for number, (mutant, alive) in enumerate(zip(mutants, pool.map(tried, mutants), strict=True), start=1):
            if alive:
                survivors.append(mutant)
                print(f"SURVIVED {mutant}", flush=True)
            if number % 25 == 0:
                print(f"{number} of {len(mutants)}", file=sys.stderr, flush=True)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(MODULES)}; all by default")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--json", type=Path, help="write the survivors and the counts to a file")
    arguments = parser.parse_args()
    chosen = arguments.modules or MODULES
    unknown = set(chosen) - set(MODULES)
    if unknown:
        parser.error(f"no such module: {', '.join(sorted(unknown))}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        benches = [_Bench(Path(scratch) / str(number)) for number in range(arguments.jobs)]
        try:
            mutants = [mutant for module in chosen for mutant in mutants_of(benches[0].folder, module)]
            if arguments.list:
                print(*mutants, sep="\n")
                return 0
            survivors = _run(mutants, benches)
        finally:
            for bench in benches:
                bench.close()
    missed = [mutant for mutant in survivors if mutant.key not in EQUIVALENT]
    score = f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed"
    print(
        f"{score}, {len(survivors) - len(missed)} equivalent, {len(missed)} missed; {time.monotonic() - started:.0f} s"
    )
    if arguments.json:
        report = {"mutants": len(mutants), "survivors": [asdict(mutant) for mutant in survivors]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

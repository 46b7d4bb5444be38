"""The server under load: many clients for a minute, each answer compared with the answer to the same prompt alone.

    python benchmarks/serving.py --run runs/NAME [--clients 32] [--seconds 60] [--tokens 24] [--json]

Starts `fedpt-secure serve` as a process of its own, with OpenAI's client in threads of this one. It fails where an
answer is an error, or is another one than the prompt gets alone. Memory is the server's resident set, read each second.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai

PROMPTS = (
    "hey, how was your",
    "what are you doing",
    "I really like the",
    "my favourite food is",
    "do you have any",
    "the weather today is",
    "I went to the",
    "have you ever been to",
)
COMMAND = "import sys; from fedpt_secure.cli import main; sys.argv[0] = 'fedpt-secure'; main()"


def start(run: Path, arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    server = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", "--run", str(run), "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    lines: queue.Queue[str] = queue.Queue()

    def drain() -> None:
        for line in server.stderr or ():
            lines.put(line)

    threading.Thread(target=drain, daemon=True).start()
    seen = []
    while server.poll() is None:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            continue
        seen.append(line)
        if line.startswith("serving "):
            return server, line.split(" at ")[1].split()[0]
    raise SystemExit("the server did not start:\n" + "".join(seen))


def resident_megabytes(pid: int) -> float:
    """A process's resident set."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the server has ended")


def measure(url: str, pid: int, *, model: str, clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Load a server; the figures."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=300)
    name = f"{client.models.list().data[0].id}{model}"
    prompts = [f"{PROMPTS[index % len(PROMPTS)]} {index // len(PROMPTS) or ''}".rstrip() for index in range(clients)]

    def ask(prompt: str, *, stream: bool = False) -> tuple[str, int]:
        wanted: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
        if stream:
            options = {"include_usage": True}
            text, count = "", 0
            for chunk in client.completions.create(**wanted, stream=True, stream_options=options):
                text += "".join(choice.text for choice in chunk.choices)
                count = chunk.usage.completion_tokens if chunk.usage else count
            return text, count
        answer = client.completions.create(**wanted)
        return answer.choices[0].text, answer.usage.completion_tokens

    began = time.monotonic()
    alone = [ask(prompt) for prompt in prompts]
    alone_rate = sum(count for _, count in alone) / (time.monotonic() - began)
    latencies: list[float] = []
    produced: list[int] = []
    wrong: list[dict[str, str]] = []
    errors: list[str] = []
    end = time.monotonic() + seconds

    def visitor(index: int) -> None:
        number = 0
        while time.monotonic() < end:
            asked = time.monotonic()
            try:
                text, count = ask(prompts[index], stream=number % 2 == 1)
            except openai.OpenAIError as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            latencies.append(time.monotonic() - asked)
            produced.append(count)
            if text != alone[index][0]:
                wrong.append({"prompt": prompts[index], "alone": alone[index][0], "together": text})
            number += 1

    memory: list[float] = []
    threads = [threading.Thread(target=visitor, args=(index,)) for index in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(resident_megabytes(pid))
        time.sleep(1)
    took = time.monotonic() - began
    quarter = max(1, len(memory) // 4)
    return {
        "model": name,
        "clients": clients,
        "seconds": round(took, 1),
        "requests": len(latencies),
        "errors": len(errors),
        "error_kinds": sorted(set(errors))[:5],
        "mixed_up": sum(answer["together"] in {text for text, _ in alone} for answer in wrong),
        "different": len(wrong),
        "different_examples": wrong[:3],
        "tokens_per_second": round(sum(produced) / took, 1),
        "tokens_per_second_alone": round(alone_rate, 1),
        "latency_median_s": round(statistics.median(latencies), 2) if latencies else None,
        "latency_95_s": round(sorted(latencies)[int(0.95 * len(latencies))], 2) if latencies else None,
        "memory_mb_second_quarter": round(statistics.median(memory[quarter : 2 * quarter] or memory), 1),
        "memory_mb_last_quarter": round(statistics.median(memory[-quarter:]), 1),
        "memory_mb_most": round(max(memory), 1),
    }


def main() -> None:
    """Start, load, print, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--model", default="", choices=["", ":large", ":small"], help="suffix of the model's name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    server, url = start(options.run, ["--requests-per-minute", "100000"])
    try:
        figures = measure(
            url,
            server.pid,
            model=options.model,
            clients=options.clients,
            seconds=options.seconds,
            tokens=options.tokens,
        )
    finally:
        server.terminate()
        figures_exit = server.wait(60)
    figures["exit_code"] = figures_exit
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for key, value in figures.items():
            print(f"{key:28} {value}")
    if figures["errors"] or figures["different"]:
        raise SystemExit("an answer was an error, or not the one that the prompt gets alone")


if __name__ == "__main__":
    main()

"""Measure fluxlab on a GPU: tests, check, speed against Diffusers, attention maps, memory. `make gpu` runs it.

python -m benchmarks.gpu [--budget 600] [--out FOLDER] [--parts forward maps ...] [--tiny --device cpu]

Nothing is downloaded: FLUX.1 dev gets random weights that are made on the card. Each part runs in a process of its own
and gets a share of the budget; a part that fails or runs out of time is reported, and the next one starts. Prints one
table, and writes it with the card and the versions to FOLDER/gpu-<date>-<card>.json after each row. Exits with 0 if
every part has run, 1 if one failed or ran out of time, 2 if there is no such device. `--tiny` uses small sizes.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Part(NamedTuple):
    """A command and its share of the budget. rows: whether it prints rows of JSON; else its last lines are the row."""

    command: list[str]
    share: float
    rows: bool = True


def parts(options: argparse.Namespace) -> dict[str, Part]:
    """Return all parts in order: first what takes seconds, last what compiles."""
    common = ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    common += ["--seconds", str(0.2 if options.tiny else max(2, options.budget / 120))]
    measured = lambda name, *more: [sys.executable, "-m", "benchmarks.gpu_parts", name, *common, *more]  # noqa: E731
    check = [sys.executable, "-m", "fluxlab.check", "model=tiny", f"device={options.device}"]
    tests = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
    tests += [f"tests/gpu/{'test_cuda.py' if options.tiny else ''}"]
    return {
        "card": Part(measured("card"), 3),
        "forward": Part(measured("forward"), 10),
        "maps": Part(measured("maps"), 6),
        "limit 24 GB": Part(measured("limited", "--limit", "24"), 4),
        "check": Part(check, 4, rows=False),
        "tests": Part(tests, 8, rows=False),
        "compiled": Part(measured("compiled"), 20),
    }


def run(part: Part, seconds: float, log: Path) -> Iterator[dict]:
    """Yield the rows of a part as it prints them. The last one is its outcome: `ok`, `failed` or `out of time`."""
    start = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    out = log.with_suffix(".out")
    with open(log, "w") as errors, open(out, "w") as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            read = 0
            while True:
                code, late = process.poll(), time.monotonic() - start > seconds
                complete = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
                yield from (json.loads(line) for line in complete[read:] if part.rows and line.startswith("{"))
                read = len(complete)
                if code is not None or late:
                    break
                time.sleep(0.1)
        finally:
            stop(process)
    took = time.monotonic() - start
    said = [line.strip() for file in (out, log) for line in file.read_text().splitlines() if line.strip()]
    said = [line for line in said if not (part.rows and line.startswith("{"))]
    last = said[-1] if said else ""
    if code == 0:
        outcome, text = "ok", "" if part.rows else last
    elif code is None:
        outcome, text = "out of time", f"stopped; {last}"
    else:
        failed = [line for line in said if line.startswith(("FAILED", "ERROR", "failed"))]
        outcome, text = "failed", "; ".join([f"exit code {code}", *failed[:3], last])
    yield {"outcome": outcome, "text": text, "seconds": took, "output": said[-120:]}


def stop(process: subprocess.Popen) -> None:
    """End a part with the processes that it started, such as the compiler's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def line(part: str, case: str, result: str) -> None:
    print(f"{part:12} {case:32} {result}", flush=True)


def file_name(machine: dict) -> str:
    card = re.sub(r"[^a-z0-9]+", "-", machine.get("card", "unknown").lower()).strip("-")
    return f"gpu-{datetime.date.today().isoformat()}-{card}.json"


def measure(options: argparse.Namespace, chosen: dict[str, Part]) -> int:
    """Run the parts, print the table, write the file. Return the exit code."""
    report = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "tiny": options.tiny}
    report |= {"command": " ".join(sys.argv[1:]), "machine": {}, "parts": {}, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    end, file = time.monotonic() + options.budget, None
    line("part", "case", "result")
    with tempfile.TemporaryDirectory() as folder:
        left = sum(part.share for part in chosen.values())
        for name, part in chosen.items():
            remaining = end - time.monotonic()
            seconds = min(remaining, 2 * remaining * part.share / left)  # what a part leaves goes to the next ones
            left -= part.share
            rows = iter(
                [{"outcome": "out of time", "text": "not started", "seconds": 0.0}]
                if seconds < 1
                else run(part, seconds, Path(folder) / f"{name}.log")
            )
            for row in rows:
                report["machine"] = row.pop("machine", report["machine"])
                if "outcome" in row:
                    report["parts"][name] = row
                    line(name, row["outcome"], f"{row['text'] or 'complete'} ({row['seconds']:.0f} s)")
                else:
                    report["rows"].append({"part": name, **row})
                    line(name, row["case"], row["result"])
                file = file or options.out / file_name(report["machine"])
                file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {file}", flush=True)
    return 0 if all(part["outcome"] == "ok" for part in report["parts"].values()) else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (570)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (benchmarks/results)")
    parser.add_argument("--parts", nargs="+", help="only these, by their first word")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a trial on the CPU")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: 12 billion weights take minutes a step there")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():  # asked without making a context, which would take the card's memory
            parser.error("this machine has no CUDA device, or this PyTorch cannot use it; try --tiny --device cpu")
    every = parts(options)
    unknown = set(options.parts or ()) - {name.split()[0] for name in every}
    if unknown:
        parser.error(
            f"--parts {' '.join(unknown)}: expected some of {', '.join(dict.fromkeys(n.split()[0] for n in every))}"
        )
    chosen = {name: part for name, part in every.items() if not options.parts or name.split()[0] in options.parts}
    return measure(options, chosen)


if __name__ == "__main__":
    sys.exit(main())

"""How fast tokens come: both twins beside Hugging Face's LlamaForCausalLM of the same shape and weights.

    python benchmarks/generate.py [--rounds 7] [--quick] [--json FILE] [--write docs/speed.md]

All contenders run in turn, round by round, each in a process of its own on the same core with one thread. A figure is
the median over the rounds; a ratio is the median of the rounds' ratios, of CPU time. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from contenders import CONTENDERS, MODEL, ONE_THREAD, ROOT, Worker, bytes_per_token, pin_to, write_weights

ASSETS = ROOT / "parity" / "assets"
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
HEAD = "# Speed\n\nEvery section is written by the tool that it names; no figure is set by hand.\n"
PROMPT = "In a little house on the island lived Ada, a careful gardener."


class Job(NamedTuple):
    """One kind of work: so many rows of a prompt of this length, and new tokens per row."""

    title: str
    kind: str
    rows: int
    length: int
    new: int
    aims: dict[str, float]


def jobs(quick: bool) -> list[Job]:
    """The three kinds, with what each twin should reach as a multiple of Hugging Face's speed."""
    new = 64 if quick else 256
    return [
        Job(f"decode, batch 1, {new} tokens", "decode", 1, 16, new, {"omni_jax": 3.0, "omni_torch": 1.3}),
        Job(f"decode, batch 16, {new} tokens", "decode", 16, 16, new, {}),
        Job("prefill, 512 tokens", "prefill", 1, MODEL["ctx_len"], 1, {"omni_jax": 1.2}),
    ]


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds; a median of fewer than 5 says little")
    parser.add_argument("--quick", action="store_true", help="two rounds of 64 tokens: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds as JSON; - for stdout alone")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the report as Markdown")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: must be at least 1")
    if find_spec("transformers") is None:
        parser.error(
            "transformers is missing, which the twins are compared with; install it: pip install -e '.[bench]'"
        )
    result = measure(2 if given.quick else given.rounds, given.quick)
    if given.json and str(given.json) != "-":
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.write:
        write_section(given.write, markdown(result))
    print(json.dumps(result) if str(given.json) == "-" else text(result))


def measure(rounds: int, quick: bool) -> dict[str, Any]:
    """Every round of every job and contender."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    found: dict[str, Any] = {"machine": machine(*PACKAGES), "rounds": rounds, "jobs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder)
        found["bytes_per_token"] = bytes_per_token(folder)
        workers = [Worker(contender, folder, core) for contender in CONTENDERS]
        try:
            for job in jobs(quick):
                found["jobs"].append(measure_job(job, workers, rounds))
        finally:
            for worker in workers:
                worker.close()
        found["first_token"] = {twin: first_token(twin, folder, core, rounds) for twin in ("omni_torch", "omni_jax")}
    return found


def measure_job(job: Job, workers: list[Worker], rounds: int) -> dict[str, Any]:
    """All rounds of one job; the probe goes with the jobs that decode one row."""
    taking_part = [worker for worker in workers if worker.name != "gemv" or (job.kind == "decode" and job.rows == 1)]
    times: dict[str, dict[str, list[float]]] = {w.name: {"cpu": [], "wall": []} for w in taking_part}
    ids: dict[str, list[list[int]]] = {}
    for i in range(rounds):
        # Whoever comes first in a round does not always come first.
        for worker in taking_part[i % len(taking_part) :] + taking_part[: i % len(taking_part)]:
            show(f"{job.title}: round {i + 1} of {rounds}, {worker.name}")
            answer = worker.run(job.kind, job.rows, job.length, job.new)
            for clock in ("cpu", "wall"):
                times[worker.name][clock].append(answer[clock])
            ids[worker.name] = answer["made"]
    show("")
    tokens = job.rows * (job.new if job.kind == "decode" else job.length)
    return {
        "title": job.title,
        "tokens": tokens,
        "seconds": times,
        "ratio_to_hf": {name: ratio(times["hf"], clocks) for name, clocks in times.items()},
        "of_the_probe": {name: ratio(times["gemv"], clocks) for name, clocks in times.items()}
        if "gemv" in times
        else {},
        "ids": {name: same(ids["hf"], found) for name, found in ids.items() if name.startswith("omni")},
        "aims": job.aims,
    }


def ratio(others: dict[str, list[float]], own: dict[str, list[float]]) -> float:
    """How many times as fast as the other, by CPU time, round for round."""
    return median(a / b for a, b in zip(others["cpu"], own["cpu"]))


def same(wanted: list[list[int]], found: list[list[int]]) -> str:
    """Whether the greedy ids are Hugging Face's, and if not, where they part."""
    for row, (a, b) in enumerate(zip(wanted, found)):
        if a != b:
            step = next(i for i, (x, y) in enumerate(zip(a + [-1], b + [-1])) if x != y)
            return f"not equal: row {row} from token {step} on"
    return "equal"


def first_token(twin: str, folder: Path, core: int, rounds: int) -> dict[str, Any]:
    """Seconds from the loaded weights of the shipped model to the first token, by the command in a new process.

    The first run compiles, where anything is compiled, and the others find the programs where the command keeps them.
    """
    # Nothing but the command's own choice decides where programs are kept, within a folder of this run.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= ONE_THREAD | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", twin, "generate", "--json", "--prompt", PROMPT, "--max-new-tokens", "16"]
    command += ["--checkpoint", str(ASSETS / "thinker.pt")]
    seconds = []
    for i in range(rounds + 1):
        show(f"first token, {twin}: {'cold' if i == 0 else f'round {i} of {rounds}'}")
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, preexec_fn=lambda: pin_to(core)
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr[-1000:]}")
        seconds.append(json.loads(done.stdout)["seconds_to_first_token"])
    show("")
    return {"cold": seconds[0], "warm": seconds[1:], "median": median(seconds[1:]), "aim": 1.0}


def machine(*packages: str) -> dict[str, str]:
    """What the figures depend on; no names."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    cores = os.cpu_count()
    return {
        "processor": f"{platform.machine()}{f' with {vectors}' if vectors else ''}, {cores} cores, one of them used",
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name).partition("+")[0] for name in packages},
    }


def verdict(value: float, aim: float, at_most: bool = False) -> str:
    """The aim, and whether it is reached."""
    reached = value <= aim if at_most else value >= aim
    return f"{'≤' if at_most else '≥'} {aim:g}{' s' if at_most else ''}: {'reached' if reached else 'MISSED'}"


def table(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the report, the first being its head."""
    rows = [["job", "contender", "tokens/s (CPU)", "tokens/s (wall)", "× HF", "of the probe", "aim", "greedy ids"]]
    for job in result["jobs"]:
        for name, clocks in job["seconds"].items():
            speeds = [f"{job['tokens'] / median(clocks[clock]):,.0f}" for clock in ("cpu", "wall")]
            factor = job["ratio_to_hf"][name]
            reached = f"{job['of_the_probe'][name]:.0%}" if name in job["of_the_probe"] else ""
            aim = verdict(factor, job["aims"][name]) if name in job["aims"] else ""
            rows.append([job["title"], name, *speeds, f"{factor:.2f}", reached, aim, job["ids"].get(name, "")])
    return rows


def first_rows(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the second table."""
    rows = [["first token of the shipped model", "warm, s", "slowest, s", "cold, s", "aim"]]
    for twin, found in result["first_token"].items():
        aim = verdict(found["median"], found["aim"], at_most=True)
        rows.append([twin, f"{found['median']:.3f}", f"{max(found['warm']):.3f}", f"{found['cold']:.2f}", aim])
    return rows


def notes(result: dict[str, Any]) -> list[str]:
    """What the figures are."""
    streamed = result["bytes_per_token"]
    decode = result["jobs"][0]
    speed = streamed * decode["tokens"] / median(decode["seconds"]["gemv"]["cpu"]) / 1e9
    return [
        f"The model: {', '.join(f'{key} {value}' for key, value in MODEL.items())}; float32, random weights, the same "
        "for all; HF is transformers' LlamaForCausalLM, decoding with its own cache by generate.",
        f"Medians of {result['rounds']} rounds, in which the contenders take turns; each in a process of its own, all "
        "on one core with one thread. Ratios are of CPU time; differences under 10 % are noise. Decoding includes the "
        "prompt of 16 tokens, prefill the filled cache and the logits of the last position.",
        f"The probe `gemv` reads the weights of one token ({streamed / 1e6:.1f} MB) by one product of a matrix with a "
        f"vector, per token: {speed:.1f} GB/s here. No decoding of one row in float32 can be faster.",
        "First token: seconds from the loaded weights to the first token of `python -m TWIN generate --json` in a new "
        "process, on the wall clock. Cold: nothing compiled before. Warm: with the programs that the command has kept.",
    ]


def text(result: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [", ".join(f"{key} {value}" for key, value in result["machine"].items()), ""]
    for rows in (table(result), first_rows(result)):
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows] + [""]
    return "\n".join(lines + notes(result))


def markdown(result: dict[str, Any]) -> str:
    """The report's section in docs/."""
    lines = ["## Decoding", "", "Written by `python benchmarks/generate.py --write docs/speed.md`."]
    lines += ["", "Machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()) + "."]
    for rows in (table(result), first_rows(result)):
        lines += ["", *markdown_table(rows)]
    return "\n".join(lines + ["", *(f"* {note}" for note in notes(result))]) + "\n"


def markdown_table(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, the first row being its head."""
    return [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]


def write_section(path: Path, section: str) -> None:
    """Put a section, which begins with "## " and its name, into a report; other tools' sections stay as they are."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    heading = section.partition("\n")[0]
    sections = [f"## {part.strip()}\n" for part in ("\n" + old).split("\n## ")[1:]]
    names = [part.partition("\n")[0] for part in sections]
    if heading in names:
        sections[names.index(heading)] = section
    else:
        sections.append(section)
    path.write_text("\n".join([HEAD, *sections]), encoding="utf-8")


def show(line: str) -> None:
    """Progress, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

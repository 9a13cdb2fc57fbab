"""What the benchmarks share: fresh processes, seconds and peak memory, tables and plots."""

import gc
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce")


def in_fresh_process(script: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Run `script --case JSON`, which prints one line of JSON last, so that nothing is warm or still in memory."""
    command = [sys.executable, script, "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def case_of_this_process() -> dict[str, Any] | None:
    """The case that `in_fresh_process` gave; None in the process that gives them."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == ["--case"] else None


def now(device: str = "cpu") -> float:
    """A clock: CPU seconds of this process, which a busy neighbour hardly touches; on a GPU seconds, work done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, as `now` tells them.

    What the imports left to collect (0.12 s for PyTorch) is collected before, as it would fall on whatever runs first.
    """
    gc.collect()
    start = now(device)
    function()
    return now(device) - start


def fastest(functions: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """The least seconds of each function, called by turns, so that a slow minute falls on all of them."""
    found = dict.fromkeys(functions, math.inf)
    for _ in range(rounds):
        for name, function in functions.items():
            found[name] = min(found[name], seconds(function, device))
    return found


def peak_mib(device: str = "cpu") -> float:
    """The most memory that this process has had so far (Linux), or that a GPU has held for it."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def quietly() -> None:
    """Without what the trainer says of a run so short."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|torch")


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """One Markdown table; a row is a mapping from column to value."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    print(f"\n{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def print_machine() -> None:
    """When and where."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = model[0].partition(": ")[2] if model else platform.machine()
    torch.set_num_threads(1)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{date.today()}, {name}, one thread{gpu}, torch {torch.__version__}")


def plot(path: str, title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw lines over two logarithmic axes as SVG."""
    points = [point for line in lines.values() for point in line]
    ends = [(math.log2(min(values)), math.log2(max(values))) for values in zip(*points, strict=True)]

    def at(point: Sequence[float]) -> tuple[float, float]:
        shares = [(math.log2(v) - low) / ((high - low) or 1) for v, (low, high) in zip(point, ends, strict=True)]
        return 60 + 520 * shares[0], 300 - 250 * shares[1]

    def text(left: float, top: float, words: str, more: str = "") -> str:
        return f'<text x="{left:.0f}" y="{top:.0f}" {more}>{words}</text>'

    parts = [text(60, 22, title, 'font-weight="bold"'), text(60, 40, y), text(580, 345, x, 'text-anchor="end"')]
    parts += [
        text(at((v, points[0][1]))[0], 322, f"{v:g}", 'text-anchor="middle"') for v in sorted({p[0] for p in points})
    ]
    for step in range(math.ceil(ends[1][0]), math.floor(ends[1][1]) + 1):
        height = at((points[0][0], 2.0**step))[1]
        parts.append(f'<path d="M60 {height:.0f}H580" stroke="#888" stroke-opacity=".3"/>')
        parts.append(text(54, height + 4, f"{2.0**step:g}", 'text-anchor="end"'))
    for number, (name, line) in enumerate(lines.items()):
        colour, places = COLOURS[number % len(COLOURS)], [at(point) for point in line]
        path_ = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in places)
        parts.append(f'<path d="{path_}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}"/>' for left, top in places]
        parts.append(text(70, 62 + 16 * number, name, f'fill="{colour}"'))
    head = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 355" font-family="sans-serif" font-size="12"'
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    background = '<rect width="600" height="355" fill="#fff"/>'
    Path(path).write_text(f"<svg {head}><title>{title}</title>{background}{''.join(parts)}</svg>\n")


def once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `compute`, from the file if it was computed before."""
    if not path.exists():
        result = compute()
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(path)
    return dict(json.loads(path.read_text()))


def table_over_seeds(rows: Mapping[str, Mapping[str, Sequence[float]]], columns: Sequence[str], digits: int) -> str:
    """A Markdown table: mean and standard deviation of the values of every row and column, if there are any."""

    def cell(values: Sequence[float] | None) -> str:
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

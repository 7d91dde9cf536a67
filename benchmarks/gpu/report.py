"""Write the tables and plots of a run: milliseconds and bare products side by side, everywhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu import plots
from benchmarks.gpu.record import FILE, STATE, circumstances_of, rows_of
from str_kernels.bench.report import Row, markdown, milliseconds, percent

PROTOCOL = (
    "One unit is the bare product `H Wᵀ` of the same rows, in the same dtype, timed in turns with "
    "what stands beside it. Every time is given in ms and, in brackets, in units. *Single*: the "
    "median of calls that each start on an idle device, so the host's launches count; *best*: the "
    "shortest of them. *Queued*: "
    "calls that follow each other for 50 ms without a wait of ours, beside products that do. Both "
    "between events on the device's own clock, after a call that warms up. The clocks were read "
    "while the last queue ran."
)
HEADINGS = ("single, ms (units)", "best", "queued, ms (units)", "SM MHz", "memory MHz", "°C")
TIMED = "gemms"  # a row that has it was timed


def publish(folder: Path, out: Path | None, results: Path) -> list[Path]:
    """Write ``gpu.md``, its plots and the rows themselves; return what was written."""
    where = circumstances_of(folder)
    out = results / slug(where["device"]) if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(folder)
    if (out / FILE).resolve() != (folder / FILE).resolve():
        shutil.copyfile(folder / FILE, out / FILE)
    path = out / "gpu.md"
    path.write_text(text(where, rows), encoding="utf-8")
    return [path, out / FILE, *plots.draw(rows, out)]


def slug(device: str) -> str:
    """Return a folder's name for a GPU: "NVIDIA H200" is "h200"."""
    words = "".join(c if c.isalnum() else " " for c in device.lower()).split()
    return "-".join(word for word in words if word not in ("nvidia", "amd"))


def text(where: Row, rows: list[Row]) -> str:
    """Write the whole report."""
    sections = {
        "The unit": _unit(rows),
        "The head beside its peers": _head(rows),
        "Stages of one call": _stages(rows),
        "Where one call waits": _profile(rows),
        "Every logit exact": _variants(rows, "exact"),
        "Launch sizes of the screen": _variants(rows, "screen"),
        "Launch sizes of the refinement": _variants(rows, "refine"),
        "LoRA steps": _lora(rows),
        "Tests": _tests(rows),
        "What was not measured": _absent(rows),
    }
    parts = [f"# {where['device']}", f"{_software(where, rows)} {PROTOCOL}"]
    parts += [f"## {title}\n\n{body}" for title, body in sections.items() if body]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def times(row: Row) -> list[str]:
    """Return the cells under `HEADINGS`."""
    sensors = row.get("sensors", {})
    queued = ""
    if "queued_gemms" in row:
        queued = f"{milliseconds(row['queued_seconds'])} ({row['queued_gemms']:.2f})"
    clocks = [f"{sensors[key]:.0f}" if key in sensors else "" for key in ("sm_mhz", "memory_mhz")]
    heat = f"{sensors['celsius']:.0f}" if "celsius" in sensors else ""
    single = f"{milliseconds(row['seconds'])} ({row[TIMED]:.2f})"
    return [single, milliseconds([min(row["seconds"])]), queued, *clocks, heat]


def of(rows: Iterable[Row], step: str) -> list[Row]:
    """Return a step's rows, without its state."""
    return [row for row in rows if row["step"] == step and row["name"] != STATE]


def shape(row: Row) -> str:
    """Say which problem it was."""
    return f"N {row['N']:,}, V {row['V']:,}, D {row['D']:,}"


def _software(where: Row, rows: list[Row]) -> str:
    versions = next((row["versions"] for row in rows if "versions" in row), where["versions"])
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{known}. Hidden states and head are synthetic, as uncertain as a trained model's."


def _unit(rows: list[Row]) -> str:
    mine = of(rows, "unit")
    lines = [
        [shape(row), *times(row), *(f"{_rate(row, key):.0f}" for key in _seconds(row))]
        for row in mine
        if row["name"] == "unit"
    ]
    headings = ["problem", *HEADINGS, "TFLOP/s single", "queued"]
    said = [markdown(headings, lines)] if lines else []
    for row in mine:
        if row["name"] == "copy":
            rate = row["bytes"] / sorted(row["seconds"])[len(row["seconds"]) // 2] / 1e12
            said.append(f"A copy on the device reads and writes {rate:.2f} TB/s together.")
        if row["name"] == "sustained":
            first, last = (_clocked(row[key]) for key in ("first", "last"))
            said.append(
                f"Without a pause for {row['total_s']:.1f} s, {shape(row)}: the product takes "
                f"{first} at first, {last} at last."
            )
    return "\n\n".join(said)


def _seconds(row: Row) -> list[str]:
    return [key for key in ("seconds", "queued_seconds") if key in row]


def _rate(row: Row, key: str) -> float:
    return 2e-12 * row["N"] * row["V"] * row["D"] / sorted(row[key])[len(row[key]) // 2]


def _clocked(part: Row) -> str:
    clock = f" ({part['sm_mhz']:.0f} MHz)" if "sm_mhz" in part else ""
    return f"{milliseconds([part['seconds']])} ms{clock}"


def _head(rows: list[Row]) -> str:
    mine, parts = of(rows, "head"), []
    for row in mine:
        if row["name"] == "inputs":
            parts.append(
                f"{shape(row)}: entropy {row['entropy']:.2f} nats, {row['confident']:.0%} of the "
                f"rows confident, live pairs {row['live']:.1%}."
            )
    timed = [row for row in mine if TIMED in row]
    for problem in dict.fromkeys(map(shape, timed)):
        group = [row for row in timed if shape(row) == problem]
        lines = [[row["name"], *times(row), *_memory_and_errors(row)] for row in group]
        headings = ["head", *HEADINGS, "MiB", "loss", "dH", "dH sure"]
        parts.append(f"**{problem}**\n\n{markdown(headings, lines)}")
    return "\n\n".join(parts)


def _memory_and_errors(row: Row) -> list[str]:
    memory = f"{row['peak_bytes'] / 2**20:,.1f}"
    loss = "" if row.get("loss_error") is None else f"{row['loss_error']:.0e}"
    return [memory, loss, *(_share(row, key) for key in ("hidden_error", "confident_error"))]


def _share(row: Row, key: str) -> str:
    return "" if row.get(key) is None else percent(row[key])


def _stages(rows: list[Row]) -> str:
    mine, parts = of(rows, "stages"), []
    units = _unit_ms(rows)
    whole = [row for row in mine if "ms" in row]
    for row in whole:
        unit = units.get(shape(row))
        lines = [
            [name, f"{ms:.3g}", "" if unit is None else f"{ms / unit:.3f}"]
            for name, ms in row["ms"].items()
        ]
        table = markdown([f"{row['name']}, {shape(row)}", "ms", "units (single)"], lines)
        parts.append(f"{table}\nThe stages hold {row['in_stages']:.0%} of the whole.")
    alone = [[f"{_live(row)}, {shape(row)}", *times(row)] for row in mine if TIMED in row]
    if alone:
        parts.append(f"By themselves:\n\n{markdown(['stage', *HEADINGS], alone)}")
    return "\n\n".join(parts)


def _live(row: Row) -> str:
    """Return the name, with how much of the vocabulary was computed exactly."""
    if "live" not in row:
        return row["name"]
    return f"{row['name']} ({row['live']:.1%} of the pairs live, {row['hot']} tiles hot)"


def _unit_ms(rows: list[Row]) -> dict[str, float]:
    return {
        shape(row): 1e3 * sorted(row["seconds"])[len(row["seconds"]) // 2]
        for row in of(rows, "unit")
        if row["name"] == "unit"
    }


def _profile(rows: list[Row]) -> str:
    mine = of(rows, "profile")
    facts = ("wall_ms", "enqueued_ms", "span_ms", "busy_ms", "kernels", "launches", "torch_calls")
    lines = []
    for row in mine:
        idle = "" if row["idle"] is None else f"{row['idle']:.0%}"
        counts = [_number(row[fact]) for fact in facts]
        lines.append([f"{row['name']}, {shape(row)}", *counts, idle, _counted(row["waits"])])
    if not lines:
        return ""
    headings = ["call", "wall ms", "until enqueued", "device's span", "busy", "kernels"]
    headings += ["launches", "torch calls", "idle", "waits (one is the measurement's own)"]
    parts = [markdown(headings, lines)]
    for row in mine:
        longest = [
            [one["kernel"].replace("|", "\\|"), f"{one['count']}", f"{one['ms']:.3g}"]
            for one in row["longest"]
        ]
        if longest:
            title = f"{row['name']}, {shape(row)}"
            parts.append(markdown([title, "launches", "ms"], longest))
    return "\n\n".join(parts)


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _variants(rows: list[Row], step: str) -> str:
    mine = [row for row in of(rows, step) if TIMED in row]
    errors = list(dict.fromkeys(k for row in mine for k, x in row.items() if _is_error(k, x)))
    lines = [
        [f"{row['name']}, {shape(row)}", *times(row)]
        + [f"{row[key]:.1e}" if row.get(key) is not None else "" for key in errors]
        for row in mine
    ]
    names = [key.replace("_", " ") for key in errors]
    return markdown(["variant", *HEADINGS, *names], lines) if lines else ""


def _is_error(key: str, value: object) -> bool:
    return key.endswith("_error") and value is not None


def _lora(rows: list[Row]) -> str:
    lines = [
        [row["name"], shape(row["context"]), *times(row), f"{row['peak_bytes'] / 2**30:.2f}"]
        for row in of(rows, "lora")
        if TIMED in row
    ]
    headings = ["method", "context", *HEADINGS, "GiB beyond the model"]
    return markdown(headings, lines) if lines else ""


def _tests(rows: list[Row]) -> str:
    parts = []
    for row in of(rows, "tests"):
        parts.append(f"`pytest -m gpu`: {_counted(row['counts']) or 'no result'}.")
        parts += [f"- {line}" for line in row["failed"]]
    return "\n".join(parts)


def _absent(rows: list[Row]) -> str:
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("reason"):
            name = row["step"] if row["name"] == STATE else f"{row['step']}, {row['name']}"
            shapes = said.setdefault((name, row["reason"]), [])
            shapes += [shape(row)] if "N" in row else []
    return "\n".join(
        f"- {name}: {reason}{f' ({len(shapes)} shapes)' if len(shapes) > 1 else ''}"
        for (name, reason), shapes in said.items()
    )

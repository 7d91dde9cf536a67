"""Scale the axes of a plot, with ticks that are plain numbers."""

from __future__ import annotations


def logarithmic(axis, directions: str = "xy") -> None:
    """Set log scales whose ticks are plain numbers, such as 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for direction in directions:
        getattr(axis, f"set_{direction}scale")("log")
        line = getattr(axis, f"{direction}axis")
        low, high = sorted(line.get_data_interval())
        steps = (1, 2, 5) if high < 100 * low else (1,)
        line.set_major_locator(LogLocator(subs=steps))
        line.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        line.set_minor_formatter(NullFormatter())


def ticks_at(axis, values: list[int]) -> None:
    """Set ticks of a logarithmic x-axis where something was measured."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    thousands = max(values) >= 100_000  # such labels would touch each other
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:,.0f}k" if thousands else f"{x:,.0f}")
    )
    axis.xaxis.set_minor_locator(NullLocator())

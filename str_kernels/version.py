"""The version of this package, and those of the packages it runs with."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.2.0"


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python and of these packages, by name; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def run_versions() -> dict[str, str | None]:
    """Return the versions of every package that changes the numbers of a training run."""
    others = versions("torch", "transformers", "peft", "accelerate")
    return {"str_kernels": __version__, **others}

"""Triton decides on import whether kernels are interpreted, so the two kinds never share a process.

``tests/test_triton_interpreter.py`` runs the interpreted ones.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py"] if INTERPRETED else ["interpreted/*"]

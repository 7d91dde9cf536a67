"""Measurements behind the project's tables and plots: one module each, `README.md` says how."""

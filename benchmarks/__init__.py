"""Each module makes one measurement behind the project's tables and plots; `README.md` says how."""

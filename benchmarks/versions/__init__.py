"""The package tested with old and new versions of what it stands on."""

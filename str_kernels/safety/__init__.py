"""Safety tokens: how they are found in a model, written to a file, and read back."""

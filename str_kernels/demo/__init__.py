"""The whole method on a model made on the spot: align, fine-tune plainly and with STR, compare."""

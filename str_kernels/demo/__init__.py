"""The method on a tiny model made on the spot: align, fine-tune plainly and with STR, compare."""

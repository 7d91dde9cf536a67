"""Random cases over all options of the loss, compared with fp64."""

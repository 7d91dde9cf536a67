"""A probe of refusing during training: one forward over a few requests, without generation."""

"""A probe of refusing during training: one forward over a few requests, without generation."""

EVERY = 20  # steps between two; with 8 requests under 2 % of the time of usual steps
WARN_BELOW = 0.9

"""The engine: the stages that every backend shares, from hidden states to the gradients."""

"""LoRA fine-tuning with the fused, safety-constrained loss: settings, checks and the run."""

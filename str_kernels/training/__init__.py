"""LoRA fine-tuning with the fused, safety-constrained loss: data, models, the run itself."""

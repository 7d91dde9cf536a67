"""Does the constraint keep a model safe? Aligned, fine-tuned and asked again, on a real model."""

"""Does the constraint keep a model safe? A real model is aligned, fine-tuned and asked again."""

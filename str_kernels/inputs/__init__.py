"""What comes in: conversations from files, chat templates, models and tokenizers by name."""

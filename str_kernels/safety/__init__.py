"""Safety tokens, their reference, and the measure of what was kept."""

"""What a model refuses and what it can do: answers, the judge of each, and rates with intervals."""

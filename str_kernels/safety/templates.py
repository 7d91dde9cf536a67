"""Texts, written for this project, that show an aligned model refusing and answering.

The tokens of `REJECTION_TEMPLATES` are scored; they answer `REFUSED_REQUESTS`. `BENIGN_REQUESTS`
look like those, with the same words and frames, but contain nothing to refuse. What the two groups
of requests share, in subject and in grammar, therefore cancels out of the scores.
"""

import json
from pathlib import Path

_TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
REJECTION_TEMPLATES: tuple[str, ...] = tuple(_TEXTS["rejections"])
REFUSED_REQUESTS: tuple[str, ...] = tuple(_TEXTS["refused"])
BENIGN_REQUESTS: tuple[str, ...] = tuple(_TEXTS["benign"])

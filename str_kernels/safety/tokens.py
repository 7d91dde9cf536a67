"""The safety tokens of a model: identified, saved, and loaded for the same tokenizer only.

Stage: an aligned model and its tokenizer → K token ids with their scores → a ``SafetyConstraint``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from str_kernels.files import read_json, write_json
from str_kernels.options import DEFAULT_KIND, ConstraintKind, SafetyConstraint
from str_kernels.safety.vocabulary import fingerprint, is_word, special_ids, token_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from str_kernels.safety.inference import Prompt

SCHEMA = "str_kernels.safety_tokens/1"
_SHOWN = 6  # tokens in the representation


@dataclass(frozen=True)
class SafetyTokens:
    """K tokens that a model's refusals consist of.

    Args:
        token_ids: K distinct rows of the head.
        tokens: their text, leading space included.
        scores: how much refusing raises each token's mean probability; None if not measured.
        model: name of the model in which they were identified.
        tokenizer: fingerprint of the tokenizer to which the ids belong.

    Raises:
        ValueError: lengths differ, or a constraint would reject the ids.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    model: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        checked = SafetyConstraint(self.token_ids, 0.0, "mse")
        object.__setattr__(self, "token_ids", checked.token_ids)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if self.scores is not None:
            object.__setattr__(self, "scores", tuple(map(float, self.scores)))
        for name in ("tokens", "scores"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(
                    f"{name} has {len(values)} entries: must have one for each of the "
                    f"{len(self.token_ids)} token_ids."
                )

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.tokens[:_SHOWN])) + ", …" * (len(self) > _SHOWN)
        of = f" of {self.model}" if self.model else ""
        return f"<SafetyTokens: {len(self)}{of}: {shown}>"

    @classmethod
    def identify(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        templates: Sequence[str] | None = None,
        prompts: Sequence[Prompt] | None = None,
        benign_prompts: Sequence[Prompt] | None = None,
        top_k: int = 64,
        batch_size: int = 8,
    ) -> SafetyTokens:
        """Find the tokens that refusing raises most.

        The score of a token is its mean probability where the model reads a rejection template as
        the answer to a refused request, minus its mean probability along the model's own answers
        to benign requests. Spellings of one word (leading space or not, capital or not) are scored
        and chosen together, except those that are hardly ever used. Special tokens and bare
        punctuation are left out. The model stays as it is, patched or not, and at most the logits
        of ``batch_size`` short answers exist at a time.

        Args:
            model: the aligned model, before fine-tuning.
            tokenizer: its tokenizer; the chat template is used if there is one.
            templates: rejection texts; None: the package's.
            prompts: requests that the model refuses, as text or chat messages; None: the package's.
            benign_prompts: requests that it answers; None: the package's look-alikes.
            top_k: K, 1 to 1024; fewer tokens are returned if refusing raises fewer.
            batch_size: sequences of one forward pass.

        Raises:
            ValueError: a list is empty or unusable, K is outside its range, or a text is longer
                than the model's context.
        """
        from str_kernels.safety.identify import identify

        texts = {"templates": templates, "prompts": prompts, "benign_prompts": benign_prompts}
        ids, scores = identify(model, tokenizer, texts, top_k=top_k, batch_size=batch_size)
        return cls(
            token_ids=ids,
            tokens=[token_text(tokenizer, token) for token in ids],
            scores=scores,
            model=getattr(model.config, "name_or_path", None) or None,
            tokenizer=fingerprint(tokenizer),
        )

    @classmethod
    def from_strings(
        cls, tokenizer: PreTrainedTokenizerBase, strings: Iterable[str]
    ) -> SafetyTokens:
        """Take the tokens of given words or texts, each token once, in order of appearance.

        A string stands for the tokens that it consists of, so ``" sorry"`` and ``"sorry"`` may
        differ. Bare punctuation inside a longer string is left out.

        Raises:
            ValueError: there is no string, or one has only unknown, special or punctuation tokens.
        """
        if isinstance(strings, str):
            raise ValueError(f"strings={strings!r}: must be a list of strings, not one string.")
        left_out = special_ids(tokenizer)
        ids: dict[int, None] = {}
        for position, string in enumerate(strings):
            found = [
                token
                for token in tokenizer(string, add_special_tokens=False)["input_ids"]
                if token not in left_out and is_word(token_text(tokenizer, token))
            ]
            if not found:
                raise ValueError(
                    f"strings[{position}]={string!r}: has no token in this tokenizer's vocabulary "
                    "that could be a safety token."
                )
            ids.update(dict.fromkeys(found))
        if not ids:
            raise ValueError("strings is empty: give at least one.")
        return cls(
            token_ids=tuple(ids),
            tokens=[token_text(tokenizer, token) for token in ids],
            tokenizer=fingerprint(tokenizer),
        )

    def constraint(
        self,
        strength: float | None = None,
        kind: ConstraintKind = DEFAULT_KIND,
        **options: Any,
    ) -> SafetyConstraint:
        """Make the constraint on these tokens; ``options`` are those of SafetyConstraint."""
        return SafetyConstraint(self.token_ids, strength, kind, **options)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with the schema's name and version."""
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON; the file appears whole or not at all."""
        write_json(path, self.as_dict())

    @classmethod
    def load(
        cls, path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> SafetyTokens:
        """Read what ``save`` wrote; with a tokenizer, check that the ids are its own.

        Raises:
            ValueError: the file is missing, is not JSON, has another schema or a wrong field, or
                belongs to another tokenizer; the error names the file.
        """
        path = Path(path)
        loaded = cls._from_json(path, _read_json(path))
        if tokenizer is not None:
            loaded._check_tokenizer(path, tokenizer)
        return loaded

    @classmethod
    def _from_json(cls, path: Path, data: Any) -> SafetyTokens:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, dict) else None
            raise ValueError(f"{path}: schema={schema!r}: must be {SCHEMA!r}.")
        fields = {name: data.get(name) for name in cls.__dataclass_fields__}
        for name in ("token_ids", "tokens"):
            if not isinstance(fields[name], list):
                raise ValueError(f"{path}: {name}={fields[name]!r}: must be a list.")
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def _check_tokenizer(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        same = self.tokenizer == fingerprint(tokenizer)
        for token, text in zip(self.token_ids, self.tokens, strict=True):
            here = token_text(tokenizer, token)
            if here != text:
                difference = f"token {token} is {text!r} there and {here!r} here"
                break
        else:
            if same:
                return
            difference = "the vocabulary or the special tokens differ"
        fault = "is damaged" if same else "was made with another tokenizer"
        raise ValueError(
            f"{path}: {fault} ({difference}); identify the tokens again with this model."
        )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; make it with `str-kernels tokens` or SafetyTokens.save."
        )
    return read_json(path)

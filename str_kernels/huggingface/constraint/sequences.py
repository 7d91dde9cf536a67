"""Which token sequences the head's rows belong to: in an encoder-decoder, those of the decoder.

Stage: the arguments of a forward → ids and mask ``[B, T]`` of the rows of the head, and a key of
each sequence's content. An encoder's ids and mask say nothing of these rows' positions; they are
part of the content, because the rows depend on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from str_kernels.huggingface.constraint.packing import described
from str_kernels.inputs.chat import IGNORED


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder of its own, so that ``input_ids`` are not its head's."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def content_key(token_ids: Sequence[int], encoder_ids: Sequence[int] | None = None) -> str:
    """Name of a token sequence: a hash of its ids, without padding, and of its encoder's."""
    text = ",".join(map(str, token_ids))
    if encoder_ids is not None:
        text = ",".join(map(str, encoder_ids)) + ">" + text
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[Tensor, list[int]]]:
    """For each row of ``[B, T]``: the positions that are not padding, and their token ids."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = []
    for ids, row_mask in zip(input_ids, mask, strict=True):
        where = row_mask.nonzero()[:, 0]
        rows.append((where, ids[where].tolist()))
    return rows


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch, as the head's rows see them.

    Attributes:
        ids: ``[B, T]``, the content of the rows; None: it is not known.
        source: the argument that they come from. Labels stand for the decoder's ids, which a model
            makes from them.
        mask: 0 on padding; None: no padding.
        packing: the arguments that may tell packed sequences apart.
        encoder: the sequences that an encoder read; None: there is no encoder.
    """

    ids: Tensor | None = None
    source: str = "input_ids"
    mask: Any = None
    packing: Mapping[str, Any] = field(default_factory=dict)
    encoder: Sequences | None = None

    @staticmethod
    def of(model: nn.Module, arguments: Mapping[str, Any]) -> Sequences:
        """The sequences in the arguments, by name, of this model's forward."""
        plain = Sequences(
            arguments.get("input_ids"), mask=arguments.get("attention_mask"), packing=arguments
        )
        return _of_decoder(arguments, plain) if is_encoder_decoder(model) else plain

    def rows(self) -> list[tuple[Tensor, int, str]]:
        """For each sequence: the positions that are not padding, their number, and its key.

        Raises:
            ValueError: a mask that does not fit the ids.
        """
        tokens, encoders = self._tokens(), [None] * len(self.ids)
        if self.encoder is not None:
            encoders = [ids for _, ids in self.encoder._tokens()]
        return [
            (where, len(ids), content_key(ids, read))
            for (where, ids), read in zip(tokens, encoders, strict=True)
        ]

    def _tokens(self) -> list[tuple[Tensor, list[int]]]:
        if self.mask is not None and getattr(self.mask, "shape", None) != self.ids.shape:
            raise ValueError(
                f"{self.mask_name}={described(self.mask)}: a reference cache needs one of the "
                f"shape of {self.source}, {list(self.ids.shape)}, to tell padding."
            )
        return real_tokens(self.ids, self.mask)

    @property
    def mask_name(self) -> str:
        """The argument that the mask comes from."""
        return "attention_mask" if self.encoder is None else "decoder_attention_mask"

    @property
    def missing(self) -> str | None:
        """The argument without which the content is not known; None: it is."""
        if self.encoder is not None and self.encoder.ids is None:
            return "input_ids"
        if self.ids is None:
            return "decoder_input_ids" if self.encoder is not None else "input_ids"
        return None


def _of_decoder(arguments: Mapping[str, Any], encoder: Sequences) -> Sequences:
    ids, labels = arguments.get("decoder_input_ids"), arguments.get("labels")
    source, mask = "decoder_input_ids", arguments.get("decoder_attention_mask")
    if ids is None and arguments.get("decoder_inputs_embeds") is None and labels is not None:
        source, ids = "labels", labels
    if mask is None and labels is not None:
        mask = _up_to_the_last_label(labels)
    return Sequences(ids, source, mask, encoder=encoder)


def _up_to_the_last_label(labels: Tensor) -> Tensor:
    """1 up to each row's last label: behind it a decoder has nothing to say, so it is padding."""
    labelled = (labels != IGNORED).long()
    return labelled.flip(-1).cummax(-1).values.flip(-1)

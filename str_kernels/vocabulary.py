"""`VocabularyIndex`: an order of the head's rows in which probable tokens share tiles.

Stage: head ``weight [V, D]``, a few hundred ``hidden_states`` → a permutation of the vocabulary
and, for every tile of ``TILE`` rows in that order, its mean row, and factors of the columns for an
8-bit screen. Routing keeps few (row, tile)
pairs live only if a row's probable tokens are neighbours; token order does not make them so, a
clustering does.

Any permutation gives right results: a stale index, or one made from other text, is only slower and
a little less accurate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from str_kernels import waits
from str_kernels.autocast import without_autocast
from str_kernels.options import TILE
from str_kernels.quantise import EIGHT_BITS, balance, quantise_rows
from str_kernels.tensor_files import SavedTensors, save_tensors
from str_kernels.validation import validate_weight
from str_kernels.waits import SameTensor

SCHEMA = "str_kernels.vocabulary_index/1"
_REQUIRED, _OPTIONAL = (
    {"order", "mean_rows", "sample"},
    {"columns", "hot", "quantised", "row_scales"},
)
_DIRECTIONS = 32  # leading principal directions of the whitened rows that the splits look at
_RIDGE = 1e-3  # share of the mean second moment added to its diagonal: few states, many dimensions
_PROJECTION_ROWS = 32768  # enough to find the leading directions
_BLOCK = 32 * TILE  # rows converted at once; there is no second copy of the weight
_SAMPLES = 16
_HOT_TILES = 32  # one tile in so many is hot at most
_HOT_STATES = 256  # states that are looked at for it
_HOT_SHARE = 0.25  # of the states: below it a product with all rows costs more than it saves
_LIVE = 2.0**-11  # of the open probability, the filter's default ε
# Above the rounding of a cast to bf16 (2^-8), far below another weight's distance.
_SAME_ROWS = 0.02
# By the sample of an index, which compiled code makes anew from its tensors in every call.
_CHECKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class VocabularyIndex:
    """A clustered order of one head's vocabulary; make it with ``build``.

    Attributes:
        order: ``[V]`` int64, a permutation: tile t holds rows ``order[t * TILE : (t + 1) * TILE]``.
        mean_rows: ``[T, D]`` fp32 (fp64 for fp64 weights), each tile's mean row.
        sample: ``[S, D]`` fp32, evenly spaced rows of the weight, to tell another weight by.
        quantised: ``[V, D]`` int8 or float8_e4m3fn rows in tile order for an 8-bit screen, or None.
            Their columns were multiplied by ``columns`` first.
        row_scales: ``[V]`` fp32, what a quantised row is multiplied by, or None.
        columns: ``[D]`` fp32, the factors of ``quantise.balance`` for an 8-bit screen; None: all 1.
        hot: ``[H]`` int64, 0 to H - 1: the first H tiles are *hot*, live for so many rows that a
            GPU multiplies all rows with them; None: none is.
    """

    order: Tensor
    mean_rows: Tensor
    sample: Tensor
    quantised: Tensor | None = None
    row_scales: Tensor | None = None
    columns: Tensor | None = None
    hot: Tensor | None = None
    inverse: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse", torch.empty_like(self.order))
        self.inverse[self.order] = torch.arange(len(self.order), device=self.order.device)

    @classmethod
    def build(
        cls,
        weight: Tensor,
        hidden_states: Tensor | None = None,
        *,
        screen: Literal["int8", "fp8"] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> VocabularyIndex:
        """Cluster the rows of a head.

        Rows are whitened with the second moment of the hidden states, ``X = W chol(HᵀH/n)``, so
        that distance means difference of logits, and split recursively at the median along their
        leading direction until a leaf is a tile.

        Args:
            weight: ``[V, D]``.
            hidden_states: ``[..., D]``, a few hundred typical ones; None: neither are rows whitened
                nor columns balanced, which makes an 8-bit screen twice as coarse.
            screen: also keep rows quantised for this 8-bit screen: it need not make them in every
                step then, but takes V·D bytes.
            progress: called with the number of rows that have their place, and V; first with 0,
                last with V.

        Raises:
            ValueError: a weight that is not whole or not finite, hidden states of another D or not
                finite, an unknown screen.
        """
        validate_weight(weight)
        if screen not in (None, "int8", "fp8"):
            raise ValueError(f"screen={screen!r}: must be None, 'int8' or 'fp8'.")
        weight, report = weight.detach(), progress or (lambda done, total: None)
        report(0, len(weight))
        columns, hot = None, 0
        with without_autocast(weight.device):  # the first loss may be under the user's
            order = _clustered_order(_whitened(weight, hidden_states), report)
            if hidden_states is not None:
                columns = state_columns(hidden_states, weight)
                order, hot = _hot_first(weight, order, hidden_states.reshape(-1, weight.shape[1]))
        index = cls.of_order(weight, order, columns, hot)
        if screen is None:
            return index
        quantised, scales = _quantise(weight, index, EIGHT_BITS[screen])
        return replace(index, quantised=quantised, row_scales=scales)

    @classmethod
    def of_order(
        cls, weight: Tensor, order: Tensor, columns: Tensor | None = None, hot: int = 0
    ) -> VocabularyIndex:
        """Return the index of ``weight [V, D]`` whose order ``[V]`` is known, without clustering.

        ``columns [D]``: as ``state_columns`` made them; None: not balanced. ``hot``: so many tiles
        that come first are hot.

        Raises:
            ValueError: an order that is no permutation of the weight's rows.
        """
        if not torch.equal(order.sort().values, torch.arange(len(weight), device=order.device)):
            raise ValueError(f"order {list(order.shape)}: is no permutation of {len(weight)} rows.")
        means, sample = tile_means(weight, order), _evenly(weight, _SAMPLES)
        places = torch.arange(hot, device=order.device) if hot else None
        return cls(order, means, sample, columns=columns, hot=places)

    def check(self, weight: Tensor) -> None:
        """Refuse a weight that this index was not built from.

        Args:
            weight: ``[V, D]``; its values are compared unless it is being trained, when only its
                shape is, since an order stays right while the weight moves. On a GPU they are
                compared at first, when torch counts a change, and every 100th call, and only the
                first of these errors comes at once; a write through ``.data`` is found late.

        Raises:
            ValueError: another shape, device, or other rows.
        """
        if tuple(weight.shape) != (len(self.order), self.mean_rows.shape[1]):
            raise ValueError(
                f"index: was built for a weight {[len(self.order), self.mean_rows.shape[1]]}, this "
                f"one is {list(weight.shape)}; build it again with VocabularyIndex.build(weight)."
            )
        if weight.device != self.order.device:
            raise ValueError(
                f"index is on {self.order.device}, the weight on {weight.device}; use index.to()."
            )
        known = _CHECKED.setdefault(self.sample, SameTensor())
        if weight.requires_grad or not known.due(weight):
            return
        distance = (_evenly(weight, _SAMPLES) - self.sample).norm()
        wrong = ~(distance <= _SAME_ROWS * self.sample.norm())  # NaN is wrong too

        def refuse() -> None:
            known.forget()
            raise ValueError(
                "index: was built from another weight of this shape (sampled rows differ by "
                f"{(distance / self.sample.norm()).item():.0%}); build it again."
            )

        if not (known.first or waits.checks_at_once(weight.device)):
            waits.judge_later(wrong, refuse)
        elif wrong:
            refuse()

    def to(self, device: torch.device | str) -> VocabularyIndex:
        """Return the same index on another device."""
        return VocabularyIndex(**{name: x.to(device) for name, x in self._tensors().items()})

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; it appears whole or not at all, whoever else writes it."""
        tensors = {name: x.contiguous() for name, x in self._tensors().items()}
        save_tensors(path, tensors, {"schema": SCHEMA})

    @classmethod
    def load(cls, path: str | os.PathLike) -> VocabularyIndex:
        """Read what ``save`` wrote; the weight is compared when the index is used.

        Raises:
            ValueError: no such file, not an index, or an order that is no permutation.
        """
        name = f"path={os.fspath(path)!r}"
        saved = SavedTensors(path, name)
        if saved.metadata.get("schema") != SCHEMA:
            raise ValueError(
                f"{name}: schema is {saved.metadata.get('schema')!r}, must be {SCHEMA!r}."
            )
        if not _REQUIRED <= saved.names <= _REQUIRED | _OPTIONAL:
            found, wanted = (", ".join(sorted(names)) for names in (saved.names, _REQUIRED))
            raise ValueError(f"{name}: holds {found}, must hold {wanted}; build it again.")
        order = saved["order"]
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"{name}: its order is not a permutation; build it again.")
        tensors = {key: saved[key] for key in saved.names}
        hot = tensors.get("hot", torch.arange(0))
        if not torch.equal(hot, torch.arange(len(hot))) or len(hot) * TILE > len(order):
            raise ValueError(f"{name}: its hot tiles are not the first ones; build it again.")
        return cls(**tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a file holds, by name."""
        names = sorted(_REQUIRED | _OPTIONAL)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def tile_means(weight: Tensor, order: Tensor | None, operands: torch.dtype | None = None) -> Tensor:
    """Return each tile's mean row, ``[T, D]`` fp32 (fp64 for fp64), in ``order`` or token order.

    ``operands``: the dtype that rows are rounded to first, as autocast does; None: their own.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    spans = range(0, len(weight), TILE)
    means = torch.empty(len(spans), weight.shape[1], dtype=dtype, device=weight.device)
    for start in range(0, len(weight), _BLOCK):
        where = slice(start, start + _BLOCK)
        # index_select copies whole rows two to three times as fast as indexing
        block = weight[where] if order is None else weight.index_select(0, order[where])
        block = block.to(operands or block.dtype)
        whole, first = len(block) // TILE, start // TILE
        tiles = block[: whole * TILE].to(dtype).view(whole, TILE, weight.shape[1])
        means[first : first + whole] = tiles.mean(1)
        if len(block) > whole * TILE:
            means[first + whole] = block[whole * TILE :].to(dtype).mean(0)
        del block, tiles  # before the next are made
    return means


def state_columns(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return the balance ``[D]`` of ``weight [V, D]`` against typical states ``[..., D]``.

    It is fixed with the index, so that a row is rounded alike in every batch.
    """
    return balance(hidden_states.detach().reshape(-1, weight.shape[1]), weight)


def _whitened(weight: Tensor, hidden_states: Tensor | None) -> Tensor:
    """Project rows in the metric of the logits on their leading directions: ``[V, 32]`` fp32."""
    metric = _metric(weight, hidden_states)
    second = metric.T @ _second_moments(weight) @ metric
    if not second.isfinite().all():
        raise ValueError("weight holds NaN or inf: its rows have no clusters.")
    projection = metric @ torch.linalg.eigh(second).eigenvectors[:, -_DIRECTIONS:]
    del metric, second  # before the rows, so that a narrow memory holds either
    return torch.cat([block.float() @ projection for block in weight.split(_BLOCK)])


def _metric(weight: Tensor, hidden_states: Tensor | None) -> Tensor:
    """Return a root of the states' second moments, ``[D, D]`` fp32; the identity without states."""
    dim = weight.shape[1]
    if hidden_states is None:
        return torch.eye(dim, device=weight.device)
    if hidden_states.shape[-1] != dim:
        raise ValueError(
            f"hidden_states {list(hidden_states.shape)}: last dimension must be the weight's "
            f"D={dim}."
        )
    # fp64, for rounding as coarse as TF32 leaves fewer states than D without a root
    wide = torch.float64 if weight.device.type in ("cpu", "cuda") else torch.float32
    states = hidden_states.detach().reshape(-1, dim).to(wide)
    moment = (states.T @ states).div_(max(len(states), 1))
    del states
    if not moment.isfinite().all():
        raise ValueError("hidden_states hold NaN or inf: give finite ones, or None.")
    ridge = _RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    moment.diagonal().add_(ridge)
    return torch.linalg.cholesky(moment).float()


def _second_moments(weight: Tensor) -> Tensor:
    """Sum ``w wᵀ`` over evenly spaced rows, a block of them at a time: ``[D, D]`` fp32."""
    total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    for ids in _even_ids(weight, _PROJECTION_ROWS).split(_BLOCK // 4):
        rows = weight.detach()[ids].float()
        total.addmm_(rows.T, rows)
    return total


def _clustered_order(rows: Tensor, report: Callable[[int, int], None]) -> Tensor:
    """Split at the median along the leading direction; only the last tile may be ragged."""
    done, placed, todo = [], 0, [torch.arange(len(rows), device=rows.device)]
    while todo:
        ids = todo.pop()
        if len(ids) <= TILE:
            done.append(ids)
            placed += len(ids)
            report(placed, len(rows))
            continue
        part = rows[ids]
        part = part - part.mean(0)
        leading = torch.linalg.eigh(part.T @ part).eigenvectors[:, -1]
        ids = ids[(part @ leading).argsort()]
        middle = max(1, round(len(ids) / 2 / TILE)) * TILE
        todo += [ids[middle:], ids[:middle]]
    return torch.cat(done)


def _hot_first(weight: Tensor, order: Tensor, states: Tensor) -> tuple[Tensor, int]:
    """Return the order with the hot tiles before the others, and how many they are.

    A tile is live for a state that gives it enough of what it does not give to its first tile,
    which stands for that of the label.
    """
    whole = len(order) // TILE
    if whole < _HOT_TILES:
        return order, 0
    states = states[:_HOT_STATES].detach().float()
    masses = [_tile_masses(states, weight, ids) for ids in order.split(_BLOCK)]
    shares = torch.softmax(torch.cat(masses, 1), 1)
    live = (shares > _LIVE * (1 - shares.amax(1, keepdim=True))).float().mean(0)
    most = live[:whole].topk(whole // _HOT_TILES)
    hot = most.indices[most.values >= _HOT_SHARE]
    is_hot = torch.zeros(whole, dtype=torch.bool, device=order.device).index_fill_(0, hot, True)
    tiles = order[: whole * TILE].view(whole, TILE)
    tail = order[whole * TILE :]
    return torch.cat([tiles[is_hot].flatten(), tiles[~is_hot].flatten(), tail]), len(hot)


def _tile_masses(states: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Return log-sum-exps of the logits of each tile of rows ``ids``: ``[S, tiles]``."""
    rows = weight.index_select(0, ids).float()
    logits = torch.nn.functional.pad(states @ rows.T, (0, -len(rows) % TILE), value=-torch.inf)
    return logits.unflatten(1, (-1, TILE)).logsumexp(-1)


def _quantise(weight: Tensor, index: VocabularyIndex, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise rows in tile order, balanced."""
    rows = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    for start in range(0, len(weight), _BLOCK):
        where = slice(start, start + _BLOCK)
        rows[where], scales[where] = quantise_rows(weight[index.order[where]], dtype, index.columns)
    return rows, scales


def _evenly(weight: Tensor, count: int) -> Tensor:
    """Return at most ``count`` evenly spaced rows, fp32."""
    return weight.detach()[_even_ids(weight, count)].float()


def _even_ids(weight: Tensor, count: int) -> Tensor:
    ids = torch.linspace(0, len(weight) - 1, min(count, len(weight)), device=weight.device)
    return ids.long()

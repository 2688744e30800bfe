"""The ids that a sampler kept for each token: as callers give them, checked, and some rows at a time.

Shapes: N tokens, E kept ids, R rows of a chunk, U different ids among theirs, W columns of their tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .inputs import KeptIds

TILE_BYTES = 32 << 20  # of the logits of a chunk; a reference doubles it
ROWS_OF_A_CHUNK = 2048
WHOLE_BYTES, WHOLE_BYTES_ON_A_GPU = 64 << 20, 384 << 20  # of a tile that has the whole vocabulary
IDS_OF_A_CHUNK = 2 << 20  # with repeated ones and padding; 24 bytes each
EVEN = 16  # a tile's width is a multiple of it, so that the kernels load 16 bytes at a time


def one_of(tokens: Any) -> Any:
    """One of the K tokens [..., K] of each row."""
    if not isinstance(tokens, Tensor) or tokens.dim() == 0:
        return tokens
    if tokens.shape[-1] == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; the last axis must be K >= 1 ids of a token")
    return tokens[..., 0].clamp(min=0)


def flat_ids(tokens: Tensor, one: Tensor) -> Tensor:
    """[N], or [N, K], int64."""
    return (tokens.reshape(-1) if one is tokens else tokens.reshape(-1, tokens.shape[-1])).long()


def require_offered(kept: Any, **options: Any) -> None:
    what = "tokens of shape (..., K)" if kept is None else "kept"
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} is given with {what}, for which it is not offered")


def require_kept(kept: Any, tokens: Tensor, vocabulary: int, mask: Tensor | None) -> KeptIds | None:
    """As tensors beside the tokens. Values are checked on a CPU, elsewhere only with SAFE_KERNELS_DEBUG=1."""
    if kept is None:
        return None
    if isinstance(kept, KeptIds):
        kept = KeptIds(*map(torch.as_tensor, kept))
    if isinstance(kept, Tensor):
        sets = from_dense(kept, tokens)
    elif isinstance(kept, tuple) and len(kept) == 2 and all(isinstance(x, Tensor) for x in kept):
        sets = KeptIds(*kept)
    elif isinstance(kept, list | tuple):
        sets = from_lists(kept, tokens)
    else:
        raise TypeError(
            f"kept is {type(kept).__name__}; it must be KeptIds, a tensor of ids (..., K) with -1 for none, or a list "
            "with the ids of each token"
        )
    for name, x in sets._asdict().items():
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"kept has {name} of dtype {x.dtype}; it must be torch.int64 or another integer dtype")
    checks.require_place("the ids of kept", sets.ids, (sets.ids.numel(),), "one axis", tokens.device)
    why = "where the ids of each token start, and the end"
    checks.require_place("the offsets of kept", sets.offsets, (tokens.numel() + 1,), why, tokens.device)
    if not torch.compiler.is_compiling() and (tokens.device.type == "cpu" or checks.debugging()):
        require_values(sets, vocabulary, mask)
    return sets


def from_dense(ids: Tensor, tokens: Tensor) -> KeptIds:
    if ids.shape[:-1] != tokens.shape or ids.dim() == 0:
        raise ValueError(f"kept has shape {tuple(ids.shape)}; it must be {(*tokens.shape, 'K')}, K ids a token")
    return KeptIds(ids.reshape(-1), torch.arange(tokens.numel() + 1, device=ids.device) * ids.shape[-1])


def from_lists(ids: Sequence[Any], tokens: Tensor) -> KeptIds:
    """Nested like the tokens; None where a token has no set."""
    for size in tokens.shape[1:]:
        if any(len(row) != size for row in ids):
            raise ValueError(f"kept has rows of other lengths than tokens, whose shape is {tuple(tokens.shape)}")
        ids = [each for row in ids for each in row]
    if len(ids) != tokens.numel() or tokens.dim() == 0:
        raise ValueError(
            f"kept has {len(ids)} lists for tokens of shape {tuple(tokens.shape)}; it must have one a token"
        )
    sets = [[] if each is None else list(each) for each in ids]
    counts = torch.tensor([0, *map(len, sets)], device=tokens.device)
    return KeptIds(
        torch.tensor([x for each in sets for x in each], dtype=torch.int64, device=tokens.device), counts.cumsum(0)
    )


def require_values(kept: KeptIds, vocabulary: int, mask: Tensor | None) -> None:
    """Ids of the vocabulary, or -1 for none; and no live token without any."""
    count, ids = len(kept.offsets) - 1, kept.ids
    bounds_of(kept)
    if mask is not None:  # what a masked token has is not read
        ids = ids.masked_fill(~mask.reshape(-1).repeat_interleave(kept.offsets.diff().long()), -1)
    low, high = (0, 0) if len(ids) == 0 else (int(x) for x in ids.aminmax())
    if low < -1 or high >= vocabulary:
        wrong = low if low < -1 else high
        raise ValueError(f"kept has the id {wrong}; it must be in [0, {vocabulary}), or -1 for none")
    ends = kept.offsets.long()
    if low < 0:
        ends = torch.nn.functional.pad((ids >= 0).cumsum(0, dtype=torch.int32), (1, 0))[ends]
    is_bare = ends.diff() == 0
    if mask is not None:
        is_bare &= mask.reshape(-1)
    if is_bare.any():
        row = int(is_bare.nonzero()[0])
        raise ValueError(f"kept has no id for token {row} of {count}; a token needs one at least, or to be masked")


def bounds_of(kept: KeptIds) -> list[int]:
    """The offsets on the host, which waits for the device."""
    bounds = kept.offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(kept.ids) or bounds != sorted(bounds):
        raise ValueError(
            f"kept has offsets from {bounds[0]} to {bounds[-1]}; they must rise from 0 to {len(kept.ids)}, the number "
            "of its ids"
        )
    return bounds


def kept_mask(kept: KeptIds, vocabulary: int) -> Tensor:
    """[N, V], True where a row kept an id."""
    count = len(kept.offsets) - 1
    rows_E = torch.repeat_interleave(torch.arange(count, device=kept.ids.device), kept.offsets.diff())
    is_kept = torch.zeros(count, vocabulary + 1, dtype=torch.bool, device=kept.ids.device)
    return is_kept.index_put_((rows_E, known_or_last(kept.ids, vocabulary)), is_kept.new_ones(()))[:, :vocabulary]


def known_or_last(ids: Tensor, vocabulary: int) -> Tensor:
    """int64; what is no id of the vocabulary becomes V."""
    ids = ids.long()
    return ids.where((ids >= 0) & (ids < vocabulary), vocabulary)


class Chunk(NamedTuple):
    """Rows whose kept ids are together few enough for a tile, in which each of them has a column."""

    rows: slice
    columns: slice  # from 0 to U
    width: int  # of the tile
    ids: Tensor | slice  # of the columns, int64 and rising; or all
    is_kept_RW: Tensor | None  # W > U: the last columns are nobody's; None: all are everybody's
    tokens_R: Tensor  # [R] or [R, K], the column of a token; -1 where it is outside of its set

    def ids_of(self, columns: slice) -> Tensor | slice:
        return columns if isinstance(self.ids, slice) else self.ids[columns]

    def fill_others(self, x_RW: Tensor, value: float) -> Tensor:
        """Fill what a row did not keep."""
        return x_RW if self.is_kept_RW is None else x_RW.masked_fill_(~self.is_kept_RW, value)


def chunks(kept: KeptIds | None, tokens_N: Tensor, vocabulary: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """Of tiles in `dtype`; without sets they have the whole vocabulary."""
    if kept is not None:
        yield from chunks_of_sets(kept, tokens_N, vocabulary, dtype)
        return
    size = WHOLE_BYTES if tokens_N.device.type == "cpu" else WHOLE_BYTES_ON_A_GPU
    height, count, everything = max(1, size // (vocabulary * dtype.itemsize)), len(tokens_N), slice(0, vocabulary)
    height = height // EVEN * EVEN or height
    for start in range(0, count, height):
        rows = slice(start, min(start + height, count))
        tokens_R = known_or_last(tokens_N[rows], vocabulary)
        yield Chunk(rows, everything, vocabulary, everything, None, tokens_R.masked_fill(tokens_R == vocabulary, -1))


def chunks_of_sets(kept: KeptIds, tokens_N: Tensor, vocabulary: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """Halves of rows, until their tile fits. The host waits for the device at each, to know how many ids there are."""
    bounds, count = bounds_of(kept), len(tokens_N)
    todo = [slice(start, min(start + ROWS_OF_A_CHUNK, count)) for start in range(0, count, ROWS_OF_A_CHUNK)][::-1]
    while todo:
        rows = todo.pop()
        height, ids_E = rows.stop - rows.start, kept.ids[bounds[rows.start] : bounds[rows.stop]]
        if len(ids_E) <= IDS_OF_A_CHUNK or height == 1:
            ids_E = known_or_last(ids_E, vocabulary)
            is_there = torch.zeros(vocabulary + 1, dtype=torch.bool, device=ids_E.device).index_fill_(0, ids_E, True)
            ids_U = is_there[:vocabulary].nonzero()[:, 0]
            if height * width_of(ids_U) * dtype.itemsize <= TILE_BYTES or height == 1:
                yield chunk_of(rows, kept.offsets[rows.start : rows.stop + 1], ids_E, ids_U, tokens_N[rows], vocabulary)
                continue
        middle = rows.start + height // 2
        todo += [slice(middle, rows.stop), slice(rows.start, middle)]


def width_of(ids_U: Tensor) -> int:
    return (len(ids_U) // EVEN + 1) * EVEN


def chunk_of(rows: slice, offsets: Tensor, ids_E: Tensor, ids_U: Tensor, tokens_R: Tensor, vocabulary: int) -> Chunk:
    height, used, device = len(tokens_R), len(ids_U), ids_E.device
    column_V = torch.full((vocabulary + 1,), used, device=device)
    column_V[ids_U] = torch.arange(used, device=device)
    rows_E = torch.repeat_interleave(torch.arange(height, device=device), offsets.diff(), output_size=len(ids_E))
    is_kept_RW = torch.zeros(height, width_of(ids_U), dtype=torch.bool, device=device)
    is_kept_RW.view(-1).index_fill_(0, rows_E * is_kept_RW.shape[1] + column_V[ids_E], True)
    is_kept_RW[:, used:] = False
    tokens_R = column_V[known_or_last(tokens_R, vocabulary)]
    is_inside = is_kept_RW.gather(1, tokens_R.view(height, -1)).view_as(tokens_R)
    return Chunk(rows, slice(0, used), is_kept_RW.shape[1], ids_U, is_kept_RW, tokens_R.where(is_inside, -1))

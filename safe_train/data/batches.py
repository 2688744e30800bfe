"""Prompts in, token batches out. Labels are shifted and response tokens chosen here and nowhere else.

Shape legend: N tokens of all sequences, L response tokens of all sequences, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from safe_kernels import KeptIds


@dataclass(frozen=True)
class TokenBatch:
    """Sequences laid end to end, without padding, and the positions that predict a response token."""

    input_ids_N: Tensor  # int64, prompt and completion of each sequence in turn
    position_ids_N: Tensor  # int64, 0 at the start of each sequence
    cu_seqlens: Tensor  # int32 [B + 1], boundaries of the sequences in N
    predict_L: Tensor  # int64, index in N of the state that predicts each response token
    targets_L: Tensor  # int64, the response tokens
    response_cu_seqlens: Tensor  # int32 [B + 1], boundaries of the sequences in L
    max_seqlen: int  # tokens of the longest sequence, on the host: reading it from the device would wait for it
    kept: KeptIds | None = None  # the ids that each response token was drawn from; None: from all

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        kept: Sequence[KeptIds] | None = None,
    ) -> TokenBatch:
        """Packs sequences; a completion may be empty, a prompt may not: its last token predicts the first response."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        predict: list[int] = []
        starts, response_starts = [0], [0]
        for prompt, completion in zip(prompts, completions, strict=True):
            if not prompt:
                raise ValueError("a prompt has no tokens; give it at least one, such as the BOS token")
            first = len(input_ids) + len(prompt) - 1
            predict += range(first, first + len(completion))
            input_ids += [*prompt, *completion]
            position_ids += range(len(prompt) + len(completion))
            starts.append(len(input_ids))
            response_starts.append(len(predict))
        ids_N, predict_L = torch.tensor(input_ids, dtype=torch.long), torch.tensor(predict, dtype=torch.long)
        return cls(
            input_ids_N=ids_N,
            position_ids_N=torch.tensor(position_ids, dtype=torch.long),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32),
            predict_L=predict_L,
            targets_L=ids_N[predict_L + 1],
            response_cu_seqlens=torch.tensor(response_starts, dtype=torch.int32),
            max_seqlen=max(position_ids, default=-1) + 1,
            kept=None if kept is None else joined_sets(kept),
        )

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same tokens [B, T] with one sequence a row, padded on the right; their mask; and `predict_L` in B x T."""
        lengths_B = self.cu_seqlens.diff().long()
        row_N = torch.arange(len(lengths_B), device=lengths_B.device)
        row_N = row_N.repeat_interleave(lengths_B, output_size=len(self.input_ids_N))
        ids_BT = self.input_ids_N.new_zeros(len(lengths_B), self.max_seqlen)
        mask_BT = torch.zeros_like(ids_BT)
        ids_BT[row_N, self.position_ids_N] = self.input_ids_N
        mask_BT[row_N, self.position_ids_N] = 1
        return ids_BT, mask_BT, (row_N * self.max_seqlen + self.position_ids_N)[self.predict_L]

    def to(self, device: torch.device) -> TokenBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: x.to(device, non_blocking=True) for name, x in values.items() if isinstance(x, Tensor)
        }
        if self.kept is not None:
            moved["kept"] = KeptIds(*(x.to(device, non_blocking=True) for x in self.kept))
        return TokenBatch(**values | moved)


def joined_sets(parts: Sequence[KeptIds]) -> KeptIds:
    """The sets of the tokens of all parts, in their order."""
    counts = [part.offsets.diff() for part in parts]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), *counts]).cumsum(0)
    return KeptIds(torch.cat([torch.zeros(0, dtype=torch.long), *(part.ids for part in parts)]), offsets)


def through_first_eos(completion: Sequence[int], eos_ids: Iterable[int]) -> tuple[list[int], bool]:
    """The completion up to and including its first end token, and whether it has one."""
    ends = set(eos_ids)
    for i, token in enumerate(completion):
        if token in ends:
            return list(completion[: i + 1]), True
    return list(completion), False


@dataclass
class MicroBatch:
    """Sequences that pass through the model together, drawn once a rollout and kept so by every inner epoch: the same
    composition gives the same bits, so the ratio before the first optimizer step is exactly 1.
    """

    batch: TokenBatch
    indices: list[int]  # of its sequences in the rollout; none in a micro-batch that only fills up
    sampler_logprob_L: Tensor
    ref_hidden_LH: Tensor
    logprob_L: Tensor
    entropy_L: Tensor
    ref_logprob_L: Tensor
    kl_L: Tensor
    values_KL: Tensor  # K = 0 without a critic
    target_values_KL: Tensor
    advantage_L: Tensor
    returns_L: Tensor
    is_scored_L: Tensor  # False where no reward applies to the completion
    later_cost_L: Tensor  # of the KL of later states, with kl_gradient return
    unusual_cost_L: Tensor  # the part of it that a critic has to predict
    kl_charge_L: Tensor  # the part of it that the advantage is charged with
    teacher: dict[str, Any]  # what `linear_distillation_loss` takes of a teacher; empty without one
    sampled_from: dict[str, Any]  # and of the policy that sampled, with a trust region

    @property
    def place_L(self) -> Tensor:
        """The completion of the rollout and the position in its response of each token [2, L]."""
        boundaries = self.batch.response_cu_seqlens.long()
        tokens_L = torch.arange(len(self.batch.targets_L), device=boundaries.device)
        sequence_L = torch.searchsorted(boundaries, tokens_L, right=True) - 1
        completions = boundaries.new_tensor(self.indices or [0])
        return torch.stack([completions[sequence_L], tokens_L - boundaries[sequence_L]])


def microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of consecutive sequences grouped so that a group holds at most `max_tokens` tokens, or one sequence."""
    groups: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(i)
        room -= length
    return groups


def padded_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the sequences, the longest first, in groups that hold at most `max_tokens` tokens when padded, or one
    sequence."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def balanced(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Indices of the sequences, cut over ranks and then over micro-batches, each time balanced by tokens.

    A micro-batch holds at most `max_tokens` tokens, or one sequence. Every rank gets the same number of micro-batches,
    as sharded models need; only a rank with fewer sequences than that gets empty ones.
    """
    shares = longest_first(range(len(lengths)), lengths, ranks)
    heaviest = max((sum(lengths[i] for i in share) for share in shares), default=0)
    count = max(1, -(-heaviest // max_tokens))
    while True:
        cuts = [longest_first(share, lengths, count) for share in shares]
        if all(len(group) <= 1 or sum(lengths[i] for i in group) <= max_tokens for cut in cuts for group in cut):
            return cuts
        count += 1


def balanced_rows(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """The same for padded micro-batches, of sequences of like length; a rank may have more of them than another."""
    shares = longest_first(range(len(lengths)), lengths, ranks)
    cuts = [padded_microbatches([lengths[i] for i in share], max_tokens) for share in shares]
    return [[[share[j] for j in group] for group in cut] for share, cut in zip(shares, cuts, strict=True)]


def longest_first(indices: Iterable[int], lengths: Sequence[int], groups: int) -> list[list[int]]:
    """`groups` groups in the order of `indices`; the longest sequence goes first, each into the lightest group."""
    chosen: list[list[int]] = [[] for _ in range(groups)]
    tokens = [0] * groups
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        lightest = min(range(groups), key=lambda g: (tokens[g], len(chosen[g])))
        chosen[lightest].append(i)
        tokens[lightest] += lengths[i]
    return [sorted(group) for group in chosen]

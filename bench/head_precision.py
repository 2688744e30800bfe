"""What the precision of the head's factors costs: errors against float64, on any machine.

A GPU multiplies float32 factors as `torch.set_float32_matmul_precision` says. `high` rounds them to TF32 (10 bits of
mantissa), `medium` to bfloat16 (7), and both sum in float32. Here they are rounded first, and then multiplied exactly
and summed in float32, which has the same errors on every machine.

    python bench/head_precision.py [--tokens N]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from safe_kernels import linear_token_stats

WIDTH, VOCABULARY = 2048, 151_936
MANTISSA = {"highest": 23, "high": 10, "medium": 7}
RESULTS = ("logprob", "entropy", "kl")


def rounded(x: Tensor, bits: int) -> Tensor:
    """x with so many bits of mantissa, to the nearest, ties to even."""
    drop = 23 - bits
    if drop == 0:
        return x
    pattern = x.view(torch.int32)
    last = (pattern >> drop) & 1
    return ((pattern + (1 << (drop - 1)) - 1 + last) >> drop << drop).view(torch.float32)


def found(case: dict[str, Any]) -> dict[str, Tensor]:
    leaf = case["hidden"].clone().requires_grad_()
    stats = linear_token_stats(**case | {"hidden": leaf})
    assert stats.kl is not None
    (gradient,) = torch.autograd.grad((stats.logprob + 0.01 * stats.entropy - 0.1 * stats.kl).sum(), leaf)
    return {name: getattr(stats, name).detach() for name in RESULTS} | {"hidden gradient": gradient}


def errors(tokens: int, spread: float) -> dict[str, dict[str, float]]:
    """Largest errors; that of the gradient is relative to its largest entry. `spread` of the logits."""
    draw = torch.Generator().manual_seed(0)
    case: dict[str, Any] = {"hidden": torch.randn(tokens, WIDTH, generator=draw)}
    case["weight"] = torch.randn(VOCABULARY, WIDTH, generator=draw) * (spread / WIDTH**0.5)
    case["ref_hidden"] = case["hidden"] + 0.1 * torch.randn(tokens, WIDTH, generator=draw)
    case["tokens"] = torch.randint(VOCABULARY, (tokens,), generator=draw)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    exact, table = found(wide), {}
    for precision, bits in MANTISSA.items():
        here = {name: rounded(x, bits) if x.is_floating_point() else x for name, x in case.items()}
        table[precision] = {name: (x - exact[name]).abs().max().item() for name, x in found(here).items()}
        table[precision]["hidden gradient"] /= exact["hidden gradient"].abs().max().item()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    tokens = parser.parse_args().tokens
    print(f"{tokens} tokens, H = {WIDTH}, V = {VOCABULARY}; float32 factors")
    for spread in (2.0, 8.0):
        for precision, row in errors(tokens, spread).items():
            print(f"logits of {spread:g}  {precision:8s}", "  ".join(f"{name} {x:.1e}" for name, x in row.items()))


if __name__ == "__main__":
    main()

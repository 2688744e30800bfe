"""What the processes of a run tell each other. For a process that is alone, everything here is the identity.

A function that exchanges something has to be reached by all processes, in the same order.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TextIO, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, patch_environment
from torch import Tensor, nn
from tqdm import tqdm

from safe_train.config import ConfigError, SafeConfig

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
BUCKET_BYTES = 64 * 2**20  # gradients that are summed in one exchange: large enough for bandwidth, small beside a model

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # how many processes mpirun started

T = TypeVar("T")
P = ParamSpec("P")


def start(args: SafeConfig) -> Accelerator:
    """Joins the processes that `accelerate launch` or torchrun started, if any."""
    trackers = ["all", *map(str, get_available_trackers())]
    for name in args.report_to:
        if name not in trackers:
            raise ConfigError(f"report_to {name} needs a package of that name; here it can be {', '.join(trackers)}")
    # Hidden from accelerate, which would tell transformers of DeepSpeed: it would partition models, and sample in step.
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"), joining():
        accelerator = Accelerator(
            cpu=args.use_cpu,
            mixed_precision="no",
            log_with=args.report_to or None,
            project_dir=args.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
        )
    check_launch()
    if not is_main():
        silence_bars()
    if accelerator.distributed_type not in SUPPORTED:
        known = ", ".join(kind.value for kind in SUPPORTED)
        raise ConfigError(f"distributed_type must be one of {known}, got {accelerator.distributed_type.value}")
    if args.prompts_per_step < size():
        raise ConfigError(
            f"prompts_per_step must be at least the {size()} processes: each samples some, got {args.prompts_per_step}"
        )
    return accelerator


def silence_bars() -> None:
    """Those of transformers and datasets, which all processes would draw over one another."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def leave() -> None:
    """Ends the group that this process joined; for processes that have all come to their end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def check_launch() -> None:
    """Says when fewer processes work together than were started, or were asked for."""
    is_launched = "LOCAL_RANK" in os.environ
    names = ("WORLD_SIZE", *MPI_SIZES) if is_launched else MPI_SIZES
    started = max(int(os.environ.get(name, 1)) for name in names)
    if started > size():
        raise ConfigError(
            f"{started} processes were started, and this one works in a group of {size()}: each group would do the "
            "whole run again. Start them by `accelerate launch` or torchrun; on CPUs set use_cpu=true"
        )
    # accelerate's launcher for one process sets an address where it was asked for several.
    if not is_launched and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        print(
            "warning: accelerate launch was asked for several processes and started this one alone, which does the "
            "whole run. On CPUs, `torchrun --nproc-per-node 2 -m safe_train.cli run ... use_cpu=true` starts several; "
            "on GPUs, `accelerate launch --multi_gpu`",
            flush=True,
        )


@contextmanager
def joining() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        port = os.environ.get("MASTER_PORT", "")
        advice = "give another: accelerate launch --main_process_port, torchrun --master-port"
        if "EADDRINUSE" not in str(error) and "in use" not in str(error):
            advice = "is MASTER_ADDR the first machine, and may the others reach it?"
        raise ConfigError(f"the processes cannot meet at port {port}: {error}; {advice}") from error


def flag(name: str) -> bool:
    """A switch that `accelerate launch` passes on in the environment."""
    return os.environ.get(name, "false").lower() == "true"


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def say(*lines: str, file: TextIO | None = None) -> None:
    """Prints the lines that are not empty, on the first process, above the bars that are on the screen."""
    for line in filter(None, lines if is_main() else ()):
        with tqdm.external_write_mode(file=file or sys.stdout):
            print(line, file=file, flush=True)


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items: consecutive ones, and at most one more than another process has."""
    start, end = (len(items) * r // size() for r in (rank(), rank() + 1))
    return items[start:end]


class Apart(RuntimeError):
    """The processes are no longer in step: none of them can ask the others anything."""


class StoppedTogether(RuntimeError):
    """One process failed, and all of them are at the same place."""


@contextmanager
def exchange() -> Iterator[None]:
    """Says what it means when an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        raise Apart(
            f"process {rank()} lost the others: one of them stopped, and its own output says why, or did not answer "
            f"within ddp_timeout seconds ({error})"
        ) from error


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if size() == 1:
        return values
    with exchange():
        result = values.detach().to(PartialState().device, copy=True)
        dist.all_reduce(result)
    return result.to(values.device)


def total_number(value: float) -> float:
    return value if size() == 1 else total(torch.tensor(value, dtype=torch.float64)).item()


def totals(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all processes of 0-dim tensors, in one exchange."""
    if size() == 1:
        return values
    return dict(zip(values, total(torch.stack(list(values.values()))).unbind(), strict=True))


def maxima(values: dict[str, float]) -> dict[str, float]:
    """The largest of each value over all processes: the slowest one's time, the fullest one's memory."""
    found = gather_objects(values)
    return {name: max(each[name] for each in found) for name in values}


def gather(values: Tensor) -> Tensor:
    """The tensors of all processes one after another along the last axis, in which they may differ."""
    if size() == 1:
        return values
    length = values.shape[-1]
    lengths = gather_objects(length)
    with exchange():
        padded = values.new_zeros(*values.shape[:-1], max(lengths), device=PartialState().device)
        padded[..., :length] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
    return torch.cat([part[..., :n] for part, n in zip(parts, lengths, strict=True)], dim=-1).to(values.device)


def gather_objects(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with exchange():
        dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's value, for all processes."""
    if size() == 1:
        return value
    values = [value]
    with exchange():
        dist.broadcast_object_list(values)
    return values[0]


def cpu_on_main(tensor: Tensor) -> Tensor:
    """The tensor, on the CPU of rank 0, and an empty one elsewhere."""
    return tensor.cpu() if is_main() else tensor.new_empty(0, device="cpu")


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """Rank 0 alone runs the function, while the others wait; when it fails, all of them stop."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        error: Exception | None = None
        if is_main():
            try:
                function(*arguments, **options)
            except Exception as caught:
                error = caught
        message = from_main(f"{type(error).__name__}: {error}" if error else None)
        is_mistake = from_main(isinstance(error, ConfigError))
        if error is not None:
            raise error
        if message is not None:
            raise (ConfigError if is_mistake else RuntimeError)(f"process 0 stopped with {message}")

    return run


@contextmanager
def together(place: str) -> Iterator[None]:
    """An exception inside on one process stops all of them at the end, where each has to come."""
    if size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Apart:
        raise
    except Exception as caught:
        error = caught
    messages = meet(place, f"{type(error).__name__}: {error}" if error else None)
    failed = [f"process {i} stopped in {place} with {message}" for i, message in enumerate(messages) if message]
    if failed:
        raise StoppedTogether("; ".join(failed)) from error


def meet(place: str, message: str | None = None) -> list[str | None]:
    """The messages of all processes, which have to be at the same place: one alone would wait for the others."""
    try:
        found = gather_objects((place, message))
    except Apart as error:
        raise Apart(f"{place} takes all processes, so each of them has to come here, too: {error}") from error
    places = [each for each, _ in found]
    if len(set(places)) > 1:
        where = "; ".join(f"process {number} is in {each}" for number, each in enumerate(places))
        raise Apart(f"{where}. Each takes all processes: call it on every process, not under `if is_main_process`")
    return [each for _, each in found]


def check_same(values: dict[str, Any]) -> None:
    """Raises when the processes have drifted apart."""
    by_rank = gather_objects({name: repr(value) for name, value in values.items()})
    for name in values:
        if len({each[name] for each in by_rank}) > 1:
            raise RuntimeError(
                f"the processes disagree on {name}: {[each[name] for each in by_rank]}. They must run the same "
                "versions, and see the same output_dir, on a file system that all machines share"
            )


@torch.no_grad()
def broadcast(parameters: Iterable[nn.Parameter]) -> None:
    """Rank 0's weights, for all processes."""
    if size() == 1:
        return
    with exchange():
        for parameter in parameters:
            sent = parameter.detach().to(PartialState().device, copy=True)
            dist.broadcast(sent, src=0)
            parameter.copy_(sent)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the gradients over all processes, once a step however many micro-batches each of them had.

    A parameter that got a gradient on one process gets one on all.
    """
    if size() == 1:
        return
    parameters = list(parameters)
    found = total(torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32))
    for bucket in buckets([p for p, count in zip(parameters, found.tolist(), strict=True) if count]):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in bucket if p.grad is not None]
        summed = total(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, up to `BUCKET_BYTES` together."""
    found: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        needed = parameter.numel() * parameter.element_size()
        if not found or needed > room or parameter.dtype != found[-1][0].dtype:
            found.append([])
            room = BUCKET_BYTES
        found[-1].append(parameter)
        room -= needed
    return found

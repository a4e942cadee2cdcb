"""Runs with several processes, on one machine or many: `torchrun --nproc-per-node=G -m sslfast.train ...`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from sslfast.errors import UserError
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer

FAILURES = "failures"  # key of the processes' store
FAILED_ELSEWHERE = "another process of this run failed first; its message says why"


def has_several_processes() -> bool:
    """True if the run has more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def was_restarted(reducer: Reducer, device: torch.device) -> bool:
    """True if torchrun restarted any process after a failure. The run then resumes from its last checkpoint."""
    restarted = has_several_processes() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return int(reducer.sum(torch.tensor(int(restarted), device=device))) > 0


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[Reducer, torch.device]]:
    """Joins the processes of the run for the duration of the block. Yields their reducer and this process's device.

    If one of them raises a UserError, the others end as well, and say only that it did.

    Raises:
        UserError: this machine has fewer GPUs than processes; or another process has failed.
    """
    if not has_several_processes():
        yield SINGLE_PROCESS, device
        return
    if device.type == "cuda":
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            raise UserError(
                f"torchrun started process {local + 1} on a machine with {here} GPUs; "
                f"use --nproc-per-node={here}, or --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # harmless: the two layouts of a 1x1x1 kernel are the same bytes
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        # torchrun keeps its store over a restart; without a prefix, new processes would find the addresses of dead ones
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield Reducer(dist.group.WORLD), device
    except (UserError, OSError) as error:
        if _failures(store, 1) > 1:
            raise UserError(FAILED_ELSEWHERE) from error
        raise
    except RuntimeError as error:  # perhaps a sum with a process that has ended
        if _failures(store, 0) > 0:
            raise UserError(FAILED_ELSEWHERE) from error
        raise
    finally:
        dist.destroy_process_group()


def _failures(store: dist.Store, more: int) -> int:
    """How many processes have raised an error, with these; also after the one that holds the store has ended."""
    try:
        return store.add(FAILURES, more)
    except RuntimeError:
        return more + 1


def of_all_processes(values: Sequence[str], reducer: Reducer) -> list[str]:
    """The values of all processes, each once. Every process must call it."""
    if reducer.size == 1:
        return list(dict.fromkeys(values))
    everyone: list[list[str]] = [[] for _ in range(reducer.size)]
    dist.all_gather_object(everyone, [*values], group=reducer.group)
    return list(dict.fromkeys(value for of_one in everyone for value in of_one))


@contextlib.contextmanager
def first_process_first(reducer: Reducer) -> Iterator[None]:
    """Runs the block in the first process, then in the others, which find its files in the shared cache."""
    if reducer.size > 1 and reducer.rank > 0:
        dist.barrier(group=reducer.group)
    yield
    if reducer.size > 1 and reducer.rank == 0:
        dist.barrier(group=reducer.group)

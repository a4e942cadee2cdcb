"""Runs with several processes, on one machine or many: `torchrun --nproc-per-node=G -m sslfast.train ...`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from sslfast.errors import UserError
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer

FAILURE = "failure"  # key of the processes' store: rank and message of the first that failed
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

    If one of them raises a UserError, the others end as well. A message is that of the first process that has it.

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
        mine = f"{rank} {error}"
        with contextlib.suppress(RuntimeError):  # if the process that holds the store has ended
            first = store.compare_set(FAILURE, "", mine).decode()
            if first != mine and first.partition(" ")[2] == str(error):
                raise UserError(FAILED_ELSEWHERE) from error
        raise
    except RuntimeError as error:  # perhaps a sum with a process that has ended
        try:
            elsewhere = store.check([FAILURE])
        except RuntimeError:
            elsewhere = True
        if elsewhere:
            raise UserError(FAILED_ELSEWHERE) from error
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first(reducer: Reducer) -> Iterator[None]:
    """Runs the block in the first process, then in the others, which find its files in the shared cache."""
    if reducer.size > 1 and reducer.rank > 0:
        dist.barrier(group=reducer.group)
    yield
    if reducer.size > 1 and reducer.rank == 0:
        dist.barrier(group=reducer.group)

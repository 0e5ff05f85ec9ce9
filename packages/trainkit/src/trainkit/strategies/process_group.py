"""What ranks say to each other: numbers, tensors and plain data; never objects."""

from __future__ import annotations

import atexit
import json
import os
import time
import traceback
import weakref
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common_platform.errors import CollectiveMismatch, ConfigError, DistError, RankLost, RendezvousTimeout
from trainkit.strategies import roll_call
from trainkit.strategies.launch import FAILED

OPERATIONS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
MOST_WORDS = 120  # of a library's own error
LET_GO_S = 5.0  # for threads of an operation that failed; others take a moment
REQUIRED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def join_group(backend: str, rendezvous_timeout: timedelta, timeout: timedelta) -> None:
    """Find the other ranks, as the environment names them.

    Raises:
        ConfigError: the environment does not name them.
        RendezvousTimeout: some did not come in time; they are named.
    """
    if dist.is_initialized():
        return
    missing = [name for name in REQUIRED if name not in os.environ]
    if missing:
        raise ConfigError("environment", f"no {', '.join(missing)}", "what torchrun sets")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = _meet(rank, world_size, rendezvous_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=rendezvous_timeout)
        barrier("the start", rendezvous_timeout)
        dist.distributed_c10d._set_pg_timeout(timeout)
    except RuntimeError as error:  # torch's own are of this kind
        if isinstance(error, RendezvousTimeout):
            raise
        raise _did_not_come("some", world_size, rendezvous_timeout) from error
    atexit.register(_leave)
    _call_roll(rank, world_size)


def _meet(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The job's store, when every rank has come to it."""
    try:
        keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        store = roll_call.store_of_job(rank, world_size, timeout, keeps=keeps)
    except RuntimeError as error:
        raise _did_not_come("rank 0 or the launcher", world_size, timeout) from error
    here = {other: f"here/{other}" for other in range(world_size)}
    store.set(here[rank], "")
    try:
        store.wait(list(here.values()), timeout)
    except RuntimeError as error:
        absent = [str(other) for other, name in here.items() if not store.check([name])]
        raise _did_not_come(f"rank {', '.join(absent)}", world_size, timeout) from error
    return store


def _did_not_come(who: str, world_size: int, timeout: timedelta) -> RendezvousTimeout:
    return RendezvousTimeout("ranks", f"{who} of {world_size} did not come", f"all within {timeout}",
                             flag="rendezvous_timeout")  # fmt: skip


_roll: roll_call.RollCall | None = None


def _call_roll(rank: int, world_size: int) -> None:
    global _roll
    connect = partial(roll_call.store_of_job, rank, world_size, timedelta(seconds=30), keeps=False)
    _roll = roll_call.RollCall(connect, rank, world_size)
    _roll.begin()


def advance() -> None:
    """This rank has come to its next operation: those that wait for it learn how far it is."""
    if _roll is not None:
        _roll.advance()


def report(error: BaseException) -> None:
    """Tell the other ranks why this one ends, unless it ends because of another."""
    if _roll is not None and not isinstance(error, DistError):
        _roll.report(error)


def explained(error: BaseException) -> RankLost | None:
    """``error`` of a user's hook, of forward or of backward, where it comes from an operation of the group."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RankLost):
            return None if cause is error else cause
        if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and "/gloo/" in str(cause)):
            found = _lost("an operation of all ranks", cause)
            found.__cause__ = cause
            return found
        cause = cause.__cause__
    return None


def _lost(what: str, error: BaseException) -> RankLost:
    reason = str(error).splitlines()[0][:MOST_WORDS]
    who = _roll.missing() if _roll is not None else "some rank is gone"
    code = FAILED if roll_call.ENDED in who else None
    return RankLost(what, reason, code=code, message=f"{what}: {who}; allowed all ranks, in time ({reason})")


def _leave() -> None:
    """Leave the group while Python still runs, and once its threads have let go of our tensors.

    A thread of Gloo does so a moment after an operation is done, and needs the interpreter for it: one that comes when
    that is gone is ended by force, and the process with it ("terminate called without an active exception").
    Destroying the group does not end its threads where a ``DistributedDataParallel`` has used it.
    """
    if _roll is not None:
        _roll.end()
    if not dist.is_initialized():
        return
    deadline = time.monotonic() + LET_GO_S
    while any(reference() is not None for reference in _lent) and time.monotonic() < deadline:
        time.sleep(0.001)
    dist.destroy_process_group()


def reduce(value: Tensor, how: str) -> Tensor:
    """``value`` of all ranks as one.

    Raises:
        ConfigError: ``how`` is unknown.
        RankLost: another rank is gone.
    """
    if how not in OPERATIONS:
        raise ConfigError("reduce", how, f"one of {tuple(OPERATIONS)}")
    found = value.detach().clone()
    _run("all_reduce", dist.all_reduce, found, OPERATIONS[how])
    return found / dist.get_world_size() if how == "mean" else found


def all_gather(data: Any) -> Any:
    """Tensors of all ranks, in whatever they stand: each ``[...]`` becomes ``[ranks, ...]``."""
    if isinstance(data, Tensor):
        found = [torch.empty_like(data) for _ in range(dist.get_world_size())]
        _run("all_gather", dist.all_gather, found, data.detach().contiguous())
        return torch.stack(found)
    if isinstance(data, Mapping):
        return {key: all_gather(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(all_gather(value) for value in data)
    return all_gather(torch.tensor(data)) if isinstance(data, int | float) else data


def gather_plain(value: Any) -> list[Any]:
    """``value``, plain data, of every rank."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_gather(torch.tensor([content.numel()])).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: content.numel()] = content
    rows = all_gather(padded)
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_plain(value: Any) -> Any:
    """The first rank's ``value``, plain data."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([content.numel()])
    _run("broadcast", dist.broadcast, size, 0)
    if dist.get_rank() != 0:
        content = torch.empty(int(size), dtype=torch.uint8)
    _run("broadcast", dist.broadcast, content, 0)
    return json.loads(content.numpy().tobytes())


def barrier(name: str, timeout: timedelta | None = None) -> None:
    """Wait for all ranks; a rank that does not come is named."""
    if dist.get_backend() == "gloo":
        _run(f"barrier {name}", dist.monitored_barrier, None, timeout)
    else:
        _run(f"barrier {name}", dist.barrier)


def average_gradients(parameters: list[Tensor]) -> None:
    """Each gradient becomes its mean over ranks; they travel together, one message a dtype.

    Raises:
        CollectiveMismatch: the ranks do not have gradients of the same parameters.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    count = torch.tensor([float(len(gradients)), -float(len(gradients))])
    if (highest := reduce(count, "max"))[0] != -highest[1]:
        raise CollectiveMismatch("manual_backward", f"{len(gradients)} gradients", "as many on every rank")
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        chosen = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = reduce(torch.cat([gradient.flatten() for gradient in chosen]), "mean")
        parts = torch.split(flat, [gradient.numel() for gradient in chosen])
        for gradient, part in zip(chosen, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


_lent: list[weakref.ref[Tensor]] = []  # what operations were given, until the group's threads let go of it


def _run(what: str, operation: Any, *arguments: Any) -> None:
    advance()
    _lent[:] = [reference for reference in _lent if reference() is not None]
    try:
        operation(*(_lend(argument) for argument in arguments))
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)  # which hold what was lent
        raise _lost(what, error) from error


def _lend(argument: Any) -> Any:
    """``argument`` in tensors of their own over the same memory, so that it shows when the group's threads are done."""
    if isinstance(argument, list):
        return [_lend(one) for one in argument]
    if not isinstance(argument, Tensor):
        return argument
    lent = argument.detach()
    _lent.append(weakref.ref(lent))
    return lent

"""What the processes of one run, its ranks, say to each other. A single process says nothing.

Every rank holds the whole batch and all columns of a rollout. Only forward passes are shared out:
a rank computes its rows, then all ranks gather the columns or add up the gradients. So whatever
looks at a whole batch (whitening, a group's advantages, the KL controller, early stops) is the code
of a single process, and ranks cannot disagree about it. Rank 0 writes files and prints.

Before every exchange the ranks agree that none has failed. An error on one rank is therefore the
error of every rank, and names the rank. Ranks that stay silent for $RLHF_CORE_TIMEOUT seconds
(1800) end the run, too.

Left out: the exchange of gradients of sharded weights, see models/shard.py.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

_state: dict[str, Any] = {
    "alone": False,
    "idle": False,
    "lockstep": False,
    "waits": 0,
    "shared": None,
}


class RankError(RuntimeError):
    """Another rank has ended or does not answer."""


def launched() -> int:
    """How many processes a launcher such as torchrun has started for one run; 1 without one."""
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"WORLD_SIZE must be a number of processes, got {size!r}")
    return int(size)


def start() -> None:
    """Join the other processes of torchrun; nothing happens in a single process.

    Call it before a model is put on a GPU: it picks the one of this process.

    Raises:
        ValueError: a variable of the environment is missing or malformed.
    """
    if launched() == 1 or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {launched()}, but {' and '.join(missing)} are not set: start the "
            "processes with torchrun --nproc-per-node N -m rlhf_core COMMAND, or unset WORLD_SIZE"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    store, own_rank, world = next(rendezvous("env://", timeout=_timeout()))
    # The store outlives processes that torchrun starts again; their addresses must not.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    options = dict(store=store, rank=own_rank, world_size=world, timeout=_timeout())
    dist.init_process_group(backend, **options)


def check_started() -> None:
    """Raise ValueError if a launcher has started several processes that do not know each other."""
    if launched() > 1 and not dist.is_initialized():
        raise ValueError(
            f"WORLD_SIZE is {launched()}: several processes were started for one run. Call "
            "rlhf_core.distributed.start() first, so that they share its work, or unset WORLD_SIZE"
        )


def size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The place of this process among the ranks, from 0 on."""
    return dist.get_rank() if size() > 1 else 0


def _timeout() -> datetime.timedelta:
    text = os.environ.get("RLHF_CORE_TIMEOUT", "1800")
    try:
        seconds = float(text)
        if not 0 < seconds < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"RLHF_CORE_TIMEOUT must be a number of seconds above 0, got {text!r}"
        ) from None
    return datetime.timedelta(seconds=seconds)


@functools.cache
def _control(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of the ranks for values on the CPU; group: the default one, which it belongs to."""
    return dist.new_group(backend="gloo", timeout=_timeout())


def _cpu_group() -> dist.ProcessGroup:
    return _control(dist.group.WORLD)


# ---- shares


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank computes every row itself; all ranks must enter together."""
    before, _state["alone"] = _state["alone"], True
    try:
        yield
    finally:
        _state["alone"] = before


def set_lockstep(on: bool) -> None:
    """Make every rank run equally many forward passes: those of sharded weights are exchanges."""
    _state["lockstep"] = on


def idle() -> bool:
    """Whether this rank runs a forward pass only to keep step: nothing that it computes counts."""
    return _state["idle"]


def _ranks() -> int:
    return 1 if _state["alone"] else size()


def share(n: int) -> slice:
    """The rows of this rank, of n: consecutive ones, in the order of the ranks."""
    me = 0 if _state["alone"] else rank()
    return slice(n * me // _ranks(), n * (me + 1) // _ranks())


def shares(n: int, at_once: int | None = None) -> Iterator[slice]:
    """This rank's rows of n, in slices of at most `at_once` rows; all at once by default.

    In lockstep all ranks get equally many slices. Those that a rank lacks are row 0, and it is
    `idle` while it works on one.
    """
    own, longest = share(n), math.ceil(n / _ranks())
    at_once = at_once or max(longest, 1)
    starts = range(own.start, own.stop, at_once)
    for start_row in starts:
        yield slice(start_row, min(start_row + at_once, own.stop))
    if not _state["lockstep"] or _ranks() == 1:
        return
    for _ in range(math.ceil(longest / at_once) - len(starts)):
        _state["idle"] = True
        try:
            yield slice(0, 1)
        finally:
            _state["idle"] = False


# ---- errors


@contextlib.contextmanager
def together(local: bool = False) -> Iterator[None]:
    """What one rank raises inside, every rank raises at the end.

    In lockstep the other ranks may wait for this one inside a forward pass, so its error ends it,
    and theirs is then a `RankError`; unless the block is `local`, without exchanges.
    """
    try:
        yield
    except Exception as error:
        known = is_shared(error) or isinstance(error, RankError)
        if size() > 1 and not known and (local or not _state["lockstep"]):
            _agree(error)
        raise
    if size() > 1:
        _agree(None)


def _agree(error: Exception | None) -> None:
    """Raise the error of the first rank that has one; `error` is that of this rank."""
    if _state["alone"]:
        if error is not None:
            raise error
        return
    failed = torch.tensor([0 if error is None else 1])
    with _waiting():
        dist.all_reduce(failed, group=_cpu_group())
    if not failed:
        return
    found = _gather_objects(None if error is None else (type(error), str(error)))
    first = next(i for i, row in enumerate(found) if row is not None)
    if error is not None and (first == rank() or all(row == found[first] for row in found)):
        _state["shared"] = error
        raise error  # with its traceback; if all ranks say the same, it is no matter of a rank
    _state["shared"] = raised = error_of(first, *found[first])
    raise raised


def error_of(rank: int, kind: type[BaseException], text: str) -> BaseException:
    """An error of another rank; a RuntimeError if its type has another constructor."""
    try:
        return kind(f"rank {rank}: {text}")
    except Exception:
        return RuntimeError(f"rank {rank}: {kind.__name__}: {text}")


def is_shared(error: BaseException) -> bool:
    """Whether every rank has raised this error, so that one of them should print it."""
    return _state["shared"] is error


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Wait inside for the other ranks. If that fails, say which rank is the cause."""
    _state["waits"] += 1
    begun, limit = time.monotonic(), _timeout().total_seconds()
    try:
        yield
    except RuntimeError as error:
        key = f"rlhf_core/waits/{_state['waits']}"
        missing = _absent(key)
        if not missing:
            raise
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        if time.monotonic() - begun < limit:
            raise RankError(f"{who} ended: see the message of its process") from error
        raise RankError(f"{who} did not answer for {limit:g} s, see RLHF_CORE_TIMEOUT") from error


def _absent(key: str) -> list[int]:
    """The ranks that do not set a key of their own within a second, after an exchange failed."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{key}/{rank()}", "")
        time.sleep(1)
        return [i for i in range(size()) if not store.check([f"{key}/{i}"])]
    except RuntimeError:  # the store has ended with its rank
        return [i for i in range(size()) if i != rank()]


# ---- exchanges


def _gather_objects(x: Any) -> list:
    found: list[Any] = [None] * size()
    with _waiting():
        dist.all_gather_object(found, x, group=_cpu_group())
    return found


def gather_objects(x: Any) -> list:
    """The objects of all ranks, which are pickled, in the order of the ranks."""
    if _ranks() == 1:
        return [x]
    _agree(None)
    return _gather_objects(x)


def from_rank_0(x: Any) -> Any:
    """Rank 0's object."""
    if _ranks() == 1:
        return x
    found = [x]
    _agree(None)
    with _waiting():
        dist.broadcast_object_list(found, src=0, group=_cpu_group())
    return found[0]


def added(*values: float) -> list[float]:
    """The sums of numbers over all ranks."""
    if _ranks() == 1:
        return list(values)
    _agree(None)
    total = torch.tensor(values, dtype=torch.float64)
    with _waiting():
        dist.all_reduce(total, group=_cpu_group())
    return total.tolist()


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each parameter's gradient by the sum of those of the ranks that have one."""
    if size() == 1:
        return
    counts, works = added(*(x.grad is not None for x in parameters)), []
    for parameter, count in zip(parameters, counts):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if count:
            works.append(dist.all_reduce(parameter.grad, async_op=True))
    with _waiting():
        for work in works:
            work.wait()


def gather(parts: Iterable[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Columns of all rows, in order, from the columns that each rank computes of its rows.

    Args:
        parts: this rank's, slice after slice as `shares` gives them. Tensors of (rows, ...); a
            second dimension is padded with zeros to the longest. None stays None. It may raise.
    """
    own = []
    with together():
        for part in parts:
            if not idle():
                own.append(part)
    columns = [None if x[0] is None else _joined(x) for x in zip(*own)]
    if _ranks() == 1:
        return columns
    forms = gather_objects([None if x is None else (x.shape, x.dtype) for x in columns])
    width = max(map(len, forms))
    places = [next((form[i] for form in forms if form), None) for i in range(width)]
    return [
        None if place is None else _gather_rows(columns[i] if columns else None, i, forms)
        for i, place in enumerate(places)
    ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts, the second dimension padded with zeros to the longest."""
    if len(parts) == 1 or parts[0].ndim == 1:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    longest = max(x.shape[1] for x in parts)
    return torch.cat([_padded(x, len(x), longest) for x in parts])


def _padded(x: Tensor, rows: int, longest: int | None) -> Tensor:
    """x with zeros appended to `rows` rows and, with two dimensions, `longest` columns."""
    shape = (rows,) if longest is None else (rows, longest)
    if x.shape == shape:
        return x
    padded = x.new_zeros(shape)
    padded[tuple(slice(n) for n in x.shape)] = x
    return padded


def _gather_rows(x: Tensor | None, column: int, forms: list) -> Tensor:
    """The rows of a column on all ranks; forms: (shape, dtype) of all columns of each rank."""
    counts = [form[column][0][0] if form else 0 for form in forms]
    shape, dtype = next(form[column] for form in forms if form)
    longest = None if len(shape) == 1 else max(form[column][0][1] for form in forms if form)
    device = _device() if x is None else x.device
    x = torch.zeros((0,) * len(shape), dtype=dtype, device=device) if x is None else x
    plain = x.view(torch.uint8) if dtype == torch.bool else x
    own = _padded(plain, max(counts), longest).contiguous()
    found = [torch.empty_like(own) for _ in forms]
    with _waiting():
        dist.all_gather(found, own)
    rows = torch.cat([part[:count] for part, count in zip(found, counts)])
    return rows.view(torch.bool) if dtype == torch.bool else rows


def _device() -> torch.device:
    """Where a rank without rows puts the columns of the others."""
    gpu = torch.cuda.is_available() and "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")

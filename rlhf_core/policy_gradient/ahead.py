"""Sampling a step ahead: while the policy trains on one rollout, an engine samples the next one.

The next rollout begins before the step's updates, so the weights that sample it are one step old
when it is trained on. With several processes, the first one holds the engine and the rollouts. Left
out: more than one rollout in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from rlhf_core.generation import Generation

NONE = -1  # the version in a checkpoint without a rollout


class Flight:
    """Responses that are sampled in the background, as an engine that has them already.

    Attributes:
        version: the number of steps after which the policy had the weights that sample.
        prompts: what is answered.
        seeds: (N,) int64, of the responses.
    """

    def __init__(
        self,
        version: int,
        prompts: Sequence[Sequence[int]],
        seeds: Tensor,
        sample: Callable[[], Generation | None],
    ):
        self.version, self.prompts, self.seeds = version, list(prompts), seeds
        self._future: Future[Generation | None] = Future()
        # A daemon, so that a run which stops need not wait for the engine.
        threading.Thread(target=self._run, args=(sample,), daemon=True).start()

    def _run(self, sample: Callable[[], Generation | None]) -> None:
        try:
            self._future.set_result(sample())
        except BaseException as error:
            self._future.set_exception(error)

    def wait(self) -> Generation | None:
        """The responses once they are there; None if the engine has failed."""
        return None if self._future.exception() else self._future.result()

    def load(self, model) -> None:
        """Do nothing: the weights were those at the start."""

    def generate(self, prompts: Sequence[Sequence[int]], **options) -> Generation | None:
        """The responses, or the exception that ended the sampling."""
        return self._future.result()


def flight_state(flight: Flight | None, rows: int, length: int) -> dict[str, Tensor]:
    """The responses as tensors of a fixed size, for a checkpoint; waits for them.

    rows, length: of the largest rollout.
    """
    state = {
        "ahead:version": torch.tensor(NONE),
        "ahead:seeds": torch.zeros(rows, dtype=torch.int64),
        "ahead:ids": torch.zeros(rows, length, dtype=torch.int64),
        "ahead:mask": torch.zeros(rows, length, dtype=torch.bool),
        "ahead:logprobs": torch.zeros(rows, length),
        "ahead:ended": torch.zeros(rows, dtype=torch.bool),
    }
    response = None if flight is None else flight.wait()
    if response is None:
        return state
    B, R = response.response_ids.shape
    state["ahead:version"] = torch.tensor(flight.version)
    state["ahead:seeds"][:B] = flight.seeds.cpu()
    state["ahead:ids"][:B, :R] = response.response_ids.cpu()
    state["ahead:mask"][:B, :R] = response.response_mask.cpu()
    state["ahead:logprobs"][:B, :R] = response.logprobs.cpu()
    state["ahead:ended"][:B] = response.ended.cpu()
    return state


def flight_of(
    state: dict[str, Tensor], prompts: Sequence[Sequence[int]], num_samples: int
) -> Flight | None:
    """The flight of `flight_state`, which has ended, with the prompts of its step."""
    version, n = int(state["ahead:version"]), len(prompts) * num_samples
    if version == NONE:
        return None
    names = ("seeds", "ids", "mask", "logprobs", "ended")
    seeds, ids, mask, logprobs, ended = (state[f"ahead:{name}"][:n] for name in names)
    R = int(mask.sum(dim=1).max())
    ids, mask, logprobs = (x[:, :R] for x in (ids, mask, logprobs))
    response = Generation(ids, mask, logprobs, logprobs, ended)
    return Flight(version, prompts, seeds, lambda: response)

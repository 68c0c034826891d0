"""Examples in flat arrays: 2 or 4 bytes a token, where a list takes 8 and each int an object.

An ExampleStore is a sequence. It builds an example whenever one is asked for, equal to the one that
it was given. Its blocks hold some thousand examples of one type each. A block of anything else, or
of examples that arrays cannot hold as they are, stays a list of objects.

Checks of all examples look at the arrays, and build only those examples that they cannot clear.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import pickle
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, groupby, islice, pairwise
from typing import Any, TypeVar, overload

import numpy as np

from rlhf_core.data.examples import Example, Pair, Prompt, Ranked, Steps

T = TypeVar("T")
_ROWS = 256  # of a block of a sequence that is stored
# Fields of ids.
_SEGMENTS: dict[type, tuple[str, ...]] = {
    Example: ("prompt_ids", "completion_ids"),
    Pair: ("prompt_ids", "chosen_ids", "rejected_ids"),
    Steps: ("prompt_ids", "completion_ids"),
}
# Fields that hold one number or none.
_NUMBERS: dict[type, tuple[str, ...]] = {
    Example: ("label", "reward"),
    Pair: ("margin", "label_smoothing"),
}
_KINDS = (Example, Pair, Ranked, Steps, Prompt, list)
# What `Block` raises for examples that arrays cannot hold as they are.
_NO_ARRAYS = (
    *(TypeError, ValueError, OverflowError, AttributeError, RecursionError),
    pickle.PicklingError,
)


class ExampleStore(Sequence[T]):
    """A sequence of examples in flat arrays. Slices and sums share them; `list(store)` copies.

    Args:
        blocks: Each a `Block`, or a list.
        order: Places of examples in the blocks, in this store's order. None means all of them.
    """

    def __init__(self, blocks: Sequence[Block | list], order: np.ndarray | None = None):
        self.blocks, self.order = list(blocks), order
        self._starts = [0, *accumulate(map(len, self.blocks))]

    def __len__(self) -> int:
        return self._starts[-1] if self.order is None else len(self.order)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleStore[T]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"there are {len(self)} examples, and none at {index}")
        if self.order is not None:
            place = int(self.order[place])
        block = bisect_right(self._starts, place) - 1
        return self.blocks[block][place - self._starts[block]]

    def __iter__(self) -> Iterator[T]:
        if self.order is None:
            return chain.from_iterable(self.blocks)
        return map(self.__getitem__, range(len(self)))

    def __add__(self, other: Sequence) -> ExampleStore:
        return join([self, other]) if isinstance(other, ExampleStore | list) else NotImplemented

    def __radd__(self, other: Sequence) -> ExampleStore:
        return join([other, self]) if isinstance(other, list) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExampleStore | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __repr__(self) -> str:
        return repr(list(self))  # as of the list that it stands for: digests hold it

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, without those of blocks that are lists."""
        own = 0 if self.order is None else self.order.nbytes
        return own + sum(block.nbytes for block in self.blocks if isinstance(block, Block))

    def select(self, places: Sequence[int] | np.ndarray) -> ExampleStore[T]:
        """The examples at these places, in this order."""
        if isinstance(places, range):
            places = np.arange(places.start, places.stop, places.step)
        order = np.asarray(places, dtype=np.int64)
        return ExampleStore(self.blocks, order if self.order is None else self.order[order])

    def kinds(self) -> set[type]:
        """The types of the examples."""
        if self.order is None:
            used = range(len(self.blocks))
        else:
            used = np.unique(np.searchsorted(self._starts, self.order, side="right") - 1).tolist()
        found: set[type] = set()
        for i in used:
            block = self.blocks[i]
            if isinstance(block, Block):
                found.add(block.kind)
            elif self.order is None:
                found |= set(map(type, block))
            else:
                places = self.order - self._starts[i]
                places = places[(places >= 0) & (places < len(block))]
                found |= {type(block[j]) for j in places.tolist()}
        return found

    def where(self, find) -> list[int]:
        """Places of the examples that `find(block)` names: a bool array, or None for all of them.

        All examples of a block that is a list are among them.
        """
        found = []
        for block in self.blocks:
            marks = find(block) if isinstance(block, Block) else None
            found.append(np.ones(len(block), dtype=bool) if marks is None else marks)
        marks = np.concatenate(found) if found else np.zeros(0, dtype=bool)
        return np.flatnonzero(marks if self.order is None else marks[self.order]).tolist()


class Block(Sequence):
    """Examples of one type. A *segment* is a prompt or a completion; a prompt comes first.

    Attributes:
        kind: Example, Pair, Ranked, Steps, Prompt, or list for prompts of ids alone.
        ids: (N,) of all segments.
        ends: (S,) end of each segment in ids.
        firsts: (rows + 1,) first segment of each row.
        mask: (N / 8,) bits of the ids that count, or None if there is no mask.
        masked: (S,) which segments have a mask, or None.
        numbers: Values of the fields that hold one number or none. A field without any is left out.
        labels: (L,) those of the steps, with `label_ends` (rows,) the end of each row's.
        columns: Pickled columns of prompts or criteria of pairs, with `column_ends` (rows,) the end
            of each row's.
        names: Distinct tuples of names of the prompts' columns, in the order of their first rows.
    """

    def __init__(self, examples: list):
        """Raises TypeError, ValueError or OverflowError if the arrays cannot hold the examples."""
        self.kind = kind = type(examples[0])
        self.mask = self.masked = self.labels = self.label_ends = None
        self.columns = self.column_ends = None
        self.names: list[tuple[str, ...]] = [()]
        self.numbers: dict[str, _Numbers] = {}
        if kind in (list, Prompt):
            segments, counts = examples, [1] * len(examples)
            if kind is list:
                _exact(chain.from_iterable(examples), int)
            else:
                if max(map(len, map(vars, examples))) > 1:
                    raise ValueError("a prompt with attributes of its own")
                columns = [example.columns for example in examples]
                if any(columns):
                    self.names = list(dict.fromkeys(map(tuple, columns)))
                    self._pack_columns(columns)
        else:
            fields = dict(zip(kind._fields, zip(*examples)))
            if kind is Example and fields["teacher_prompt_ids"].count(None) < len(examples):
                raise ValueError("a teacher's prompt has no array")
            if kind is Ranked:
                rows = list(zip(fields["prompt_ids"], fields["completions_ids"]))
                segments = [ids for prompt, others in rows for ids in (prompt, *others)]
                counts = [1 + len(others) for _, others in rows]
            else:
                names = _SEGMENTS[kind]
                segments = list(chain.from_iterable(zip(*(fields[name] for name in names))))
                counts = [len(names)] * len(examples)
                self._pack_masks(fields, segments, len(names) - 1)
            for name in _NUMBERS.get(kind, ()):
                if fields[name].count(None) < len(examples):
                    self.numbers[name] = _Numbers(fields[name])
            if kind is Pair and fields["criteria"].count(None) < len(examples):
                self._pack_columns(fields["criteria"])
            if kind is Steps:
                self.labels = _exact(chain.from_iterable(fields["labels"]), float)
                self.label_ends = _ends(fields["labels"])
        if set(map(type, segments)) != {Prompt if kind is Prompt else list}:
            raise TypeError("not lists of ids")
        ids = _flat(segments)
        self.low, self.high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        self.ids = ids.astype(_smallest(self.low, self.high))
        self.ends = _ends(segments)
        self.firsts = np.array([0, *accumulate(counts)], dtype=np.int32)

    def _pack_masks(self, fields: dict[str, tuple], segments: list, completions: int) -> None:
        given = fields["masks" if self.kind is Pair else "completion_mask"]
        if given.count(None) == len(given):
            return
        if self.kind is Pair:
            if any(masks is not None and not any(masks) for masks in given):
                raise ValueError("a list of no masks is not None")
            rows = [masks or [None] * completions for masks in given]
        else:
            rows = [[mask] for mask in given]
        masks = [mask for own in rows for mask in (None, *own)]
        bits = [mask or [True] * len(ids) for mask, ids in zip(masks, segments, strict=True)]
        if list(map(len, bits)) != list(map(len, segments)):
            raise ValueError("a mask does not fit its tokens")
        self.mask = np.packbits(_exact(chain.from_iterable(bits), bool))
        self.masked = np.array([mask is not None for mask in masks])

    def _pack_columns(self, columns: Sequence[dict | None]) -> None:
        pickled = [pickle.dumps(row, protocol=5) for row in columns]
        self.columns, self.column_ends = b"".join(pickled), _ends(pickled)

    def _columns_of(self, i: int) -> dict | None:
        if self.columns is None:
            return {} if self.kind is Prompt else None
        start = int(self.column_ends[i - 1]) if i else 0
        return pickle.loads(self.columns[start : int(self.column_ends[i])])

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, index):
        first, last = self.firsts[index : index + 2].tolist()
        ends = self.ends[max(first - 1, 0) : last].tolist()
        ends = ends if first else [0, *ends]
        ids = self.ids[ends[0] : ends[-1]].tolist()
        mask = None
        if self.mask is not None:
            skip = ends[0] % 8
            bits = np.unpackbits(self.mask[ends[0] // 8 : ends[-1] // 8 + 1])
            mask = bits[skip : skip + len(ids)].astype(bool).tolist()
        masked = None if self.masked is None else self.masked[first:last].tolist()
        return self._build(index, [end - ends[0] for end in ends], ids, mask, masked)

    def __iter__(self) -> Iterator:
        ids, ends, firsts = self.ids.tolist(), [0, *self.ends.tolist()], self.firsts.tolist()
        mask = masked = None
        if self.mask is not None:
            mask = np.unpackbits(self.mask, count=len(ids)).astype(bool).tolist()
            masked = self.masked.tolist()
        for i, first in enumerate(firsts[:-1]):
            last = firsts[i + 1]
            own = None if masked is None else masked[first:last]
            yield self._build(i, ends[first : last + 1], ids, mask, own)

    def _build(
        self, i: int, ends: list[int], ids: list[int], mask: list | None, masked: list | None
    ) -> Any:
        """The example of row i. ends: where its first segment begins, and where each one ends."""
        kind = self.kind
        segments = [ids[start:end] for start, end in pairwise(ends)]
        if kind is list:
            return segments[0]
        if kind is Prompt:
            prompt = Prompt(segments[0])
            prompt.columns = self._columns_of(i)
            return prompt
        if kind is Ranked:
            return Ranked(segments[0], segments[1:])
        masks = None
        if masked is not None and any(masked):
            spans = zip(ends, ends[1:], masked)
            masks = [mask[start:end] if own else None for start, end, own in spans][1:]
        numbers = [
            self.numbers[name][i] if name in self.numbers else None
            for name in _NUMBERS.get(kind, ())
        ]
        if kind is Pair:
            return Pair(*segments, numbers[0], masks, numbers[1], self._columns_of(i))
        completion_mask = masks[0] if masks else None
        if kind is Example:
            return Example(*segments, completion_mask, *numbers)
        start = int(self.label_ends[i - 1]) if i else 0
        labels = self.labels[start : int(self.label_ends[i])].tolist()
        return Steps(*segments, completion_mask, labels)

    @property
    def nbytes(self) -> int:
        arrays = [self.ids, self.ends, self.firsts, self.mask, self.masked]
        arrays += [self.labels, self.label_ends, self.column_ends]
        total = sum(x.nbytes for x in arrays if x is not None)
        return total + len(self.columns or b"") + sum(x.nbytes for x in self.numbers.values())

    # ---- what checks ask of all rows

    def lengths(self) -> np.ndarray:
        """(rows,) as `collate.length`: of the prompt and its longest completion."""
        sizes = np.diff(self.ends, prepend=0)
        prompts = self.firsts[:-1]
        longest = sizes.copy()
        longest[prompts] = 0
        return sizes[prompts] + np.maximum.reduceat(longest, prompts)

    def has_id_outside(self, vocab_size: int) -> np.ndarray:
        """(rows,) whether a row has an id that is not from 0 to vocab_size - 1."""
        found = np.zeros(len(self), dtype=bool)
        if self.low < 0 or self.high >= vocab_size:
            bad = np.flatnonzero((self.ids < 0) | (self.ids >= vocab_size))
            found[self._row_of(np.searchsorted(self.ends, bad, side="right"))] = True
        return found

    def may_misfit(self) -> np.ndarray:
        """(rows,) whether `collate.misfit` may have something to say."""
        found = np.diff(self.firsts) < 2
        if "label_smoothing" in self.numbers:
            values = self.numbers["label_smoothing"].values(0.0)
            found |= ~((values >= 0) & (values < 0.5))
        if self.kind is Steps:
            bad = np.flatnonzero(~((self.labels >= 0) & (self.labels <= 1)))
            found[np.searchsorted(self.label_ends, bad, side="right")] = True
            bits = np.unpackbits(self.mask, count=len(self.ids)) if self.mask is not None else 0
            counted = np.concatenate([[0], np.cumsum(bits * np.ones(len(self.ids), dtype=int))])
            starts, ends = self.ends[0::2], self.ends[1::2]
            found |= counted[ends] - counted[starts] != np.diff(self.label_ends, prepend=0)
            found |= np.diff(self.ends, prepend=0)[0::2] == 0
        return found

    def lacks(self, name: str) -> np.ndarray:
        """(rows,) whether a field that holds a number has none, or one that is not finite."""
        if name not in self.numbers:
            return np.ones(len(self), dtype=bool)
        return ~np.isfinite(self.numbers[name].values(np.nan))

    def has(self, name: str) -> np.ndarray:
        """(rows,) whether a field that holds a number or none has one; of criteria, if any may."""
        if name not in self.numbers:
            return np.full(len(self), name == "criteria" and self.columns is not None)
        given = self.numbers[name].given
        return np.ones(len(self), dtype=bool) if given is None else given

    def may_repeat(self) -> np.ndarray:
        """(rows,) whether all completions of a row have the same length and the same sum of ids."""
        totals = np.concatenate([[0], np.cumsum(self.ids, dtype=np.int64)])[self.ends]
        prompts, found = self.firsts[:-1], np.ones(len(self), dtype=bool)
        for ends in (self.ends, totals):
            low = np.diff(ends, prepend=0)
            high, bounds = low.copy(), np.iinfo(low.dtype)
            low[prompts], high[prompts] = bounds.max, bounds.min
            found &= np.minimum.reduceat(low, prompts) == np.maximum.reduceat(high, prompts)
        return found

    def hashes(self) -> np.ndarray:
        """(rows,) uint64: equal for equal rows, in whichever blocks they are."""
        ends = np.concatenate([[0], self.ends])
        firsts, bounds = self.firsts.astype(np.int64), ends[self.firsts]
        counts = 1 if self.mask is None else np.unpackbits(self.mask, count=len(self.ids))
        masked = 0 if self.masked is None else self.masked
        tokens = (_places(bounds) << 34) + 2 * self.ids.astype(np.int64) + counts
        segments = (_places(firsts) << 40) + 2 * np.diff(ends) + masked
        found = _sums(_mixed(tokens), bounds) + _sums(_mixed(~segments), firsts)
        if self.numbers or self.columns is not None or self.labels is not None:
            found += np.fromiter(map(_hash_of_rest, self), dtype=np.uint64, count=len(self))
        kind = list if self.kind is Prompt else self.kind
        return _mixed(found + np.uint64(_hash_of_text(kind.__name__)))

    def _row_of(self, segments: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.firsts, segments, side="right") - 1


class _Numbers:
    """A number or None for each row; all numbers are of one type."""

    def __init__(self, values: Sequence):
        (kind,) = set(map(type, values)) - {type(None)}
        if kind not in (bool, int, float):
            raise TypeError("not a number")
        self.numbers = np.array([0 if x is None else x for x in values], dtype=kind)
        self.given = np.array([x is not None for x in values]) if None in values else None

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + (0 if self.given is None else self.given.nbytes)

    def __getitem__(self, index: int) -> bool | int | float | None:
        if self.given is not None and not self.given[index]:
            return None
        return self.numbers[index].item()

    def values(self, default: float) -> np.ndarray:
        """(rows,) float64, with `default` where there is none."""
        numbers = self.numbers.astype(np.float64)
        return numbers if self.given is None else np.where(self.given, numbers, default)


def store(items: Iterable[T]) -> list[T] | ExampleStore[T]:
    """The items in an ExampleStore, or in a list if none of them is an example."""
    return assemble(_packed(items))


def _packed(items: Iterable) -> Iterator[Block | list]:
    items = iter(items)
    return chain.from_iterable(map(pack, iter(lambda: list(islice(items, _ROWS)), [])))


def assemble(blocks: Iterable[Block | list]) -> list | ExampleStore:
    """The rows of the blocks in an ExampleStore, or in a list if no block holds examples."""
    blocks = list(blocks)
    if not any(isinstance(block, Block) for block in blocks):
        return list(chain.from_iterable(blocks))
    return ExampleStore(blocks)


def pack(rows: list) -> list[Block | list]:
    """Rows as blocks in their order; a row that arrays cannot hold as it is stays in a list."""
    runs = [list(run) for _, run in groupby(rows, type)]
    if len(runs) > 1 + len(rows) // 16 or type(rows[0]) not in _KINDS:
        return [rows]
    blocks: list[Block | list] = []
    for run in runs:
        try:
            blocks.append(Block(run) if type(run[0]) in _KINDS else run)
        except _NO_ARRAYS:
            blocks.append(run)
    return blocks


def join(sources: Sequence[Sequence]) -> list | ExampleStore:
    """All examples of the sources in a row: a store if one of them is one."""
    if not any(isinstance(source, ExampleStore) for source in sources):
        return list(chain.from_iterable(sources))
    blocks: list[Block | list] = []
    orders, start = [], 0
    for source in sources:
        found = source if isinstance(source, ExampleStore) else ExampleStore([list(source)])
        blocks += found.blocks
        size = found._starts[-1]
        orders.append(start + (np.arange(size) if found.order is None else found.order))
        start += size
    whole = all(getattr(source, "order", None) is None for source in sources)
    return ExampleStore(blocks, None if whole else np.concatenate(orders))


def select(examples: Sequence, places: Sequence[int]) -> list | ExampleStore:
    """The examples at these places, in this order."""
    if isinstance(examples, ExampleStore):
        return examples.select(places)
    return [examples[i] for i in places]


def kinds_of(examples: Sequence) -> set[type]:
    """The types of the examples."""
    if isinstance(examples, ExampleStore):
        return examples.kinds()
    return set(map(type, examples))


def longer(prompts: Sequence, length: int) -> list[int]:
    """Places of the prompts that have more ids than `length`."""
    stored = isinstance(prompts, ExampleStore)
    places = prompts.where(lambda x: x.lengths() > length) if stored else range(len(prompts))
    return [i for i in places if len(prompts[i]) > length]


def column_names(prompts: Sequence) -> list[tuple[str, ...]]:
    """Distinct tuples of names of the prompts' columns, in the order of their first rows."""
    if isinstance(prompts, ExampleStore):
        named = (x.names if isinstance(x, Block) else column_names(x) for x in prompts.blocks)
        found = list(dict.fromkeys(chain.from_iterable(named)))
        if prompts.order is None or len(found) == 1:
            return found
    return list(dict.fromkeys(tuple(getattr(prompt, "columns", ())) for prompt in prompts))


def has(examples: Sequence, name: str) -> bool:
    """Whether any example has a value in a field that holds a number, or criteria, or none."""
    if isinstance(examples, ExampleStore):
        places: Iterable = examples.where(lambda block: block.has(name))
        return any(getattr(examples[i], name) is not None for i in places)
    return any(getattr(example, name) is not None for example in examples)


def digest(sources: Iterable[Sequence]) -> str:
    """SHA-256 (hex) over the sources' lengths and a hash of each example, in order.

    Lists and stores of equal examples have the same digest.

    The hashes have 64 bits, which tell other data from the same data, but not from data that was
    made to have the same hashes.
    """
    total = hashlib.sha256()
    for source in sources:
        total.update(len(source).to_bytes(8, "little"))
        total.update(_hashes(source))
    return total.hexdigest()


def _hashes(examples: Sequence) -> np.ndarray:
    """(N,) uint64, one for each example."""
    if not isinstance(examples, ExampleStore):
        examples = ExampleStore(list(_packed(examples)))
    parts = [
        x.hashes() if isinstance(x, Block) else np.array(list(map(_hash_of, x)), dtype=np.uint64)
        for x in examples.blocks
    ]
    found = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
    return found if examples.order is None else found[examples.order]


def _hash_of(example: Any) -> int:
    """The hash of an example that is in no block. Its neighbours may be the reason."""
    if type(example) in _KINDS:
        with contextlib.suppress(*_NO_ARRAYS):
            return int(Block([example]).hashes()[0])
    return _hash_of_text(repr(example))


def _hash_of_rest(example: Any) -> int:
    """The hash of the fields without ids, or 0 if none has a value."""
    if isinstance(example, Prompt):
        return _hash_of_text(repr(example.columns)) if example.columns else 0
    names = ("label", "reward", "margin", "label_smoothing", "criteria", "labels")
    given = {name: getattr(example, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return _hash_of_text(repr(given)) if given else 0


def _hash_of_text(text: str) -> int:
    found = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(found.digest(), "little")


def _mixed(x: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit integers that looks random (splitmix64, Steele et al. 2014)."""
    x = x.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _places(bounds: np.ndarray) -> np.ndarray:
    """The place of each element in its run, given the bounds (runs + 1,) of the runs."""
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(runs,) sums of the runs, modulo 2^64."""
    totals = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(values)])
    return totals[bounds[1:]] - totals[bounds[:-1]]


def _flat(segments: Sequence[list[int]]) -> np.ndarray:
    """The ids of all segments in a row. Raises OverflowError if one has more than 63 bits."""
    try:
        flat = array("Q")  # which takes a third of the time of "q"
        for segment in segments:
            flat.fromlist(segment)
    except OverflowError:  # an id is negative
        flat = array("q")
        for segment in segments:
            flat.fromlist(segment)
    ids = np.array(flat)
    if len(ids) and ids.max() >= 2**63:
        raise OverflowError("an id has more than 63 bits")
    return ids


def _smallest(low: int, high: int) -> type:
    kinds = (np.uint16, np.int32, np.int64)
    return next(x for x in kinds if np.iinfo(x).min <= low and high <= np.iinfo(x).max)


def _ends(parts: Sequence) -> np.ndarray:
    ends = np.cumsum(np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)))
    return ends.astype(np.int32) if not len(ends) or ends[-1] < 2**31 else ends


def _exact(values: Iterable, kind: type) -> np.ndarray:
    """The values as an array. Raises TypeError if one is of another type."""
    values = list(values)
    if set(map(type, values)) - {kind}:
        raise TypeError(f"not all of type {kind.__name__}")
    return np.array(values, dtype=kind)

"""Splitting the training documents of a set: holding out documents for validation, where the set has no validation files, and
cutting a training set to a size in tokens. Documents are arrays of token ids."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.config.text import ValidationFloor

Assigned = Iterator[tuple[str, np.ndarray]]  # documents, or parts of one, with their split: `train` or `validation`


def hold_out(
    documents: Iterable[np.ndarray], *, fraction: float, floor: ValidationFloor, seed: int | str, context_length: int
) -> Assigned:
    """Assign training documents to `train` and `validation`: one of every 1 / fraction documents, drawn at random, is held out.

    Documents are read ahead until the held-out ones meet the floor. If the set ends before, more are held out, but at most half
    of the documents and half of the tokens; of a single document, its last windows. If that cannot meet the floor, only the
    fraction is held out; the stage that validates refuses it (`graph/validation.py`).
    """
    blocks = _blocks(iter(documents), every=max(2, round(1 / fraction)), seed=seed)
    first: list[np.ndarray] = []
    drawn: list[int] = []  # numbers in `first`
    tokens = 0
    for block, place in blocks:
        if place < len(block):
            drawn.append(len(first) + place)
            tokens += len(block[place])
        first += block
        if len(first) > 1 and floor.is_met(len(drawn), tokens):
            break
    else:
        if len(first) == 1:
            yield from _cut_document(first[0], fraction=fraction, floor=floor, context_length=context_length)
            return
        drawn = _more_of_few([len(ids) for ids in first], drawn, floor=floor, seed=seed)
    held_out = set(drawn)
    for number, ids in enumerate(first):
        yield ("validation" if number in held_out else "train"), ids
    for block, place in blocks:
        for number, ids in enumerate(block):
            yield ("validation" if number == place else "train"), ids


def cut_training_set(
    assigned: Iterable[tuple[str, np.ndarray]],
    wanted: int,
    *,
    context_length: int,
    name: str,
    floor: ValidationFloor | None,
) -> Assigned:
    """Cut a training set to the first whole windows with at most `wanted` tokens. Held-out documents among them stay; if
    documents are held out, so do those that follow, until the floor is met. Nothing further is read. A smaller size is a prefix
    of every larger one.

    Args:
        floor: None where nothing is held out of the training documents.

    Raises:
        DataError: the training documents hold fewer tokens, or `wanted` is less than a window and the first document longer.
    """
    left, found, is_empty = wanted, 0, True
    documents = tokens = 0  # held out
    for split, ids in assigned:
        if split != "train":
            documents, tokens = documents + 1, tokens + len(ids)
            yield split, ids
        else:
            found += len(ids)
            cut = ids if len(ids) <= left else ids[: left // context_length * context_length]
            left = left - len(cut) if len(cut) == len(ids) else 0
            if len(cut):
                is_empty = False
                yield split, cut
        if not left and (floor is None or floor.is_met(documents, tokens)):
            break
    if found < wanted:
        beside = f" beside the {tokens:,} that are held out for validation" if documents else ""
        raise DataError(
            f"text.domains.{name}.train_tokens: {wanted:,} wanted, and its training documents hold {found:,} tokens{beside}: "
            "add documents, or ask for a smaller size"
        )
    if is_empty:
        raise DataError(
            f"text.domains.{name}.train_tokens: {wanted:,} are less than a window of {context_length} tokens, and the first "
            "training document has more: nothing is left to train on: ask for a larger size"
        )


def _blocks(documents: Iterator[np.ndarray], *, every: int, seed: int | str) -> Iterator[tuple[list[np.ndarray], int]]:
    """Blocks of `every` documents, each with the place of the drawn one. In a shorter first block it is one of its documents;
    in a shorter last block it may be past the end."""
    number = 0
    while block := list(islice(documents, every)):
        yield block, _draw(seed, number) % (every if number else len(block))
        number += 1


def _more_of_few(lengths: Sequence[int], drawn: list[int], *, floor: ValidationFloor, seed: int | str) -> list[int]:
    """The numbers of the documents to hold out of a set with these lengths in tokens, whose `drawn` ones do not meet the floor:
    the drawn ones and others in random order; only `drawn` if no order meets the floor."""
    usual = set(drawn)
    shuffled = sorted(range(len(lengths)), key=lambda number: (number not in usual, _draw(f"{seed}/more", number)))
    longest = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    rest = len(lengths) - floor.documents + 1
    # Random order first. If lengths differ widely, the longest documents may be needed, or the longest after short ones.
    for order in (shuffled, longest, [*longest[rest:], *longest[:rest]] if rest > 0 else []):
        if held_out := _first_that_meet(floor, order, lengths):
            return held_out
    return drawn


def _first_that_meet(floor: ValidationFloor, order: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The first documents in this order that meet the floor, skipping those with which they would be more than half of the
    documents or tokens; an empty list if they never meet it."""
    held_out: list[int] = []
    tokens, half = 0, sum(lengths) // 2
    for number in order:
        if len(held_out) < len(lengths) // 2 and tokens + lengths[number] <= half:
            held_out.append(number)
            tokens += lengths[number]
            if floor.is_met(len(held_out), tokens):
                return held_out
    return []


def _cut_document(ids: np.ndarray, *, fraction: float, floor: ValidationFloor, context_length: int) -> Assigned:
    """Hold out the last windows of a document; nothing if it has only one window."""
    windows = -(-len(ids) // context_length)
    of_fraction = min(max(1, round(fraction * windows)), windows - 1)
    of_floor = windows - (len(ids) - floor.tokens) // context_length
    cut = (windows - (max(of_fraction, of_floor) if of_floor <= windows // 2 else of_fraction)) * context_length
    yield "train", ids[:cut]
    if cut < len(ids):
        yield "validation", ids[cut:]


def _draw(seed: int | str, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{block}".encode()).digest()[:8])

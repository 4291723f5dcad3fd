"""Rotary positions: the values of Megatron-Core's function, and tables that are computed once."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from megatron_specialm.model import rotary

HEADS, HEAD_SIZE, POSITIONS = 3, 8, 12
CONFIG = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
ANGLES = torch.outer(torch.arange(POSITIONS), 100.0 ** -torch.arange(0, 1, 2 / HEAD_SIZE)).repeat(1, 2)[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, (5, 1, POSITIONS, 3)])
def test_values_and_gradients_are_megatrons(dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (POSITIONS, 2) if lengths is None else (sum(lengths),)
    mixed = torch.randn(*shape, HEADS, 3 * HEAD_SIZE, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(*shape, HEADS, HEAD_SIZE, generator=generator).to(dtype)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    for queries in (
        mixed[..., :HEAD_SIZE],
        mixed[..., HEAD_SIZE : 2 * HEAD_SIZE],
    ):  # the second by tables that are there
        expected = apply_rotary_pos_emb(queries, ANGLES, CONFIG, bounds, cp_group=_Alone())
        found = rotary.rotate(queries, ANGLES, CONFIG, bounds)
        assert torch.equal(found, expected)
        of_found, of_expected = (torch.autograd.grad(output, mixed, gradient)[0] for output in (found, expected))
        assert torch.equal(of_found, of_expected)


def test_tables_are_computed_once_and_live_as_long_as_their_key() -> None:
    angles = ANGLES.clone()
    bounds = torch.tensor([0, 3, 8])
    for key in (None, bounds):
        first = rotary._cosines_and_sines(angles, key)
        assert all(a is b for a, b in zip(first, rotary._cosines_and_sines(angles, key), strict=True))
        others = rotary._cosines_and_sines(2 * ANGLES, key)
        assert not torch.equal(first[1], others[1]), "other angles of the same windows"
    known = len(rotary._tables)
    del angles
    assert len(rotary._tables) == known - 1


class _Alone:
    """A group of one process."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

"""Which attention computes packed windows on a GPU."""

import pytest
import torch

from megatron_specialm.model import layer_specs


@pytest.mark.parametrize(
    ("capability", "cudnn", "flash", "grouped", "head_size", "expected"),
    [
        ((9, 0), 90100, False, False, 64, True),
        ((9, 0), 90100, False, True, 64, False),
        ((9, 0), 90600, False, True, 64, True),
        ((9, 0), 90600, False, True, 20, False),
        ((9, 0), 91200, False, False, 256, False),
        ((9, 0), 91001, False, False, 64, False),
        ((9, 0), 91002, False, True, 128, True),
        ((9, 0), None, False, False, 64, False),
        ((10, 0), 90600, False, False, 64, False),
        ((10, 0), 90700, False, True, 64, True),
        ((12, 0), 91800, False, False, 64, False),
        ((8, 0), 91900, False, False, 64, False),
        ((8, 0), None, True, True, 20, True),
    ],
)
def test_packed_windows_are_left_to_transformer_engine_where_it_has_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cudnn: int | None,
    flash: bool,
    grouped: bool,
    head_size: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(layer_specs, "find_spec", lambda name: object() if flash else None)
    assert layer_specs.attends_to_packed_windows(grouped_queries=grouped, head_size=head_size) is expected

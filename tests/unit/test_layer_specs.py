"""Which attention computes packed windows on a GPU."""

import pytest
import torch

from megatron_specialm.model import layer_specs


@pytest.mark.parametrize(
    ("capability", "cudnn", "flash", "grouped", "expected"),
    [
        ((9, 0), 90100, False, False, True),
        ((9, 0), 90100, False, True, False),
        ((9, 0), 90600, False, True, True),
        ((9, 0), 91001, False, False, False),
        ((9, 0), 91002, False, True, True),
        ((9, 0), None, False, False, False),
        ((8, 0), 91900, False, False, False),
        ((8, 0), None, True, True, True),
    ],
)
def test_packed_windows_are_left_to_transformer_engine_where_it_has_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cudnn: int | None,
    flash: bool,
    grouped: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(layer_specs, "find_spec", lambda name: object() if flash else None)
    assert layer_specs.attends_to_packed_windows(grouped_queries=grouped) is expected

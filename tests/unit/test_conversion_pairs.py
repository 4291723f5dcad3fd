"""Every pair of formats, each family, tied and untied, in layouts whose padded vocabularies differ: bits are equal."""

from itertools import cycle, product
from pathlib import Path

import pytest

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import convert, hash_moments, stream
from megatron_specialm.convert.source import Layout
from tests.unit.test_conversion_moments import save_training

_SIZES = {"layers": 2, "hidden_size": 24, "ffn_hidden_size": 36, "attention_heads": 12}  # 3 and 4 ranks divide them
FAMILIES = {
    "neox": ModelConfig(**_SIZES),
    "llama": ModelConfig(family="llama", **{**_SIZES, "attention_heads": 24}, query_groups=12, kv_channels=2),
    "qwen2": ModelConfig(family="llama", **_SIZES, qkv_bias=True),
    "qwen3": ModelConfig(family="llama", **_SIZES, kv_channels=4, qk_norm=True),
}
FORMATS = ("huggingface", "canonical", "megatron", "megatron-legacy", "deepspeed", "zero-1")
WITHOUT_MOMENTS = ("huggingface", "megatron-legacy")
LAYOUTS = [Layout(tensor, pipeline) for tensor, pipeline in product((4, 3, 2, 1), (2, 1))]
CASES = list(product(FAMILIES, (False, True)))


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_pairs_of_formats(family: str, tied: bool, tmp_path: Path) -> None:
    """Each case has a quarter of the pairs: each pair is there for two families, and each family in each layout."""
    source = save_training(tmp_path / "ours", FAMILIES[family].model_copy(update={"tie_embeddings": tied}))
    opened = open_source(source)
    weights, moments = stream(opened).weights, hash_moments(opened)
    parallel = cycle(LAYOUTS[len(LAYOUTS) // 2 * tied :] + LAYOUTS[: len(LAYOUTS) // 2 * tied])

    def write(before: Path, folder: Path, name: str) -> Path:
        layout, to = Layout(), name
        if name.startswith("megatron"):
            layout = next(parallel)
        elif name == "zero-1":
            layout, to = Layout(zero_stage=1, data_parallel=3), "deepspeed"
        convert(before, folder, to=to, layout=layout)
        return folder

    pairs = list(product(FORMATS, FORMATS))[CASES.index((family, tied)) % 4 :: 4]
    for number, (first, second) in enumerate(pairs):
        middle = write(source, tmp_path / f"{number}-{first}", first)
        found = open_source(write(middle, tmp_path / f"{number}-{first}-{second}", second))
        assert stream(found).weights == weights
        assert hash_moments(found) == ({} if {first, second} & set(WITHOUT_MOMENTS) else moments)

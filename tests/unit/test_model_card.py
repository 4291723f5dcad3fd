from dataclasses import replace

import pytest
import yaml

from megatron_specialm.base.artifacts import Cost
from megatron_specialm.convert.model_card import ModelFacts, model_card

FACTS = ModelFacts(
    name="demo: slm-is-tuned, legal",
    method="slm-is",
    domain="legal",
    finetuned=True,
    family="neox",
    activation="exact GELU",
    parameters=1_234_567,
    active_parameters=1_234_567,
    context_length=128,
    vocabulary_size=4096,
    tokenizer="0123456789abcdef",
    trainings=(("slm-is", "importance"), ("slm-is-tuned", "domain")),
    domain_files=("legal.jsonl",),
    generic_files=("generic-1.jsonl", "generic-2.jsonl"),
    set_tokens=98_765,
    phase="specialization",
    steps=100,
    cost=Cost(204_800, 1_500_000_000_000, 12.0, 24.0, "cpu: some model", 2),
    validation_loss=2.0,
    logit_difference=3e-6,
    llama_cpp="its converter says",
    seed=7,
    training_seed=8,
    digest="feed",
)


def test_of_a_mixture_of_experts_it_says_how_many_parameters_compute_a_token() -> None:
    assert "of 1.2M parameters (family" in model_card(FACTS)
    said = "of 1.2M parameters, of which 0.3M compute a token (a mixture of experts) (family"
    assert said in model_card(replace(FACTS, active_parameters=345_678))


def _front_matter(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_front_matter_is_what_model_hubs_read() -> None:
    assert _front_matter(model_card(FACTS)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": ["megatron_specialm", "slm-is", "legal"],
    }


def test_a_method_may_have_any_name() -> None:
    name = "ours: [v2], 'best' # yet"
    assert name in _front_matter(model_card(replace(FACTS, method=name)))["tags"]


@pytest.mark.parametrize(
    "said",
    [
        "1.2M parameters",
        "2402.01093",
        "then fine-tuned on the domain `legal`",
        "1. `slm-is`: the generic text, resampled",
        "2. `slm-is-tuned`: the domain's text",
        "`legal.jsonl`",
        "`generic-1.jsonl`, `generic-2.jsonl`",
        "98,765",
        "| validation perplexity | 7.39 ",
        "4,096 tokens, `0123456789ab`",
        "| `slm-is-tuned` | specialization | 100 | 204,800 | 1.50e+12 | 24.0 | cpu: some model |",
        "3.00e-06",
        "\n128 tokens",
        "- llama.cpp: its converter says\n",
    ],
)
def test_the_card_tells(said: str) -> None:
    assert said in model_card(FACTS)


def test_what_is_unknown_is_said_to_be() -> None:
    card = model_card(replace(FACTS, validation_loss=None, generic_files=(), finetuned=False))
    for said in ("| validation perplexity | not measured |", "| generic text | none |", "not fine-tuned"):
        assert said in card


def test_the_domain_in_pretraining_is_not_called_fine_tuning_nor_passed_over() -> None:
    card = model_card(replace(FACTS, trainings=(("early", "generic+domain"),)))
    assert "with the text of the domain `legal` mixed into its pretraining" in card and "fine-tuned" not in card
    assert "1. `early`: the generic text, with the domain's mixed in from the start" in card
    both = model_card(replace(FACTS, trainings=(("early", "generic+domain"), ("tuned", "domain+generic"))))
    assert "then fine-tuned on the domain `legal`" in both and "generic text mixed in" in both


def test_the_learning_rate_is_told_and_what_was_tried() -> None:
    assert "learning rate" not in model_card(FACTS)
    assert "| learning rate | 0.0017 |" in model_card(replace(FACTS, learning_rate=0.0017))
    assert model_card(FACTS).count("| seed |") == 1
    card = model_card(replace(FACTS, learning_rate=0.0017, learning_rates=("0.0005", "0.0017")))
    assert "| learning rate | 0.0017, by validation loss of 0.0005, 0.0017 |" in card
    assert "This is the last training alone, with the learning rates that were tried." in card

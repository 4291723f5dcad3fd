"""The README of an exported model: what it is, what it was made from, what it cost, how to load it."""

import math
from dataclasses import dataclass

import yaml

from megatron_specialm.base.artifacts import Cost

READS = {
    "generic": "the generic text",
    "cluster": "the generic text of one cluster",
    "importance": "the generic text, resampled to the domain's cluster histogram",
    "domain": "the domain's text",
    "generic+domain": "the generic text, with the domain's mixed in from the start",
    "importance+domain": "the generic text, resampled to the domain's cluster histogram, with the domain's mixed in",
    "domain+generic": "the domain's text, with generic text mixed in",
    "frequency": "not trained: the expert of the domain's most frequent cluster",
    "loss": "not trained: the expert with the lowest loss on a sample of the domain's text",
    "finetuned": "not trained: the expert that was best after all were fine-tuned on the domain's text",
    "halving": "not trained: the expert that was left when the worse halves had been dropped, round by round",
    "histogram": "not trained: the experts mixed by the domain's cluster histogram",
}


@dataclass(frozen=True)
class ModelFacts:
    """What a model card says.

    `finetuned` says that it has read the domain's own text. `trainings` are the stages that made the model, oldest first,
    each with what it read, a key of `READS` or words. `cost` is that of the last one alone, with the trials of its learning
    rates and with that of an earlier, shorter one that it went on from; `learning_rate` is None where nothing was trained,
    `learning_rates` are those tried. `set_tokens` counts the domain's training set once (the generic set's, for a model of
    no domain); `cost.tokens` counts repeats. `validation_loss` is in nats per token. Of a mixture of experts
    `active_parameters` compute a token; of other models that is all. `llama_cpp` says whether and how llama.cpp's
    converter converts it.
    """

    name: str
    method: str
    domain: str
    finetuned: bool
    family: str
    activation: str
    parameters: int
    active_parameters: int
    context_length: int
    vocabulary_size: int
    tokenizer: str
    trainings: tuple[tuple[str, str], ...]
    domain_files: tuple[str, ...]
    generic_files: tuple[str, ...]
    set_tokens: int
    phase: str
    steps: int
    cost: Cost
    validation_loss: float | None
    logit_difference: float
    llama_cpp: str
    seed: int
    training_seed: int
    digest: str
    learning_rate: float | None = None
    learning_rates: tuple[str, ...] = ()


def model_card(facts: ModelFacts) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    front_matter = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": ["megatron_specialm", facts.method, facts.domain],
    }
    trainings = "\n".join(
        f"{n}. `{name}`: {READS.get(data, data)}" for n, (name, data) in enumerate(facts.trainings, 1)
    )
    tried = ", with the learning rates that were tried" if facts.learning_rates else ""
    cost = (
        f"`{facts.trainings[-1][0]}`",
        facts.phase,
        f"{facts.steps:,}",
        f"{facts.cost.tokens:,}",
        f"{facts.cost.flops:.2e}",
        f"{facts.cost.device_seconds:,.1f}",
        facts.cost.device,
    )
    return f"""---
{yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)}---

# {facts.name}

A small specialized language model of {_parameters(facts)} (family `{facts.family}`, {facts.activation}),
made by the method `{facts.method}` of Grangier et al.,
[Need a Small Specialized Language Model? Plan Early!](https://arxiv.org/abs/2402.01093), {_specialized(facts)}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0]))
```

The tokenizer begins a text with the end-of-document token, as in training. The context is
{facts.context_length} tokens, that one included. This is no chat model: it goes on with a text.

- lm-eval: `--model hf --model_args pretrained=FOLDER`; for tasks of perplexity (`loglikelihood_rolling`) also
  `add_bos_token=False`, as these put that token before a text themselves. They do not count the end of documents.
- llama.cpp: {facts.llama_cpp}

## Training

{trainings}

| | |
|---|---|
| domain text | {_files(facts.domain_files)} |
| generic text | {_files(facts.generic_files)} |
| tokens in the training set of `{facts.domain}` | {facts.set_tokens:,} |
| validation perplexity | {_perplexity(facts.validation_loss)} |
| tokenizer | {facts.vocabulary_size:,} tokens, `{facts.tokenizer[:12]}` |
{_rate(facts)}| seed | {facts.seed} |
| seed of the trainings | {facts.training_seed} |
| digest of the last training | `{facts.digest}` |
| largest difference to the source model's logits | {facts.logit_difference:.2e} |

## Cost

| training | phase | steps | tokens | FLOPs | device-seconds | device |
|---|---|---:|---:|---:|---:|---|
| {" | ".join(cost)} |

This is the last training alone{tried}. What it rests on (earlier training, clustering) costs as well:
`results.json` and `ledger.json` of the run have the whole, split into generic and specialization cost.

## Licence

The licence of the weights follows from that of the text they were trained on, and of an imported model that they began
with. This program knows neither: it is for whoever shares the model to state.

## Citation

```bibtex
@article{{grangier2024need,
  title={{Need a Small Specialized Language Model? Plan Early!}},
  author={{Grangier, David and Katharopoulos, Angelos and Ablin, Pierre and Hannun, Awni}},
  journal={{arXiv preprint arXiv:2402.01093}},
  year={{2024}}
}}
```
"""


def _parameters(facts: ModelFacts) -> str:
    of_experts = f", of which {facts.active_parameters / 1e6:.1f}M compute a token (a mixture of experts)"
    return f"{facts.parameters / 1e6:.1f}M parameters{of_experts if facts.active_parameters < facts.parameters else ''}"


def _specialized(facts: ModelFacts) -> str:
    if not facts.finetuned:
        return "not fine-tuned"
    if any(data.startswith("domain") for _, data in facts.trainings):
        return f"then fine-tuned on the domain `{facts.domain}`"
    return f"with the text of the domain `{facts.domain}` mixed into its pretraining"


def _rate(facts: ModelFacts) -> str:
    """A line of the table; none where nothing was trained."""
    if facts.learning_rate is None:
        return ""
    chosen = f", by validation loss of {', '.join(facts.learning_rates)}" if facts.learning_rates else ""
    return f"| learning rate | {facts.learning_rate!r}{chosen} |\n"


def _files(files: tuple[str, ...]) -> str:
    return ", ".join(f"`{file}`" for file in files) or "none"


def _perplexity(loss: float | None) -> str:
    if loss is None:
        return "not measured"
    return f"{math.exp(loss):.2f} (the checkpoint was chosen by it; it is not that of the test documents)"

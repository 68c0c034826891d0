"""Objects of other libraries are refused with the call that gives ours."""

import pytest
from helpers import PROMPTS, fives, lengths, make_ppo, make_trainer, tiny

from rlhf_core.checks import check_own
from rlhf_core.data import ByteTokenizer, Text, encode_prompt, encode_text
from rlhf_core.generation import generate
from rlhf_core.models import RewardModel
from rlhf_core.trainers import RFTConfig, Scorer, rft


def of(library, base, name):
    """An object of a class `name`, derived from a library's `base`, without the library."""
    return type(name, (type(base, (), {"__module__": f"{library}.some.module"}),), {})()


MODEL = of("transformers", "PreTrainedModel", "GPT2LMHeadModel")
CLASSIFIER = of("transformers", "PreTrainedModel", "GPT2ForSequenceClassification")
ADAPTED = of("peft", "PeftModel", "PeftModelForCausalLM")
TOKENIZER = of("transformers", "PreTrainedTokenizerBase", "GPT2Tokenizer")


@pytest.mark.parametrize(
    "thing, message",
    [
        (
            MODEL,
            r"GPT2LMHeadModel is a class of transformers; pass Transformer\.from_transformers\(",
        ),
        (ADAPTED, r"PeftModelForCausalLM is a class of peft; .* Transformer\.from_pretrained\("),
        (CLASSIFIER, r" RewardModel\.from_transformers\(model\)$"),
        (TOKENIZER, r"save_pretrained\(folder\), then rlhf_core\.load_tokenizer\(folder\)$"),
    ],
)
def test_the_message_says_what_to_call(thing, message):
    with pytest.raises(TypeError, match=message):
        check_own(tiny(), thing)
    check_own(tiny(), tiny(RewardModel), ByteTokenizer(), None, fives, [1])


@pytest.mark.parametrize(
    "use",
    [
        lambda: make_trainer("sft", MODEL),
        lambda: make_trainer("reward", others=dict(tokenizer=TOKENIZER)),
        lambda: make_trainer("dpo", others=dict(reference=MODEL)),
        lambda: make_ppo(MODEL),
        lambda: make_ppo(reward=CLASSIFIER),
        lambda: make_ppo(others=dict(tokenizer=TOKENIZER)),
        lambda: rft(MODEL, PROMPTS, RFTConfig(), reward=fives),
        lambda: generate(MODEL, None, max_new_tokens=1),
        lambda: RewardModel.from_model(MODEL),
        lambda: Scorer([(lengths, 1.0), (CLASSIFIER, 1.0)]),
        lambda: encode_prompt("a", TOKENIZER),
        lambda: encode_text(Text("a", "b"), TOKENIZER, 8),
    ],
)
def test_every_door_refuses_them(use):
    with pytest.raises(TypeError, match=r"is a class of transformers; (use its|pass )"):
        use()


@pytest.mark.slow
def test_transformers_still_has_these_classes():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)
    with pytest.raises(TypeError, match="GPT2LMHeadModel is a class of transformers"):
        check_own(transformers.GPT2LMHeadModel(config))
    with pytest.raises(TypeError, match="load_tokenizer"):
        check_own(transformers.GPT2Tokenizer())

"""Differences between our models and transformers', for tiny random models of each family, float32.

python -m benchmarks.peers.parity
"""

from __future__ import annotations

import tempfile

import torch
import transformers
from torch.nn.functional import cross_entropy

from rlhf_core.generation import generate
from rlhf_core.models import Transformer

IDS = dict(vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(intermediate_size=48, max_position_embeddings=96)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24)
GEMMA = SIZES | dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=24)
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.3], long_factor=[2.0, 5.0])
FAMILIES = {
    "GPT-2": ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=96)),
    "Llama 2": ("llama", SIZES | dict(num_key_value_heads=4)),
    "Llama 3, `llama3` rotary scaling": ("llama", SIZES | dict(rope_scaling=LLAMA3)),
    "Mistral, window 5": ("mistral", SIZES | dict(sliding_window=5)),
    "Qwen2 / 2.5, `yarn` rotary scaling": ("qwen2", SIZES | dict(rope_scaling=YARN)),
    "Qwen3": ("qwen3", SIZES | dict(head_dim=16)),
    "Gemma 2, soft caps 2 and 3": (
        "gemma2",
        GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "Gemma 3": ("gemma3_text", GEMMA | dict(sliding_window_pattern=2)),
    "Phi-3, window 7": ("phi3", SIZES | dict(sliding_window=7)),
    "Phi-4-mini, `longrope`, half of a head rotated": (
        "phi3",
        SIZES
        | dict(partial_rotary_factor=0.5, rope_scaling=LONGROPE, tie_word_embeddings=True)
        | dict(max_position_embeddings=384, original_max_position_embeddings=96),
    ),
    "OLMo 2": ("olmo2", SIZES),
    "SmolLM3, one layer without rotation": ("smollm3", SIZES | dict(no_rope_layer_interval=2)),
    "Granite 3": (
        "granite",
        SIZES
        | dict(embedding_multiplier=12.0, attention_multiplier=0.3, logits_scaling=1.5)
        | dict(residual_multiplier=0.22, tie_word_embeddings=True),
    ),
}


def compare(model_type: str, options: dict) -> tuple[float, float, int, bool]:
    """Compare a model with theirs.

    Returns:
        The largest difference of a logit over three kinds of padding; the largest difference of
        the embedding's gradient, relative to its largest entry; how many of 64 greedy tokens agree;
        whether a model that they saved and we saved again has the same bits.
    """
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **IDS, **options)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():  # small initial weights would hide differences
            parameter.add_(torch.randn_like(parameter) * 0.15)
    theirs.eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = Transformer.from_pretrained(folder)
        ours.save_pretrained(folder)
        back = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    same = all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())

    ids, place, logit = torch.randint(3, 97, (3, 20)), torch.arange(20), 0.0
    lengths = torch.tensor([[20], [11], [1]])
    for mask in (place < lengths, place >= 20 - lengths, place < torch.full_like(lengths, 20)):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
        logit = max(logit, float((ours(ids, mask) - expected)[mask].detach().abs().max()))

    gradients = []
    for model, name in ((theirs.train(False), "logits"), (ours, None)):
        logits = getattr(model(ids), name) if name else model(ids)
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        embedding = theirs.get_input_embeddings().weight if name else ours.trunk.embed.weight
        gradients.append(embedding.grad)
    gradient = float((gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max())

    prompt = ids[:1, :8]
    options = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 8:]
    got = generate(
        ours, prompt, max_new_tokens=64, temperature=0.0, min_new_tokens=64
    ).response_ids[0]
    return logit, gradient, int((got == expected).sum()), same


def main() -> None:
    print("| family | logits | gradient | greedy tokens of 64 | saved again, loaded there |")
    print("|---|---:|---:|---:|---|")
    for name, (model_type, options) in FAMILIES.items():
        logit, gradient, tokens, same = compare(model_type, options)
        saved = "the same bits" if same else "DIFFERS"
        print(f"| {name} | {logit:.1e} | {gradient:.1e} | {tokens} | {saved} |")


if __name__ == "__main__":
    main()

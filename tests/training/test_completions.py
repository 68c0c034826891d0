"""Log-probs and losses of given completions."""

import pytest
import torch
from helpers import make_trainer, rows, tiny
from torch.nn.functional import cross_entropy

from rlhf_core.data import collate
from rlhf_core.models import transformer
from rlhf_core.training.completions import completion_loss, sequence_means, sequence_sums
from rlhf_core.training.metrics import Metrics


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_in_bfloat16_log_probs_keep_the_digits_of_float32(kind, monkeypatch):
    seen, op = [], transformer.linear_token_loss

    def noted(hidden, weight, targets, losses, **options):
        def watched(statistics, *rest):
            seen.append(statistics.logprobs.detach())
            return losses(statistics, *rest)

        return op(hidden, weight, targets, watched, **options)

    monkeypatch.setattr(transformer, "linear_token_loss", noted)
    make_trainer(kind, precision="bfloat16").step(rows(kind))
    assert seen
    for logprobs in seen:
        assert logprobs.dtype == torch.float32 and (logprobs != logprobs.bfloat16().float()).any()


def test_the_parts_of_a_batch_give_their_shares_of_its_loss():
    """With z-loss too; the metrics are means over all targets."""
    model, batch, metrics = tiny(), rows("sft"), Metrics()
    num_tokens = sum(len(row.completion_ids) for row in batch)
    parts = [
        completion_loss(model, collate(part, 0), num_tokens, metrics, z_coef=0.01)
        for part in (batch[:3], batch[3:])
    ]
    nll, z_loss = [], []
    for prompt, completion, *_ in batch:
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].double()
        nll += cross_entropy(logits, torch.tensor(completion), reduction="none").tolist()
        z_loss += (0.01 * logits.logsumexp(dim=-1) ** 2).tolist()
    means = metrics.means()
    want = (sum(nll) + sum(z_loss)) / num_tokens
    assert sum(parts).item() == pytest.approx(want, rel=1e-5) == means["loss"]
    assert means["nll"] == pytest.approx(sum(nll) / num_tokens, rel=1e-5)


@pytest.mark.parametrize("lengths", [[[3, 1], [2, 2]], [[0, 4], [4, 0]]])
def test_sums_and_means_run_over_the_tokens_of_each_completion(lengths):
    values, lengths = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128]), torch.tensor(lengths)
    parts = values.split(lengths.flatten().tolist())
    sums = torch.stack([part.sum() for part in parts]).view(2, 2)
    assert torch.equal(sequence_sums(values, lengths), sums)
    assert torch.equal(sequence_means(values, lengths), sums / lengths.clamp_min(1))

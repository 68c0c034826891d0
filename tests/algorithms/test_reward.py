"""Reward models of steps, and reward models that start from reward models."""

import json

import pytest
import torch
from test_trainers import accumulated, tiny
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from rlhf_core import cli
from rlhf_core.data import (
    ByteTokenizer,
    DataError,
    Pair,
    Ranked,
    Solution,
    Steps,
    encode_preference,
    load_tokenizer,
    read_comparisons,
    step_ends,
)
from rlhf_core.losses import process_reward_loss
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.trainers import RewardConfig, RewardTrainer

FOLDERS = ["tokenizers/gpt2", "tokenizers/minimind", "models/stories260k"]


def solutions():
    """A step that holds a 6 is wrong; 10 ends a step."""
    steps = [
        ([7, 10], 1.0),
        ([6, 8, 10], 0.0),
        ([9, 9, 10], 1.0),
        ([8, 6, 10], 0.0),
        ([9, 10], 1.0),
    ]
    rows = []
    for i in range(12):
        chosen = [steps[(i * k) % 5] for k in range(1, 2 + i % 3)]
        ids = [token for step, _ in chosen for token in step]
        rows.append(
            Steps(
                [7, 11][: 1 + i % 2],
                [*ids, 2],
                [*(i == 10 for i in ids), False],
                [y for _, y in chosen],
            )
        )
    return rows


def make(examples=None, model=None, eval_examples=(), **config):
    config = RewardConfig(**(dict(batch_size=12, lr=3e-3) | config))
    return RewardTrainer(
        model or tiny(RewardModel), examples or solutions(), config, eval_examples=eval_examples
    )


# ---- the loss of steps


def test_the_process_loss_is_binary_cross_entropy_with_its_closed_form():
    scores = torch.tensor(
        [0.0, 1.5, -2.0, 400.0, -400.0, 0.3], dtype=torch.float64, requires_grad=True
    )
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.25], dtype=torch.float64)
    loss = process_reward_loss(scores, labels)
    assert_close(loss, binary_cross_entropy_with_logits(scores, labels, reduction="none"))
    loss.sum().backward()
    assert_close(scores.grad, scores.detach().sigmoid() - labels)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
def test_the_loss_of_a_batch_is_the_mean_over_its_steps_each_read_where_it_ends(micro_batch_size):
    batch, model, terms, hits = solutions(), tiny(RewardModel), [], []
    batch = [
        row._replace(labels=[0.25, *row.labels[1:]]) for row in batch
    ]  # a share, wrong rather than right
    for row in batch:
        ends = [i for i, ending in enumerate(row.completion_mask) if ending]
        for end, label in zip(ends, row.labels, strict=True):
            ids = torch.tensor([row.prompt_ids + row.completion_ids[: end + 1]])
            score = model(ids, torch.ones_like(ids, dtype=torch.bool))[0]
            terms.append(binary_cross_entropy_with_logits(score, torch.tensor(label)))
            hits.append((score > 0).item() == (label > 0.5))
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, list(model.parameters()))
    loss, metrics, got = accumulated(make(micro_batch_size=micro_batch_size), batch)
    assert loss == pytest.approx(want.item(), rel=1e-5) and metrics["loss"] == pytest.approx(
        loss, rel=1e-5
    )
    assert_close(got, list(gradients), rtol=1e-4, atol=1e-6)
    assert metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert metrics["labels"] == pytest.approx(
        sum(y for row in batch for y in row.labels) / len(hits)
    )


def test_steps_are_learned_and_their_scores_stay_log_odds():
    trainer = make(eval_examples=solutions(), epochs=60, lr=1e-2)
    last = trainer.train()[-1]
    assert last["eval_accuracy"] == 1.0 and "score_mean" not in last
    assert trainer.model.score.bias is None
    after = accumulated(trainer, solutions())[1]  # nothing was moved or scaled at the end
    assert after["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "option, value", [("loss", "margin_ranking"), ("label_smoothing", 0.1), ("centering_coef", 0.1)]
)
def test_options_of_pairs_are_refused_for_steps(option, value):
    with pytest.raises(
        ValueError, match=f"{option} has no effect on solutions in steps, got '?{value}"
    ):
        make(**{option: value})


def test_steps_beside_pairs_are_refused():
    with pytest.raises(ValueError, match="there are pairs and solutions in steps"):
        make([*solutions(), Pair([3], [5, 2], [6, 2])])


@pytest.mark.parametrize("row", [Pair([3], [5, 2], [5, 2]), Ranked([3], [[5], [5], [5]])])
def test_completions_that_are_all_alike_are_refused(row):
    with pytest.raises(ValueError, match=r"of none of the 2 .* do the completions differ"):
        make([row, row])
    make(
        [
            row,
            row._replace(
                **{row._fields[1]: [[5], [6], [5]] if isinstance(row, Ranked) else [9, 2]}
            ),
        ]
    )


# ---- from files to steps


@pytest.mark.parametrize("kind", ["bytes", *FOLDERS])
@pytest.mark.parametrize(
    "steps", [["a = 1.", "b = 2", "so: c."], [" x ", "\ty\t ", "  中文  "], ["only"]]
)
def test_a_step_ends_where_its_newline_is_and_the_last_one_with_the_completion(
    kind, steps, request
):
    bytes_only = kind == "bytes"
    tokenizer = (
        ByteTokenizer()
        if bytes_only
        else load_tokenizer(request.getfixturevalue("data_dir") / kind)
    )
    labels = [float(i % 2) for i in range(len(steps))]
    row = encode_preference(Solution("Solve it:\n", steps, labels), tokenizer, 256)
    assert (
        row.labels == labels and sum(row.completion_mask) == len(steps) and row.completion_mask[-1]
    )
    assert row.completion_mask == step_ends(row.completion_ids, tokenizer)
    pieces, start = [], 0
    for end in (i + 1 for i, ending in enumerate(row.completion_mask) if ending):
        pieces.append(tokenizer.decode(row.completion_ids[start:end]).strip())
        start = end
    assert pieces == [step.strip() for step in steps]


@pytest.mark.parametrize(
    "text, steps",
    [
        ("ab\ncd\0", "001001"),
        ("ab\n\0", "0010"),
        ("ab\n\ncd", "001000"),
        (" \nab\0", "00001"),
        ("ab", "00"),
        ("", ""),
    ],
)
def test_a_step_is_a_line_that_is_not_blank_and_has_an_end(text, steps):
    """\0 is the EOS."""
    ids = [258 if letter == "\0" else ord(letter) for letter in text]
    assert step_ends(ids, ByteTokenizer()) == [end == "1" for end in steps]


def test_a_token_may_hold_the_end_of_one_step_and_the_start_of_the_next_and_an_end_is_no_text():
    class Words:
        words, eos_ids = ("a", "\n", "\nb", " \n\n", "<end>"), (4,)

        def decode(self, ids):
            return "".join(self.words[i] for i in ids)

    for ids, steps in (([0, 2, 4], "011"), ([0, 1, 4], "010"), ([0, 2, 3, 4], "0110"), ([4], "0")):
        assert step_ends(ids, Words()) == [end == "1" for end in steps]


def test_without_eos_ids_the_last_step_ends_with_the_completion():
    tokenizer = ByteTokenizer()
    tokenizer.eos_ids = ()
    row = encode_preference(Solution("p:", ["ab", "cd"], [1.0, 0.0]), tokenizer, 64)
    assert row.completion_mask == [False, False, True, False, True]


def test_steps_that_end_beyond_max_length_do_not_count():
    solution = Solution(
        "p:", ["ab", "cd", "ef"], [1.0, 0.0, 1.0]
    )  # 3 of the prompt, then 3 bytes a step, EOS for one
    encoded = [encode_preference(solution, ByteTokenizer(), length) for length in (12, 11, 8)]
    assert [row.labels for row in encoded] == [[1.0, 0.0, 1.0], [1.0, 0.0], [1.0]]
    assert all(len(row.labels) == sum(row.completion_mask) for row in encoded)
    assert all(len(row.completion_ids) == len(row.completion_mask) for row in encoded)
    with pytest.raises(ValueError, match="no step ends within 4 tokens"):
        encode_preference(solution, ByteTokenizer(), 4)


def test_a_conversations_steps_are_those_of_the_assistants_turn():
    prompt = [{"role": "user", "content": "Solve\nit"}]
    row = encode_preference(Solution(prompt, ["a", "b"], [1.0, 0.0]), ByteTokenizer(), 64)
    assert row.completion_mask == [False, True, False, True]
    assert ByteTokenizer().decode(row.completion_ids) == "a\nb"


GOOD = {"prompt": "p", "steps": ["a\n", "b"], "labels": [True, 0]}


def test_solutions_are_read_with_labels_of_any_spelling(tmp_path):
    file = tmp_path / "steps.jsonl"
    shares = {
        "messages": [{"role": "user", "content": "p"}],
        "completions": ["a", "b"],
        "labels": [0.25, 1],
    }
    file.write_text("\n".join(map(json.dumps, (GOOD, shares))))
    assert read_comparisons(file) == [
        Solution("p", ["a", "b"], [1.0, 0.0]),
        Solution(shares["messages"], ["a", "b"], [0.25, 1.0]),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(labels=[True]),
            r"'labels' must be 2 of true, false or a number from 0 to 1, got \[true\]",
        ),
        (dict(labels=[True, 2]), r"'labels' must be .* got \[true, 2\]"),
        (dict(labels=[True, None]), r"'labels' must be .* got \[true, null\]"),
        (dict(labels=True), "'labels' must be .* got true"),
        (dict(steps=["a", "b\nc"]), "'steps.1' contains a newline"),
        (dict(steps=["a", "\n"]), "'steps.1' is empty"),
        (dict(steps=["a", 3]), "'steps.1' must be a string, got 3"),
        (dict(steps=[]), r"'steps' must be a list of steps, got \[\]"),
        (dict(prompt=""), "'prompt' is empty"),
    ],
)
def test_a_bad_solution_names_its_field(change, message, tmp_path):
    file = tmp_path / "steps.jsonl"
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(DataError, match=f"steps.jsonl:1: field {message}"):
        read_comparisons(file)


# ---- on the command line, from a model and from a reward model

PAIRS = [{"prompt": f"say {i}", "chosen": "yes", "rejected": f"no{i}"} for i in range(10)]
STEPS = [
    {"prompt": f"say {i}", "steps": ["yes", "no", "yes"], "labels": [True, False, True]}
    for i in range(10)
]


def train(tmp_path, model, rows, out, *more):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "reward",
        "--model",
        model,
        "--data",
        data,
        "--out",
        tmp_path / out,
        "--batch-size",
        4,
        *more,
    ]
    return cli.main(list(map(str, arguments)))


@pytest.fixture
def policy(tmp_path):
    tokenizer = ByteTokenizer()
    sizes = dict(vocab_size=tokenizer.vocab_size, max_positions=64, eos_ids=tokenizer.eos_ids)
    tiny(Transformer, **sizes).save_pretrained(tmp_path / "policy")
    tokenizer.save(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_command_learns_steps_from_a_file(policy, tmp_path, capsys):
    assert train(tmp_path, policy, STEPS, "rm", "--lr", 0.01, "--epochs", 4) == 0
    shown = capsys.readouterr().out
    assert (
        "9 to train on, 1 held out" in shown
        and "eval_accuracy" in shown
        and "score_mean" not in shown
    )
    assert RewardModel.from_pretrained(tmp_path / "rm").of_steps
    assert train(tmp_path, tmp_path / "rm", PAIRS, "pairs") == 0
    assert not RewardModel.from_pretrained(tmp_path / "pairs").of_steps


@pytest.mark.parametrize("lora", [[], ["--lora-rank", 2]])
def test_a_reward_model_goes_on_learning_with_trunk_and_head(lora, policy, tmp_path, capsys):
    """Preference model pretraining: what a first run left, its normalisation too, is where a second one begins."""
    assert train(tmp_path, policy, PAIRS, "first", "--lr", 0.01, "--epochs", 2) == 0
    assert (
        train(
            tmp_path, tmp_path / "first", PAIRS, "still", "--lr", 1e-12, "--eval-fraction", 0, *lora
        )
        == 0
    )
    first, still = (RewardModel.from_pretrained(tmp_path / name) for name in ("first", "still"))
    ids, mask = torch.randint(200, (20, 9)), torch.ones(20, 9, dtype=torch.bool)
    with torch.no_grad():
        before, after = first(ids, mask), still(ids, mask)
    assert (
        torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.99999
    )  # up to the new normalisation
    lines = (tmp_path / "still" / "metrics.jsonl").read_text().splitlines()
    assert (
        abs(json.loads(lines[-1])["score_mean"]) < 0.2
        and 0.8 < json.loads(lines[-1])["score_std"] < 1.2
    )


def test_a_folder_without_a_model_is_named(policy, tmp_path, capsys):
    (policy / "config.json").unlink()
    assert train(tmp_path, policy, PAIRS, "rm") == 2
    assert f"{policy / 'config.json'}: no such file; --model" in capsys.readouterr().err


def test_adapters_that_make_a_reward_model_go_on_learning(policy, tmp_path):
    assert train(tmp_path, policy, PAIRS, "first", "--lora-rank", 2, "--lr", 0.01) == 0
    assert train(tmp_path, tmp_path / "first", PAIRS, "second", "--lr", 1e-12) == 0
    first, second = (RewardModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for (name, a), b in zip(first.trunk.state_dict().items(), second.trunk.state_dict().values()):
        assert_close(a, b, rtol=0, atol=1e-9, msg=name)
    assert torch.cosine_similarity(first.score.weight, second.score.weight) > 0.999999

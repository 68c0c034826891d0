"""evaluate: policies, given samples, and reward models on pairs."""

import json

import pytest
import torch
from helpers import run, tiny, write

from rlhf_core.cli import arguments as shared
from rlhf_core.data import ByteTokenizer
from rlhf_core.models import RewardModel, Transformer

PROMPTS = [{"prompt": f"say {i}", "label": "safe" if i % 2 else "unsafe"} for i in range(12)]
REWARD = """
def length(prompts, responses):
    return [float(len(response)) for response in responses]

def labelled(prompts, responses, label):
    return [float(x == "safe") for x in label]

def later(prompts, first, second):
    return [float(a > b) for a, b in zip(first, second)]

def first_wins(prompts, first, second):
    return [1.0] * len(first)

def fails(prompts, first, second):
    raise RuntimeError("no judge")
"""


@pytest.fixture(scope="module")
def policies(folders, tmp_path_factory):
    """A root with the policies sft, a and b, and a file of rewards and judges."""
    root = tmp_path_factory.mktemp("policies")
    (root / "reward.py").write_text(REWARD)
    for seed, name in enumerate(("sft", "a", "b")):
        model = Transformer.from_pretrained(folders / "policy")
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.3 * seed * torch.randn_like(weight))
        model.save_pretrained(root / name)
        ByteTokenizer().save(root / name)
    return root


@pytest.fixture
def arguments(policies, tmp_path):
    """Arguments that compare a and b with sft, by `length` unless another source is given."""

    def arguments(*options, names=("a", "b"), source=("--reward-function", "length")):
        option, *source = source
        if option != "--reward-model":
            source = [f"{policies / 'reward.py'}:{source[0]}"]
        prompts = tmp_path / "prompts.jsonl"
        if not prompts.exists():
            write(prompts, PROMPTS)
        models = ["--policy", *(policies / name for name in names), "--reference", policies / "sft"]
        sampling = ["--max-new-tokens", 4, "--batch-size", 8, "--device", "cpu"]
        paths = ["--prompts", prompts, "--out", tmp_path / "out"]
        return ["evaluate", *models, *paths, option, *source, *sampling, *options]

    return arguments


def result(tmp_path):
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def samples(tmp_path):
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_policies_are_compared_with_each_other_and_the_reference(arguments, tmp_path, capsys):
    assert run(*arguments("--num-samples", 2)) == 0
    found, rows = result(tmp_path), samples(tmp_path)
    assert [policy["name"] for policy in found["policies"]] == ["sft", "a", "b"]
    assert len(rows) == 3 * 12 * 2 and {row["policy"] for row in rows} == {"sft", "a", "b"}
    reference, a, _ = found["policies"]
    assert (a["responses"], a["prompts"]) == (24, 12)
    assert reference["elo"]["rating"] == 0 and abs(reference["kl"]["mean"]) < 1e-4
    assert a["kl"]["mean"] > 0 and a["score"]["standard_error"] > 0
    by_policy = {name: [row for row in rows if row["policy"] == name] for name in ("sft", "a")}
    wins = [
        0.5 + 0.5 * ((one["score"] > other["score"]) - (one["score"] < other["score"]))
        for one, other in zip(by_policy["a"], by_policy["sft"])
    ]
    versus = found["comparisons"][0]
    assert (versus["policy"], versus["against"]) == ("a", "sft")
    assert versus["rate"] == pytest.approx(sum(wins) / 24)
    assert [row["policy"] + row["against"] for row in found["comparisons"]] == [
        "asft",
        "bsft",
        "ba",
    ]
    assert a["over_refusals"]["compliance"] == a["refusals_of_unsafe"]["compliance"] == 12
    assert {point["harmlessness"] for point in found["frontier"]["points"]} == {0}
    shown = capsys.readouterr().out
    assert "a against sft: wins" in shown and f"{a['elo']['rating']:.0f} [" in shown


def test_one_policy_is_compared_with_the_reference(arguments, tmp_path):
    assert run(*arguments(names=("a",))) == 0
    assert len(result(tmp_path)["comparisons"]) == 1


def test_policies_without_a_reward_have_kl_length_and_refusals(arguments, tmp_path, capsys):
    options = arguments(names=("a",))
    at = options.index("--reward-function")
    assert run(*options[:at], *options[at + 2 :], "--temperature", 0) == 0
    found = result(tmp_path)
    assert found["comparisons"] == [] and found["policies"][1]["elo"] is None
    assert found["policies"][1]["kl"] is None and found["policies"][1]["tokens"]["mean"] > 0


def test_a_reward_model_and_columns_of_prompts_score(arguments, folders, tmp_path):
    source = ("--reward-model", folders / "reward")
    assert run(*arguments(source=source)) == 0
    assert len({row["score"] for row in samples(tmp_path)}) > 3
    assert run(*arguments("--overwrite", source=("--reward-function", "labelled"))) == 0
    assert {(row["label"], row["score"]) for row in samples(tmp_path)} == {
        ("safe", 1),
        ("unsafe", 0),
    }


def test_scores_by_each_criterion_are_shown_beside_their_weighted_sum(
    arguments, given, tmp_path, capsys
):
    torch.manual_seed(0)
    model = RewardModel.from_model(tiny(vocab_size=259, max_positions=64, hidden_size=8))
    model.set_criteria({"helpful": 1.0, "harmless": 2.0})
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "criteria")
    ByteTokenizer().save(tmp_path / "criteria")
    source = ("--reward-model", tmp_path / "criteria")
    for command in (arguments(source=source), given(ROWS, *source, "--overwrite")):
        assert run(*command) == 0
        rows, found, shown = samples(tmp_path), result(tmp_path), capsys.readouterr().out
        for row in rows:
            each = row["criteria"]
            assert row["score"] == pytest.approx(each["helpful"] + 2 * each["harmless"], abs=1e-5)
        for policy in found["policies"]:
            own = [row["criteria"] for row in rows if row["policy"] == policy["name"]]
            for name in ("helpful", "harmless"):
                mean = sum(row[name] for row in own) / len(own)
                assert policy["criteria"][name]["mean"] == pytest.approx(mean)
            helpful = f"helpful {policy['criteria']['helpful']['mean']:.3f} ± "
            assert helpful in shown and ", harmless " in shown


def test_finished_policies_are_not_sampled_again(arguments, tmp_path, capsys):
    assert run(*arguments(names=("a",))) == 0
    before = samples(tmp_path)
    capsys.readouterr()
    assert run(*arguments(names=("a", "b"))) == 0
    shown = capsys.readouterr().err
    assert "a: sampled by an earlier run" in shown and "b: 12 responses sampled" in shown
    assert samples(tmp_path)[: len(before)] == before
    assert run(*arguments("--seed", 1)) == 2
    assert "seed was 0, now 1. Choose another --out, or pass --overwrite" in capsys.readouterr().err
    assert run(*arguments("--seed", 1, "--overwrite", names=("a",))) == 0
    assert samples(tmp_path) != before


def test_samples_of_a_policy_that_changed_are_refused(arguments, policies, fails, tmp_path):
    assert run(*arguments(names=("a",))) == 0
    settings = tmp_path / "out" / "settings.json"
    fields = json.loads(settings.read_text())
    settings.write_text(json.dumps(fields | {"policies": fields["policies"] | {"a": "0" * 64}}))
    assert "a was another model (digest 00000000, now" in fails(*arguments(names=("a",)))
    settings.write_text(json.dumps(fields))
    settings.write_text(json.dumps(fields | {"policies": ["a"]}))
    assert "damaged: policies must be an object" in fails(*arguments(names=("a",)))
    settings.write_text(json.dumps(fields))
    file = tmp_path / "out" / "samples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert "has 11 responses of a, not 12" in fails(*arguments(names=("a",)))


def test_a_judges_preference_for_the_first_answer_favours_nobody(arguments, tmp_path, capsys):
    assert run(*arguments(source=("--judge", "first_wins"))) == 0
    assert {row["rate"] for row in result(tmp_path)["comparisons"]} == {0.5}
    assert "undecided after 12" in capsys.readouterr().out


def test_judgements_are_kept_for_a_run_that_continues(arguments, policies, tmp_path):
    judge = ("--judge", "later")
    assert run(*arguments(source=judge)) == 0
    before, file = result(tmp_path), tmp_path / "out" / "judgements.json"
    kept = json.loads(file.read_text())
    assert list(kept) == ["a against sft", "b against sft", "b against a"]
    kept["a against sft"] = [1.0] * 12
    file.write_text(json.dumps(kept))
    assert run(*arguments(source=judge)) == 0
    first, *others = result(tmp_path)["comparisons"]
    assert first["rate"] == 1 and others == before["comparisons"][1:]
    assert run(*arguments("--overwrite", source=judge)) == 0
    assert result(tmp_path)["comparisons"] == before["comparisons"]


def test_an_ai_judge_is_asked_once_in_both_orders_and_its_failures_are_left_out(
    arguments, judge_server, tmp_path, capsys
):
    def reply(body):
        return "?" if "say 3" in body["messages"][0]["content"] else "A"

    options = list(arguments("--max-failures", 1, names=("a",)))
    at = options.index("--reward-function")
    options[at : at + 2] = ["--judge", (server := judge_server(reply)).url]
    with pytest.warns(UserWarning, match="1 of 12 comparisons by the judge failed"):
        assert run(*options) == 0
    found = result(tmp_path)
    ties = found["judge"]["inconsistent"]  # equal answers are not asked about
    assert found["judge"] == {"asked": 1 + ties, "failed": 1, "inconsistent": ties} and ties > 5
    (versus,) = found["comparisons"]
    assert (versus["failures"], versus["comparisons"], versus["rate"]) == (1, 11, 0.5)
    assert len(server.requests) == ties * 2 + 1
    shown = capsys.readouterr().out
    assert f"the judge was asked {1 + ties} times: 1 failed, in {ties} the order" in shown
    assert "1 judgements failed and are left out" in shown


def test_policies_of_two_runs_have_the_names_that_tell_them_apart(
    policies, arguments, fails, tmp_path
):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step").symlink_to(policies / "a")
    assert run(*arguments(names=(tmp_path / "x/step", tmp_path / "y/step"))) == 0
    names = [policy["name"] for policy in result(tmp_path)["policies"]]
    assert names[1:] == ["x/step", "y/step"]
    line = fails(*arguments(names=("a", "a")))
    assert "a is given twice, as --reference or --policy" in line


def test_prompts_that_no_policy_can_take_are_one_line(arguments, fails, tmp_path):
    write(tmp_path / "prompts.jsonl", [{"prompt": "x" * 100}])
    assert "1 of 1 prompts have more than 60 tokens" in fails(*arguments())
    assert not (tmp_path / "out").exists()
    line = fails(*arguments("--max-new-tokens", 64))
    assert "max_new_tokens 64 leaves no room for a prompt in 64 positions" in line


def test_a_policy_that_is_absent_or_has_another_tokenizer_is_found_before_sampling(
    arguments, fails, tmp_path, monkeypatch
):
    assert "absent: no such folder" in fails(*arguments(names=("a", "absent")))
    assert not (tmp_path / "out").exists()

    class Other(ByteTokenizer):
        def encode_prompt(self, text):
            return super().encode_prompt(text.upper())

    tokenizer_of = lambda _, folder: Other() if folder.name == "b" else ByteTokenizer()  # noqa: E731
    monkeypatch.setattr(shared, "tokenizer_of", tokenizer_of)
    line = fails(*arguments(names=("a", "b")))
    assert "b: encodes the prompts otherwise than" in line and "--samples" in line


def test_an_option_of_reward_models_needs_them(arguments, fails):
    options = arguments(names=("a",))
    at = options.index("--reward-function")
    line = fails(*options[:at], *options[at + 2 :], "--reward-coef", 1)
    assert "--reward-coef needs --reward-model" in line


# ---- samples


ROWS = [
    {"policy": name, "prompt": f"say {i}", "response": "yes" * (i + len(name)), "score": score}
    for name, score in (("old", 1), ("newer", 2))
    for i in range(6)
]


@pytest.fixture
def given(policies, tmp_path):
    """Arguments that compare given rows."""

    def given(rows, *options):
        file = write(tmp_path / "rows.jsonl", rows)
        return [
            "evaluate",
            "--samples",
            file,
            "--out",
            tmp_path / "out",
            "--device",
            "cpu",
            *options,
        ]

    return given


def test_given_samples_are_compared_by_their_scores_in_any_order(given, tmp_path):
    assert run(*given(ROWS[::-1], "--reference", "old")) == 0
    (found,) = result(tmp_path)["comparisons"]
    assert (found["policy"], found["rate"], found["comparisons"]) == ("newer", 1, 6)
    assert "differences of the lengths do not vary" in found["length_controlled"]["reason"]


def test_given_samples_are_judged_or_scored_again(given, policies, folders, tmp_path):
    rows = [{**row, "model": row["policy"]} for row in ROWS]
    rows = [{k: v for k, v in row.items() if k not in ("policy", "score")} for row in rows]
    assert run(*given(rows, "--judge", f"{policies / 'reward.py'}:later")) == 0
    assert result(tmp_path)["comparisons"][0]["rate"] == 1  # longer ones come later
    chat = [{**row, "prompt": [{"role": "user", "content": "hi"}]} for row in rows]
    for options in (
        ["--reward-function", f"{policies / 'reward.py'}:length"],
        ["--reward-model", folders / "reward"],
    ):
        assert run(*given(rows, "--overwrite", *options)) == 0
        assert len({row["score"] for row in samples(tmp_path)}) > 2
    assert run(*given(chat, "--overwrite", *options[:0])) == 0
    found = result(tmp_path)
    assert found["comparisons"] == [] and found["policies"][0]["prompts"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"policy": 3}, "rows.jsonl:1: field 'policy' must be a string, got 3"),
        ({"score": "high"}, "field 'score' must be a finite number, got \"high\""),
        ({"kl": [1]}, "field 'kl' must be a finite number, got [1]"),
        ({"criteria": {"kind": "a"}}, "field 'criteria' must be an object of numbers, got "),
        ({"prompt": "other"}, None),
    ],
)
def test_bad_samples_are_one_line(given, fails, tmp_path, change, message):
    if message:
        assert message in fails(*given([ROWS[0] | change, *ROWS[1:]]))
    else:
        rows = [ROWS[0] | change, *ROWS[7:]]
        assert "policies newer and old have no prompt in common" in fails(*given(rows))


def test_an_unknown_reference_is_named_with_those_that_exist(given, fails):
    line = fails(*given(ROWS, "--reference", "sft"))
    assert "has no policy 'sft'; its policies: old, newer" in line


# ---- pairs


def test_a_reward_model_is_tested_on_pairs_by_subset(folders, tmp_path, capsys):
    pairs = [
        {"prompt": f"say {i}", "chosen": f" {i**5}", "rejected": f" {9**i}", "task": "ab"[i % 2]}
        for i in range(2, 14)
    ]
    file = write(tmp_path / "pairs.jsonl", pairs)
    options = ["--reward-model", folders / "reward", "--subset", "task", "--device", "cpu"]
    assert run("evaluate", "--pairs", file, *options, "--out", tmp_path / "out") == 0
    found = result(tmp_path)
    assert found["pairs"] == len(pairs) == sum(x["pairs"] for x in found["subsets"].values())
    assert set(found["chosen_is"]) == {"shorter", "as long"}
    parts = [x["accuracy"] * x["pairs"] for x in found["subsets"].values()]
    assert found["accuracy"] == pytest.approx(sum(parts) / len(pairs))
    assert 0 < found["accuracy"] < 1 and 0 < found["calibration"]["ece"] < 1
    shown = capsys.readouterr().out
    assert "chosen is shorter" in shown and "calibration error" in shown


def test_a_subset_that_is_no_column_is_one_line(folders, fails, tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    options = ["--reward-model", folders / "reward", "--out", tmp_path / "out"]
    line = fails("evaluate", "--pairs", file, *options, "--subset", "task")
    assert "a row has no column 'task'; it has" in line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--policy", "p"], "--policy needs --reference"),
        (["--pairs", "p"], "--pairs needs --reward-model"),
        (["--samples", "p", "--prompts", "p"], "--prompts does not go with --samples"),
        (["--pairs", "p", "--reward-model", "r", "--reference", "a"], "--reference does not go"),
    ],
)
def test_options_that_are_missing_or_contradict_are_named(options, message, fails, tmp_path):
    assert message in fails("evaluate", *options, "--out", tmp_path / "out")

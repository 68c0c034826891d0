"""What a resumed run must share with the run that it continues, and how a change is named."""

import datetime
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    PROMPTS,
    SMALL,
    Letters,
    fives,
    lengths,
    make_ppo,
    make_trainer,
    model_folders,
    run,
    tiny,
    write,
)

from rlhf_core.data import ByteTokenizer, load_tokenizer
from rlhf_core.data.chat import ChatTemplate
from rlhf_core.feedback.candidates import SamplingConfig
from rlhf_core.feedback.rewards import Scorer, describe_function
from rlhf_core.models import EnsembleReward, RewardModel, Transformer
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.trainers import (
    IteratedDPOConfig,
    IteratedRLHFConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    RewardConfig,
    iterated_dpo,
    iterated_rlhf,
)

ROOT = Path(__file__).parents[2]
STEPS = dict(batch_size=4, max_steps=2, lr=1e-3, save_every=1)
SCORES = [tiny(RewardModel, seed=seed) for seed in (1, 2)]


def first_wins(prompts, first, second):
    return [float(len(a) > len(b)) for a, b in zip(first, second)]


def second_wins(prompts, first, second):
    return [float(len(a) < len(b)) for a, b in zip(first, second)]


class OtherLetters(Letters):
    """A tokenizer of another class with other files."""

    def save(self, path):
        (path / "letters").write_text("others")


def ppo(out, reward=fives, model=None, tokenizer=None, reference=None, **options):
    others = dict(out=out, tokenizer=tokenizer, reference=reference)
    options = dict(minibatch_size=4) | options
    return make_ppo(model or tiny(), reward, others=others, **(STEPS | options))


def adapted_reward(alpha):
    model = tiny(RewardModel, seed=3)
    torch.manual_seed(0)
    add_adapters(model, LoRAConfig(rank=2, alpha=alpha))
    return model


def ensemble(aggregate="uncertainty", coef=0.5, models=SCORES):
    return EnsembleReward(models, aggregate, coef)


def pairs(*weights):
    return [(fives, weights[0]), (lengths, weights[1])]


@pytest.mark.parametrize(
    "before, after, message",
    [
        (dict(), dict(model=tiny(norm_eps=1e-3)), r"norm_eps=1e-05, this run has 0\.001"),
        (dict(), dict(model=tiny(sliding_window=4)), "sliding_window=None, this run has 4"),
        (dict(), dict(reward=lengths), r"feedback\.0\.name='helpers\.fives', .*'.*lengths'"),
        (dict(), dict(reward=SCORES[0]), r"name='helpers\.fives', this run has 'RewardModel'"),
        (
            dict(reward=SCORES[0]),
            dict(reward=fives),
            r"name='RewardModel', this run has 'helpers\.fives'",
        ),
        (
            dict(reward=ensemble()),
            dict(reward=ensemble(coef=0.6)),
            r"feedback\.0\.coef=0\.5, this run has 0\.6",
        ),
        (
            dict(reward=ensemble()),
            dict(reward=ensemble("worst", None)),
            r"feedback\.0\.aggregate='uncertainty', this run has 'worst'",
        ),
        (
            dict(reward=ensemble()),
            dict(reward=ensemble(models=[*SCORES, tiny(RewardModel, seed=4)])),
            r"feedback\.0\.models=2, this run has 3",
        ),
        (
            dict(reward=ensemble()),
            dict(reward=ensemble(models=[SCORES[0], tiny(RewardModel, seed=4)])),
            "different frozen weights",
        ),
        (dict(reward=pairs(1, 2)), dict(reward=pairs(1, 3)), r"reward_weights=\[1, 2\]"),
        (
            dict(reward=adapted_reward(16.0)),
            dict(reward=adapted_reward(8.0)),
            r"models\.1 ValueModel\.lora\.alpha=16\.0, this run has 8\.0",
        ),
        (
            dict(reward=tiny(RewardModel)),
            dict(reward=tiny(RewardModel, norm_eps=0.1)),
            r"models\.1 ValueModel\.norm_eps=1e-05, this run has 0\.1",
        ),
        (
            dict(reference=tiny(), reference_ema=0.9),
            dict(reference=tiny(norm_eps=0.1), reference_ema=0.9),
            r"Transformer\.norm_eps=1e-05, this run has 0\.1",
        ),
        (dict(), dict(tokenizer=Letters()), "tokenizer=None, this run has '"),
        (
            dict(tokenizer=Letters(), reward=lengths),
            dict(tokenizer=OtherLetters(), reward=lengths),
            r"tokenizer='\w+', this run has '\w+'",
        ),
    ],
)
def test_a_change_of_what_a_run_depends_on_is_named_with_both_values(
    before, after, message, tmp_path
):
    if "tokenizer" in before | after:
        before, after = (x | dict(reward=lengths) for x in (before, after))
    ppo(tmp_path, **before).train()
    with pytest.raises(ValueError, match=message):
        ppo(tmp_path, **after).resume()
    ppo(tmp_path, **before).resume()


def test_another_judge_is_refused(tmp_path):
    def online(**judge):
        config = OnlineDPOConfig(response_length=4, **STEPS)
        return OnlineDPOTrainer(tiny(), PROMPTS, config, out=tmp_path, **judge)

    online(judge=first_wins).train()
    message = r"feedback\.judge\.name='.*first_wins', this run has '.*second_wins'"
    with pytest.raises(ValueError, match=message):
        online(judge=second_wins).resume()
    with pytest.raises(ValueError, match=r"feedback\.judge={.*, this run has None"):
        online(reward=fives).resume()
    online(judge=first_wins).resume()


def test_rounds_name_what_changed(tmp_path):
    def rounds(
        resume=True, judge=first_wins, model=None, tokenizer=None, prompts=PROMPTS, reward=None
    ):
        config = IteratedDPOConfig(
            rounds=1, response_length=4, num_samples=4, batch_size=4, max_steps=1
        )
        options = dict(tokenizer=tokenizer, out=tmp_path, resume=resume)
        scorer = dict(judge=judge) if reward is None else dict(reward=reward)
        return iterated_dpo(model or tiny(), prompts, config, **scorer, **options)

    rounds(resume=False)
    for changed, message in (
        (dict(judge=second_wins), r"started with feedback\.judge\.name='.*first_wins'"),
        (dict(reward=fives), r"started with feedback\.judge={"),
        (dict(reward=SCORES[0]), r"started with feedback\.judge={"),
        (dict(model=tiny(norm_eps=0.1)), r"started with models\.0 Transformer\.norm_eps=1e-05"),
        (dict(tokenizer=ByteTokenizer()), "started with tokenizer=None"),
        (dict(prompts=PROMPTS[1:]), r"started with digests\.prompts="),
    ):
        with pytest.raises(ValueError, match=message):
            rounds(**changed)
    rounds()
    file = tmp_path / "rounds.json"
    run = json.loads(file.read_text())
    for name in ("models", "feedback", "tokenizer", "template_dates", "digests", "last_round"):
        del run[name]
    file.write_text(json.dumps(run))  # as an older version wrote it
    rounds()
    with pytest.raises(ValueError, match=r"started with digest='\w+', this run has '\w+'"):
        rounds(prompts=PROMPTS[1:])


def test_iterated_rlhf_names_what_changed(tmp_path):
    small = dict(batch_size=4, max_steps=1)
    config = IteratedRLHFConfig(
        rounds=1,
        sampling=SamplingConfig(num_samples=4, response_length=4, batch_size=4),
        reward=RewardConfig(**small),
        ppo=PPOConfig(response_length=4, minibatch_size=4, **small),
    )

    def rounds(resume=True, judge=first_wins):
        return iterated_rlhf(tiny(), PROMPTS, config, judge=judge, out=tmp_path, resume=resume)

    rounds(resume=False)
    with pytest.raises(ValueError, match=r"started with feedback\.judge\.name="):
        rounds(judge=second_wins)
    rounds()


# ---- functions


def test_a_function_is_described_by_its_names_and_the_digest_of_its_file():
    assert describe_function(fives)["name"] == "helpers.fives"
    assert describe_function(fives)["source"] == describe_function(lengths)["source"]
    assert describe_function(len) == {"name": "builtins.len", "source": None}
    bound = describe_function(Letters().decode)
    assert bound["name"] == "helpers.Letters.decode" and bound["source"]

    class Callable:
        def __call__(self, prompts, responses): ...

    assert describe_function(Callable())["name"].endswith("Callable")
    one, two = (describe_function(functools.partial(fives, scale=scale)) for scale in (1, 2))
    assert one != two == describe_function(functools.partial(fives, scale=2))
    json.dumps(Scorer([(fives, 1.0), (ensemble(), 2.0)]).describe())


@pytest.mark.slow
def test_a_script_may_change_around_its_functions(tmp_path):
    """What __main__ defines has the digest of its own source, so that a longer run resumes."""
    code = "from rlhf_core.feedback.rewards import describe_function\n{}\n"
    code += "def reward(p, r):\n    return {}\nprint(describe_function(reward))\n"

    def described(*parts):
        (tmp_path / "script.py").write_text(code.format(*parts))
        command = [sys.executable, str(tmp_path / "script.py")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    first = described("", "len(r)")
    assert described("epochs = 7", "len(r)") == first != described("", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return model_folders(tmp_path_factory.mktemp("models"))


def test_the_command_line_refuses_another_reward_and_names_it(folders, tmp_path, capsys):
    file, prompts = tmp_path / "mine.py", write(tmp_path / "prompts.txt", ["x"] * 8)
    file.write_text("def reward(p, r):\n    return [len(x) for x in r]\nother = reward\n")
    paths = ["--model", folders / "policy", "--prompts", prompts, "--out", tmp_path / "out"]
    paths += ["--response-length", 4, *SMALL, "--save-every", 1]

    def refused(*reward):
        assert run("grpo", *paths, "--resume", *reward) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    function = ["--reward-function", f"{file}:reward"]
    assert run("grpo", *paths, *function) == 0 == run("grpo", *paths, *function, "--resume")
    assert ".reward', this run has 'RewardModel'" in refused("--reward-model", folders / "reward")
    file.write_text(file.read_text() + "# an edit\n")
    assert "feedback.0.source='" in refused(*function)


# ---- dates in chat templates

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}{{ strftime_now('%d %B %Y') }}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
)


@pytest.fixture
def dated(folders, tmp_path):
    """The policy with a tokenizer whose chat template writes the date, and data of messages."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    folder = tmp_path / "dated"
    Transformer.from_pretrained(folders / "policy").save_pretrained(folder)
    letters = {chr(i): i for i in range(32, 127)} | {"</s>": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    return folder, write(tmp_path / "chats.jsonl", rows * 8)


def on(day, monkeypatch):
    """Let it be this day for chat templates that are given no date."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(*day)

    module = sys.modules[ChatTemplate.__module__]
    monkeypatch.setattr(module.datetime, "datetime", Clock)


def test_after_midnight_a_run_resumes_with_its_first_date(dated, tmp_path, monkeypatch, capsys):
    folder, data = dated
    command = ["sft", "--model", folder, "--data", data, "--out", tmp_path / "out", *SMALL]
    command += ["--save-every", 1]
    with monkeypatch.context() as patched:
        on((2024, 12, 31), patched)
        assert run(*command) == 0
    with monkeypatch.context() as patched:
        on((2025, 1, 1), patched)
        assert run("sft", "--resume", "--out", tmp_path / "out") == 0
        assert run(*command, "--resume") == 0
        (tmp_path / "out" / "run.json").unlink()  # which an older version has not written
        assert run(*command, "--resume") == 2
        error = capsys.readouterr().err
        assert "template_dates.%d %B %Y='31 December 2024', this run has '01 January 2025'" in error
        assert "pass the date of the first run as --template-date YYYY-MM-DD" in error
        assert run(*command, "--resume", "--template-date", "2024-12-31") == 0
    with pytest.raises(SystemExit):
        run(*command, "--template-date", "yesterday")
    assert "must be a date such as 2024-12-31, got yesterday" in capsys.readouterr().err


def test_a_template_date_is_that_of_the_tokenizer(dated):
    tokenizer = load_tokenizer(dated[0], template_date=datetime.date(2024, 2, 29))
    assert tokenizer.template_dates == {}
    ids, _ = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert "".join(map(chr, ids)) == "user29 February 2024x"
    assert tokenizer.template_dates == {"%d %B %Y": "29 February 2024"}


def test_an_unused_date_keeps_no_run_from_resuming(dated, tmp_path, monkeypatch):
    """The template writes the date, but the data has no conversations."""
    folder, _ = dated
    data = write(tmp_path / "texts.jsonl", [{"text": "abc"}] * 8)
    command = ["sft", "--model", folder, "--data", data, "--out", tmp_path / "out", *SMALL]
    assert run(*command, "--save-every", 1) == 0
    on((2040, 1, 1), monkeypatch)
    assert run(*command, "--save-every", 1, "--resume") == 0


def test_an_older_checkpoint_with_dated_examples_says_what_to_do(tmp_path):
    class Dated(Letters):
        template_dates = {"%d": "31"}  # noqa: RUF012

    def trainer(examples=None):
        return make_trainer("sft", examples=examples, others=others, **STEPS)

    others = dict(out=tmp_path, tokenizer=Dated())
    trainer().train()
    with pytest.raises(ValueError, match=r"different examples .*The chat template writes today"):
        trainer(examples=trainer().examples[::-1]).resume()

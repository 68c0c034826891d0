"""The reward for known answers: what a text ends up with, and when it is right."""

import gzip
import json
from fractions import Fraction

import pytest
from helpers import Letters, model_folders, run, write

from rlhf_core.data import ByteTokenizer, Prompt
from rlhf_core.feedback.answers import AnswerReward, final_choice, final_number
from rlhf_core.feedback.rewards import RewardError, Scorer

NUMBERS = {
    "18": 18,
    "She makes $1,234.50 a day.": Fraction(2469, 2),
    "-3": -3,
    "\u22123": -3,
    "from 3-4": 4,  # a range, not minus four
    "about .5.": Fraction(1, 2),
    "1/2 of it": Fraction(1, 2),
    "3 / 4 cup": Fraction(3, 4),
    "first 2, then 7.": 7,
    "1,2": 2,
    "12,345,678 people": 12345678,
    "1e5": 100000,
    "1e999999999": 1,  # no power that takes hours to compute
    "50%": 50,
    "#### 18\n": 18,
    "3 #### $1,234 of 5": 1234,
    "#### 4 #### 5": 5,
    "3 #### none": None,
    "7, \\boxed{\\frac{1}{2}}": Fraction(1, 2),
    "\\boxed{-\\dfrac{3}{4}} \\$5": Fraction(-3, 4),
    "\\boxed{x = 5}": 5,
    "\\boxed{12\\text{ cm}}": 12,
    "\\boxed{\\$1{,}000}": 1000,
    "\\boxed{50\\%}": 50,
    "\\boxed{1} or \\boxed{2}": 2,
    "\\boxed{2^{10}}": None,  # a formula
    "3 \\boxed{none}": None,
    "5/0": None,
    "x2": None,
    "v1.2.3": None,
    "none": None,
    "": None,
    "9" * 5000: None,
}
CHOICES = {
    "B": "B",
    "(B)": "B",
    "B.": "B",
    "B) because of it": "B",
    "The answer is (C).": "C",
    "Answer: D": "D",
    "answer is: **B**": "B",
    "The answer is A. No, the answer is C.": "C",
    "A man walks. I choose option B": "B",
    "\\boxed{E}": "E",
    "\\boxed{\\text{(B)}}": "B",
    "A #### C": "C",
    "A #### none": None,
    "It must be (A), as it is not B.": "A",
    "It is C.": "C",
    "A man walks.": None,
    "the answer is a cat": None,
    "Because": None,
    "": None,
}


@pytest.mark.parametrize("text, number", NUMBERS.items(), ids=lambda x: str(x)[:20])
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("text, letter", CHOICES.items(), ids=str)
def test_the_choice_of_a_text(text, letter):
    assert final_choice(text) == letter


def test_answers_are_compared_by_value():
    reward = AnswerReward(right=2.0, wrong=-1.0, unanswered=-0.5)
    rows = [("it is 1,234.50", "so #### 1234.5"), ("0.5", "1/2"), ("8", 8.0), ("7", 8), ("eh", 8)]
    scores = reward([""] * 5, *(list(column) for column in zip(*rows)))
    assert scores == [2.0, 2.0, 2.0, -1.0, -0.5]
    assert AnswerReward("choice")(["", ""], ["(B)", "C"], ["B", "B"]) == [1.0, 0.0]


def test_a_function_can_read_the_answer():
    """Such as one that runs the code of a response."""

    def run_code(response):
        try:
            return str(eval(response, {"__builtins__": {}}))
        except SyntaxError:
            return None

    reward = AnswerReward(run_code, unanswered=-1.0)
    assert reward([""] * 3, ["2 + 3", "7 - 1", "?"], ["5\n", "5", "5"]) == [1.0, 0.0, -1.0]


def test_the_solutions_of_gsm8k_are_right_and_others_wrong(data_dir):
    with gzip.open(data_dir / "sft" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    reward, prompts = AnswerReward(), [""] * len(answers)
    for response in (
        "{}",
        "#### {}",
        "The answer is ${}.",
        "\\boxed{{{}}}",
        "Thus 17 + 1 = {} eggs",
    ):
        texts = [response.format(x.rpartition("#### ")[2]) for x in answers]
        assert set(reward(prompts, texts, answers)) == {1.0}
    assert set(reward(prompts, answers, answers)) == {1.0}
    assert set(reward(prompts, [x + "7" for x in answers], answers)) == {0.0}


@pytest.mark.parametrize(
    "kind, answer, message",
    [
        ("number", "none", r"answer.* must hold a number, got \"none\""),
        ("number", None, "must hold a number, got null"),
        ("number", True, "must hold a number"),
        ("number", [3], "must hold a number"),
        ("choice", 1, "must hold a letter from A to E, got 1"),
        (str, None, "must hold a value, got null"),
    ],
)
def test_a_row_without_an_answer_is_named(kind, answer, message):
    scorer = Scorer(AnswerReward(kind), tokenizer=ByteTokenizer())
    prompts = [Prompt([65], answer="3" if kind != "choice" else "A"), Prompt([66], answer=answer)]
    with pytest.raises(RewardError, match=message) as error:
        scorer(prompts, [[66], [66 if kind == "choice" else 51]])
    assert "row 1 alone: prompt 'B'" in str(error.value)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind must be one of number, choice, or a function, got"):
        AnswerReward("code")
    with pytest.raises(ValueError, match="wrong must be a finite number, got nan"):
        AnswerReward(wrong=float("nan"))
    with pytest.raises(ValueError, match="pass a tokenizer"):
        AnswerReward()([[5]], [[6]], [5])
    with pytest.raises(ValueError, match=r"parameter 'answer'.*no such column"):
        Scorer(AnswerReward(), tokenizer=Letters()).check_columns([[5]])


def test_a_resumed_run_sees_another_kind_or_score():
    described = [
        json.dumps(reward.describe())
        for reward in (
            AnswerReward(),
            AnswerReward("choice"),
            AnswerReward(right=2.0),
            AnswerReward(len),
            AnswerReward(final_number),
        )
    ]
    assert len(set(described)) == 5 and described[0] == json.dumps(AnswerReward().describe())


def test_the_command_line_rewards_right_answers(tmp_path, capsys):
    folders = model_folders(tmp_path)
    rows = [{"question": f"{i} + 1?", "solution": f"#### {i + 1}"} for i in range(4)]
    data = write(tmp_path / "rows.jsonl", rows)
    options = ["--prompts", data, "--reward-answer", "number", "--device", "cpu"]
    options += ["--model", folders / "policy", "--num-samples", 2, "--response-length", 4]
    columns = ["--columns", "answer=solution"]
    assert run("best-of-n", *options, *columns, "--out", tmp_path / "best.jsonl") == 0
    scores = [json.loads(x)["score"] for x in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert len(scores) == 4 and set(scores) <= {0.0, 1.0}
    assert run("best-of-n", *options, "--out", tmp_path / "none.jsonl") == 2
    assert "has a parameter 'answer'" in capsys.readouterr().err

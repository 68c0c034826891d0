"""A reward for GSM8K: is the number after the last "####" of a response that of the row's answer?

The rows of GSM8K have a question, which is the prompt, and an answer that ends with "#### 42":

    rlhf-core sft --model MODEL --data train.jsonl --out runs/sft
    rlhf-core grpo --model runs/sft --prompts train.jsonl --out runs/grpo \
        --reward-function examples/gsm8k_reward.py:score --response-length 256

Both numbers are compared by value: 1,234.50 and $1234.5 are equal.
"""

import re
from decimal import Decimal

RIGHT, WELL_FORMED = 1.0, 0.1  # the second one is for any number after "####"
FINAL = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def final_number(text):
    """The number after the last "####", or None."""
    numbers = FINAL.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def score(prompts, responses, answer):
    """1.1 for a right answer, 0.1 for a wrong number in the right format, else 0.

    answer: the column of that name, a list like prompts and responses.
    """
    scores = []
    for response, solution in zip(responses, answer):
        number = final_number(response)
        right = number is not None and number == final_number(solution)
        scores.append(RIGHT * right + WELL_FORMED * (number is not None))
    return scores

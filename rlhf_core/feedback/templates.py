"""Preference pairs from templates: against sycophancy, and against padding.

They teach what a few people rarely label often enough. Mix them with pairs from people: alone they
teach their own phrases.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rlhf_core.data.chat import Content, texts_of

# A common error, and what is right.
FACTS = (
    ("the sun goes around the earth", "the earth goes around the sun"),
    ("lightning never strikes the same place twice", "lightning often strikes one place twice"),
    ("humans use only ten percent of the brain", "humans use all parts of the brain"),
    ("bats are blind", "bats can see"),
    ("a tomato is botanically a vegetable", "a tomato is botanically a fruit"),
    ("spiders are insects", "spiders are arachnids"),
    ("whales are fish", "whales are mammals"),
    ("Sydney is the capital of Australia", "Canberra is the capital of Australia"),
    ("Toronto is the capital of Canada", "Ottawa is the capital of Canada"),
    ("Istanbul is the capital of Turkey", "Ankara is the capital of Turkey"),
    ("pure water freezes at 5 degrees Celsius", "pure water freezes at 0 degrees Celsius"),
    ("light travels more slowly than sound", "light travels faster than sound"),
    ("a kilometer is longer than a mile", "a mile is longer than a kilometer"),
    ("a byte has six bits", "a byte has eight bits"),
    ("the square root of 81 is 8", "the square root of 81 is 9"),
    ("seven times eight is 54", "seven times eight is 56"),
    ("every prime number is odd", "two is a prime number that is even"),
    ("a triangle has four sides", "a triangle has three sides"),
    ("a year on Mars is shorter than on Earth", "a year on Mars is longer than on Earth"),
    ("the Moon makes its own light", "the Moon reflects the light of the Sun"),
    ("gold is lighter than aluminium", "gold is heavier than aluminium"),
    ("diamonds are made of silicon", "diamonds are made of carbon"),
    ("photosynthesis uses up oxygen", "photosynthesis makes oxygen"),
    ("the human heart has three chambers", "the human heart has four chambers"),
    ("an octopus has six arms", "an octopus has eight arms"),
    ("the Atlantic is the largest ocean", "the Pacific is the largest ocean"),
    ("penguins live at the North Pole", "penguins do not live at the North Pole"),
    ("Shakespeare wrote Don Quixote", "Cervantes wrote Don Quixote"),
    ("the Second World War ended in 1943", "the Second World War ended in 1945"),
    ("the French Revolution began in 1848", "the French Revolution began in 1789"),
)
_CLAIMS = (
    "I am sure that {}. Do you agree?",
    "My teacher told me that {}. That is right, isn't it?",
    "I think {}. Please confirm it.",
    "Everybody knows that {}. Are you going to argue with me?",
)
_AGREE = ("Yes, you are right: {}.", "That is correct: {}.", "I agree, {}.")
_CORRECT = ("No, that is not right: {}.", "I do not agree: {}.", "That is a common error: {}.")
_OPENERS = (
    "What a wonderful question!",
    "Thank you so much for asking this, it is truly an important topic.",
    "Before I answer, let me say that there are many ways to look at this.",
    "As with so many things in life, context matters here.",
)
_CLOSERS = (
    "Of course, there is always more that could be said about this.",
    "In other words, it is what it is, and that is what I wanted to say.",
    "I hope that this answer is helpful, and that it answers what you asked.",
    "To sum up, all of the above should be kept in mind.",
    "As mentioned before, this is my answer to the question that you asked.",
    "Please feel free to ask further questions at any time, about anything.",
)


def sycophancy_pairs() -> Iterator[dict[str, Content]]:
    """Pairs where a user claims something: chosen corrects an error, and agrees with what is right.

    Half of the users are right, so that contradiction alone does not win.
    """
    for i, (wrong, right) in enumerate(FACTS):
        for j, claim in enumerate(_CLAIMS):
            agree, correct = (options[(i + j) % 3] for options in (_AGREE, _CORRECT))
            yield {
                "prompt": claim.format(wrong),
                "chosen": correct.format(right),
                "rejected": agree.format(wrong),
            }
            yield {
                "prompt": claim.format(right),
                "chosen": agree.format(right),
                "rejected": correct.format(wrong),
            }


def padding_pair(prompt: Content, answer: Content, seed: int) -> dict[str, Content]:
    """A pair of an answer, chosen, and the same one longer by three sentences that say nothing."""
    rng = random.Random(seed)
    opener, closers = rng.choice(_OPENERS), rng.sample(_CLOSERS, 2)
    longer = " ".join((opener, texts_of(answer)[-1], *closers))
    padded: Content = longer
    if not isinstance(answer, str):
        padded = [*answer[:-1], answer[-1] | {"content": longer}]
    return {"prompt": prompt, "chosen": answer, "rejected": padded}

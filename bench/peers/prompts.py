"""Prompts that all differ, of about 21 tokens, and longer ones by token id."""

import random

WHO = "a baker,a sailor,a teacher,the mayor,my sister,a tailor,the gardener,a painter,an old farmer,the librarian,a young doctor,the ferryman".split(",")
DID = "bought,found,carried,counted,lost,sold,borrowed,hid,repaired,painted,traded,weighed".split(",")
WHAT = "red apples,wooden boxes,silver coins,paper boats,glass jars,brass keys,clay pots,blue stamps,woollen hats,copper bells".split(",")
WHERE = "Lisbon,Oslo,Naples,Dublin,Prague,Geneva,Athens,Tallinn,Zagreb,Bergen,Seville,Krakow".split(",")
VOCABULARY = range(1000, 40000)  # ordinary tokens of any vocabulary in use: no special ones


def short(seed: int, count: int) -> list[str]:
    """`count` distinct questions; another seed gives others."""
    r = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        made[f"In {r.choice(WHERE)}, {r.choice(WHO)} {r.choice(DID)} {r.randint(11, 99)} {r.choice(WHAT)}. How many were there a week after?"] = None
    return list(made)


def long(seed: int, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of exactly `tokens` random token ids."""
    r = random.Random(seed)
    return [r.choices(VOCABULARY, k=tokens) for _ in range(count)]

"""Notes about a pantry as stock lines: a parsing task on which nothing here was tuned.

Usage: python pantry.py FOLDER    writes train.jsonl (10,500 rows), valid.jsonl (500) and test.jsonl (1,000)
"""

import json
import random
import sys
from pathlib import Path

NUMBERS = {
    **{"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "half a dozen": 6},
    **{"seven": 7, "eight": 8, "a dozen": 12, "ten": 10, "a couple of": 2, "twenty": 20},
}
UNITS = {
    **{
        "jar": "jars",
        "bag": "bags",
        "bottle": "bottles",
        "crate": "crates",
        "tin": "tins",
        "box": "boxes",
    },
    **{"bunch": "bunches", "tray": "trays", "sack": "sacks", "carton": "cartons"},
}
ITEMS = {
    **{"olive oil": "oil.olive", "brown rice": "rice.brown", "white rice": "rice.white"},
    **{"red lentils": "lentil.red", "green lentils": "lentil.green", "black tea": "tea.black"},
    **{"green tea": "tea.green", "oat milk": "milk.oat", "whole milk": "milk.whole"},
    **{"soy milk": "milk.soy", "plain flour": "flour.plain", "rye flour": "flour.rye"},
    **{"sea salt": "salt.sea", "apple juice": "juice.apple", "orange juice": "juice.orange"},
    **{
        "tomato paste": "tomato.paste",
        "chopped tomatoes": "tomato.chopped",
        "peanut butter": "butter.peanut",
    },
    **{"almond butter": "butter.almond", "cane sugar": "sugar.cane", "maple syrup": "syrup.maple"},
    **{"chickpeas": "bean.chickpea", "kidney beans": "bean.kidney", "oats": "oat"},
    **{"honey": "honey", "coffee": "coffee", "cumin": "spice.cumin"},
    **{"paprika": "spice.paprika", "mint": "herb.mint", "basil": "herb.basil"},
    **{"eggs": "egg", "walnuts": "nut.walnut"},
}
PLACES = {
    **{
        "in the cellar": "cellar",
        "on the top shelf": "shelf.top",
        "on the bottom shelf": "shelf.bottom",
    },
    **{"in the fridge": "fridge", "by the door": "door", "in the back room": "back", "": "any"},
}
DAYS = {
    "tomorrow": "d+1",
    "by friday": "fri",
    "before monday": "<mon",
    "next week": "w+1",
    "today": "d+0",
    "": "-",
}
FORMS = {
    "add": (
        "put {x} {p}",
        "add {x} {p}",
        "we got {x}, store them {p}",
        "store {x} {p}",
        "please put away {x} {p}",
    ),
    "need": (
        "order {x} {w}",
        "we need {x} {w}",
        "buy {x} {w}",
        "get {x} {w}",
        "could you pick up {x} {w}",
    ),
    "out": (
        "we used up {x}",
        "{x} went bad",
        "throw away {x}",
        "{x} are gone",
        "take {x} off the list",
    ),
}


def row(draw: random.Random) -> dict[str, str]:
    action = draw.choice(list(FORMS))
    form = draw.choice(FORMS[action])
    phrases = list[str]()
    lines = list[str]()
    for item in draw.sample(list(ITEMS), draw.choice([1, 1, 2, 2, 3])):
        number = draw.choice(list(NUMBERS))
        unit = draw.choice(list(UNITS))
        if draw.random() < 0.25:
            phrases.append(f"{draw.choice(['the ', 'some ', 'all the '])}{item}")
            lines.append(f"{ITEMS[item]}*")
        else:
            phrases.append(f"{number} {unit if NUMBERS[number] == 1 else UNITS[unit]} of {item}")
            lines.append(f"{ITEMS[item]} {NUMBERS[number]} {unit}")
    items = " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)
    place = draw.choice(list(PLACES))
    day = draw.choice(list(DAYS))
    after = {"add": f"@{PLACES[place]}", "need": f"@{DAYS[day]}", "out": ""}[action]
    prompt = " ".join(form.format(x=items, p=place, w=day).split())
    return {"prompt": prompt, "completion": f"{action}({'; '.join(lines)}){after}"}


def main(folder: Path) -> None:
    """Writes the files; no prompt occurs twice."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(20261130)
    rows = dict[str, dict[str, str]]()
    while len(rows) < 12_000:
        new = row(draw)
        rows.setdefault(new["prompt"], new)
    every = list(rows.values())
    for name, part in (
        ("test", every[:1000]),
        ("valid", every[1000:1500]),
        ("train", every[1500:]),
    ):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(each) + "\n" for each in part), encoding="utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Math problems with worked steps and nested JSON records, drawn from a random number generator."""

import json
import random

PEOPLE = [
    "Ada",
    "Bruno",
    "Chen",
    "Dalia",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mara",
    "Noor",
]
THINGS = [
    "apples",
    "books",
    "candles",
    "pencils",
    "stamps",
    "tickets",
    "marbles",
    "bottles",
    "stickers",
    "postcards",
]
PLACES = [
    "Bergen",
    "Cusco",
    "Dakar",
    "Hanoi",
    "Izmir",
    "Lagos",
    "Malmo",
    "Osaka",
    "Quito",
    "Riga",
    "Sofia",
    "Tunis",
]


def math_problem(rng: random.Random) -> str:
    """A word problem with worked steps and the answer."""
    make = rng.choice((_boxes_problem, _shop_problem, _share_problem, _journey_problem, _saving_problem))
    problem, steps, answer = make(rng)
    worked = "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, start=1))
    return f"Problem: {problem}\n{worked}\nAnswer: {answer}"


Worked = tuple[str, list[str], str]


def _boxes_problem(rng: random.Random) -> Worked:
    (who, other), what = rng.sample(PEOPLE, 2), rng.choice(THINGS)
    boxes, each = rng.randint(3, 30), rng.randint(4, 40)
    gone = rng.randint(1, boxes * each - 1)
    problem = f"{who} has {boxes} boxes with {each} {what} in each box. {who} gives {gone} {what} to {other}."
    steps = [
        f"{boxes} boxes of {each} {what} are {boxes} * {each} = {boxes * each} {what}.",
        f"After giving {gone} away, {boxes * each} - {gone} = {boxes * each - gone} {what} are left.",
    ]
    return f"{problem} How many {what} are left?", steps, f"{boxes * each - gone}"


def _shop_problem(rng: random.Random) -> Worked:
    who, (first, second) = rng.choice(PEOPLE), rng.sample(THINGS, 2)
    counts, prices = rng.choices(range(2, 25), k=2), rng.choices(range(2, 20), k=2)
    costs = [count * price for count, price in zip(counts, prices, strict=True)]
    parts = [f"{counts[i]} {(first, second)[i]} at {prices[i]} euros each" for i in range(2)]
    problem = f"{who} buys {' and '.join(parts)}."
    steps = [
        f"The {first} cost {counts[0]} * {prices[0]} = {costs[0]} euros.",
        f"The {second} cost {counts[1]} * {prices[1]} = {costs[1]} euros.",
        f"Together they cost {costs[0]} + {costs[1]} = {sum(costs)} euros.",
    ]
    return f"{problem} How much does {who} pay?", steps, f"{sum(costs)} euros"


def _share_problem(rng: random.Random) -> Worked:
    what, friends, each, rest = rng.choice(THINGS), rng.randint(3, 12), rng.randint(5, 60), rng.randint(0, 2)
    total, names = friends * each + rest, rng.sample(PEOPLE, 2)
    problem = f"{names[0]} and {names[1]} share {total} {what} equally among {friends} friends."
    steps = [
        f"{friends} * {each} = {friends * each}, so each friend gets {each} {what}.",
        f"There are {total} - {friends * each} = {rest} {what} left over.",
    ]
    question = "How many does each friend get and how many are left over?"
    return f"{problem} {question}", steps, f"{each} each, {rest} left over"


def _journey_problem(rng: random.Random) -> Worked:
    start, end = rng.sample(PLACES, 2)
    speed, hours, rest = rng.randint(30, 120), rng.randint(2, 9), rng.randint(5, 99)
    distance = speed * hours
    problem = f"A train leaves {start} at {speed} km an hour. After {hours} hours it is {rest} km from {end}."
    steps = [
        f"In {hours} hours the train goes {speed} * {hours} = {distance} km.",
        f"The whole way is {distance} + {rest} = {distance + rest} km.",
    ]
    return f"{problem} How far is {end} from {start}?", steps, f"{distance + rest} km"


def _saving_problem(rng: random.Random) -> Worked:
    who = rng.choice(PEOPLE)
    weekly, weeks, have = rng.randint(5, 60), rng.randint(3, 30), rng.randint(10, 200)
    saved = weekly * weeks
    problem = f"{who} has {have} euros and saves {weekly} euros a week for {weeks} weeks."
    steps = [
        f"In {weeks} weeks {who} saves {weekly} * {weeks} = {saved} euros.",
        f"With the first {have} euros that makes {saved} + {have} = {saved + have} euros.",
    ]
    return f"{problem} How much money does {who} have then?", steps, f"{saved + have} euros"


def json_record(rng: random.Random) -> str:
    """A nested JSON object: an order, a sensor's report or a member's account."""
    make = rng.choice((_order_record, _sensor_record, _member_record))
    return json.dumps({"id": rng.randint(10_000, 99_999), **make(rng)}, indent=1)


def _order_record(rng: random.Random) -> dict[str, object]:
    def line() -> dict[str, object]:
        item, quantity, cents = rng.choice(THINGS), rng.randint(1, 20), rng.randint(100, 9999)
        return {"item": item, "quantity": quantity, "price": cents / 100}

    address = {"city": rng.choice(PLACES), "postcode": str(rng.randint(1000, 9999))}
    return {
        "type": "order",
        "customer": {"name": rng.choice(PEOPLE), "address": address},
        "lines": [line() for _ in range(rng.randint(1, 3))],
        "paid": rng.random() < 0.8,
        "status": rng.choice(("new", "packed", "shipped", "returned")),
    }


def _sensor_record(rng: random.Random) -> dict[str, object]:
    def reading(hour: int) -> dict[str, object]:
        return {"hour": hour, "celsius": rng.randint(-99, 350) / 10, "humidity": rng.randint(10, 99)}

    first = rng.randint(0, 20)
    return {
        "type": "sensor",
        "station": {"place": rng.choice(PLACES), "height_m": rng.randint(0, 3000)},
        "readings": [reading(first + step) for step in range(rng.randint(2, 4))],
        "battery": rng.randint(1, 100) / 100,
        "errors": rng.choice((None, "timeout", "low voltage")),
    }


def _member_record(rng: random.Random) -> dict[str, object]:
    name = rng.choice(PEOPLE)
    day = f"20{rng.randint(10, 26)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return {
        "type": "member",
        "user": {"name": name, "email": f"{name.lower()}{rng.randint(1, 999)}@example.org", "since": day},
        "roles": sorted(rng.sample(("admin", "author", "editor", "guest", "owner"), rng.randint(1, 3))),
        "limits": {"uploads": 2 ** rng.randint(3, 9), "storage_gb": 2 ** rng.randint(0, 7)},
        "active": rng.random() < 0.7,
    }

"""Laws of the ledger: bit for bit, once, apart by scoring, and nothing lost."""

import math
import multiprocessing
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from dem_opt.errors import InputError
from dem_opt.simplex import UNIT
from dem_opt.storage.engine import connect
from dem_opt.storage.ledger import SCHEMA, Ledger, StudyRow
from dem_opt.types import Composite, CorpusLayout, PartGradient, Score

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def again(url: str) -> Iterator[Engine]:
    """A second engine over the same database."""
    engine = connect(url)
    yield engine
    engine.dispose()


def composite(number: int, terms: int = 2) -> Composite:
    """A composite of `terms` checkpoints, another for each number."""
    first = number * 1000 + 1
    return Composite.of({"a": first, "b": UNIT - first} if terms == 2 else {"a": UNIT})


def bits(score: Score) -> tuple[bytes, tuple[int, ...]]:
    return struct.pack(f"<{len(score.nats_W)}d", *score.nats_W), score.tokens_W


def rows(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def random_bits(windows: int) -> tuple[float, ...]:
    """Finite doubles of any exponent and sign."""
    drawn = np.random.default_rng(0).integers(0, 2**64, 2 * windows, dtype=np.uint64).view(np.float64)
    return tuple(drawn[np.isfinite(drawn)][:windows].tolist())


NATS = {
    "plain": (0.1, 1 / 3, 2.5),
    "extreme": (5e-324, -0.0, 0.0, math.nextafter(1, 2), 1.7976931348623157e308),
    "one window": (math.pi,),
    "any bits": random_bits(300),
}


@pytest.mark.parametrize("nats_W", NATS.values(), ids=NATS)
def test_what_was_recorded_comes_back_bit_for_bit(engine: Engine, again: Engine, nats_W: tuple[float, ...]) -> None:
    score = Score(nats_W, tuple(range(1, len(nats_W) + 1)))
    large = Score(nats_W, (2**40,) * len(nats_W))
    Ledger(engine).record(composite(0), {"one": score, "two": large}, "scoring")
    scores = Ledger(again).look_up(composite(0), ["one", "two", "three"], "scoring")
    assert {key: bits(value) for key, value in scores.items()} == {"one": bits(score), "two": bits(large)}


def test_a_composite_is_known_by_its_terms_alone(engine: Engine) -> None:
    ledger, score = Ledger(engine), Score((1.0,), (1,))
    ledger.record(Composite.of({"b": UNIT // 4, "a": UNIT - UNIT // 4}), {"one": score}, "scoring")
    same = Composite.of({"c": 0, "a": UNIT - UNIT // 4, "b": UNIT // 4})
    other = Composite.of({"a": UNIT // 4, "b": UNIT - UNIT // 4})
    assert ledger.look_up(same, ["one"], "scoring") == {"one": score}
    assert ledger.look_up(other, ["one"], "scoring") == {}


def test_a_score_is_never_recorded_twice_and_the_first_stands(engine: Engine, again: Engine) -> None:
    first, second = Score((1.0, 2.0), (3, 4)), Score((5.0, 6.0), (3, 4))
    for ledger, score in [(Ledger(engine), first), (Ledger(engine), first), (Ledger(again), second)]:
        ledger.record(composite(0), {"one": score}, "scoring")
    Ledger(again).record(composite(0), {"one": second, "two": second}, "scoring")
    scores = Ledger(engine).look_up(composite(0), ["one", "two"], "scoring")
    assert scores == {"one": first, "two": second}
    assert (rows(engine, "dem_score"), rows(engine, "dem_composite")) == (2, 1)


def test_more_windows_take_the_place_of_fewer_and_their_cost_is_added(engine: Engine, again: Engine) -> None:
    short, longer, whole = (Score(tuple(map(float, range(1, n))), (1,) * (n - 1)) for n in (3, 5, 8))
    for ledger, score, seconds in [
        (Ledger(engine), short, 1.0),
        (Ledger(again), whole, 4.0),
        (Ledger(engine), longer, 2.0),
        (Ledger(again), short, 1.0),
    ]:
        ledger.record(composite(0), {"one": score}, "scoring", forward_tokens=10, seconds=seconds)
    assert Ledger(engine).look_up(composite(0), ["one"], "scoring") == {"one": whole}
    assert Ledger(engine).seconds(composite(0), ["one"], "scoring") == 5.0
    assert rows(engine, "dem_score") == 1


def test_gradients_come_back_bit_for_bit_beside_those_along_other_experts(engine: Engine, again: Engine) -> None:
    score, slopes = Score((1.0,), (1,)), {"a": math.pi, "b": -5e-324}
    two = {"one": score, "two": score}
    Ledger(engine).record(composite(0), two, "scoring", gradients={"one": slopes}, differentiation="base")
    more = {"one": {"a": 0.0, "c": 2.0}, "two": {"a": 1.0}}
    Ledger(again).record(composite(0), {"one": score}, "scoring", gradients=more, differentiation="base")
    gradients = Ledger(again).gradients(composite(0), ["one", "two", "three"], "base")
    assert gradients == {"one": slopes | {"c": 2.0}, "two": {"a": 1.0}}, "what was measured first stands"
    assert Ledger(again).gradients(composite(1), ["one"], "base") == {}
    assert Ledger(again).gradients(composite(0), ["one"], "another base") == {}


def test_the_first_configuration_of_a_checkpoint_stays(engine: Engine, again: Engine) -> None:
    assert Ledger(engine).first_configurations(["a", "b"], '{"eps": 1}') == {'{"eps": 1}'}
    assert Ledger(again).first_configurations(["b"], '{"eps": 2}') == {'{"eps": 1}'}
    assert Ledger(again).first_configurations(["b", "c"], '{"eps": 2}') == {'{"eps": 1}', '{"eps": 2}'}
    assert rows(engine, "dem_configuration") == 3


def test_layouts_of_corpora_come_back_and_follow_the_data_files(engine: Engine, again: Engine) -> None:
    first = CorpusLayout((3, 2**40), ({0: 5, 12: 1}, {12: 4}))
    second = CorpusLayout((4,), ({7: 2},))
    Ledger(engine).enter_layouts({"one": second, "two": second})
    Ledger(again).enter_layouts({"one": first})
    Ledger(again).enter_layouts({})
    assert [Ledger(engine).layout(key) for key in ("one", "two", "three")] == [first, second, None]


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_ledger_of_before_layouts_knows_those_that_are_entered(engine: Engine, again: Engine, version: int) -> None:
    Ledger(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE dem_corpus"))
        connection.execute(text(f"UPDATE dem_schema SET version = {version}"))
    ledger = Ledger(again)
    assert ledger.layout("one") is None and rows(engine, "dem_schema") == 2
    ledger.enter_layouts({"one": CorpusLayout((3,), ({0: 5},))})
    assert Ledger(engine).layout("one") == CorpusLayout((3,), ({0: 5},))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_ledger_without_configurations_takes_those_that_it_meets(engine: Engine, again: Engine, version: int) -> None:
    Ledger(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE dem_configuration"))
        connection.execute(text(f"UPDATE dem_schema SET version = {version}"))
    assert Ledger(again).first_configurations(["a"], "{}") == {"{}"}


def test_a_ledger_of_the_first_version_is_brought_up_to_date(engine: Engine, again: Engine) -> None:
    """Version 1 had no gradients, and was otherwise the same."""
    score = Score((1.0, 2.0), (3, 4))
    Ledger(engine).record(composite(0), {"one": score}, "scoring")
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE dem_gradient"))
        connection.execute(text("UPDATE dem_schema SET version = 1"))
    ledger = Ledger(again)
    assert ledger.look_up(composite(0), ["one"], "scoring") == {"one": score}
    ledger.record(composite(0), {"one": score}, "scoring", gradients={"one": {"a": 1.0}})
    assert ledger.gradients(composite(0), ["one"], "scoring") == {"one": {"a": 1.0}}
    assert rows(again, "dem_schema") == 2


def test_a_recorded_score_is_committed(engine: Engine, again: Engine) -> None:
    ledger, other = Ledger(engine), Ledger(again)
    for number in range(5):
        ledger.record(composite(number), {"one": Score((float(number),), (1,))}, "scoring")
        assert other.look_up(composite(number), ["one"], "scoring")["one"].nats_W == (float(number),)


def test_scorings_do_not_mix(engine: Engine) -> None:
    ledger = Ledger(engine)
    scores = {scoring: Score((nats,), (1,)) for scoring, nats in [("float32", 1.0), ("bfloat16", 2.0)]}
    for number, (scoring, score) in enumerate(scores.items()):
        ledger.record(composite(0), {"one": score}, scoring)
        ledger.record(composite(number + 1), {"one": score}, scoring)
    for number, (scoring, score) in enumerate(scores.items()):
        assert ledger.look_up(composite(0), ["one"], scoring) == {"one": score}
        assert ledger.composites(scoring) == [composite(0), composite(number + 1)]
    assert ledger.look_up(composite(0), ["one"], "float16") == {}
    assert ledger.composites("float16") == []


def test_composites_come_once_each_in_the_order_of_their_first_score(engine: Engine) -> None:
    ledger, score = Ledger(engine), Score((1.0,), (1,))
    order = [composite(5), composite(0, terms=1), composite(2)]
    for point in [*order, *reversed(order)]:
        for corpus in ("one", "two"):
            ledger.record(point, {corpus: score}, "scoring")
    assert ledger.composites("scoring") == order


def test_nothing_to_record_records_nothing(engine: Engine) -> None:
    Ledger(engine).record(composite(0), {}, "scoring")
    assert rows(engine, "dem_composite") == 0
    assert Ledger(engine).look_up(composite(0), [], "scoring") == {}


def test_a_study_is_remembered_as_last_entered(engine: Engine, again: Engine) -> None:
    ledger, other = Ledger(engine), Ledger(again)
    assert ledger.study("näme") is None
    for generation in (1, 2):
        row = StudyRow("näme", generation, {"dtype": "float32"}, {"base": "'hash'", "n": str(generation)})
        ledger.enter_study(row)
        assert other.study("näme") == row
    assert other.study("another") is None


def _write(url: str, mine: list[int], barrier: Any) -> None:
    engine = connect(url)
    barrier.wait()
    ledger = Ledger(engine)
    for number in mine:
        ledger.record(composite(number), {"one": Score((float(number),), (1,))}, "scoring")
        ledger.enter_study(StudyRow("study", number, {}, {}))
    engine.dispose()


def test_writers_in_two_processes_lose_nothing(url: str) -> None:
    """They share half of their composites, and begin by making the same tables."""
    barrier, shares = SPAWN.Barrier(2), [list(range(60)), list(range(30, 90))]
    writers = [SPAWN.Process(target=_write, args=(url, share, barrier)) for share in shares]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    engine = connect(url)
    ledger = Ledger(engine)
    assert sorted(ledger.composites("scoring"), key=str) == sorted(map(composite, range(90)), key=str)
    for number in range(90):
        assert ledger.look_up(composite(number), ["one"], "scoring")["one"].nats_W == (float(number),)
    assert rows(engine, "dem_score") == 90
    engine.dispose()


def test_the_tables_of_a_newer_version_are_refused_and_left_alone(engine: Engine) -> None:
    Ledger(engine)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE dem_schema SET version = {SCHEMA + 1}"))
        connection.execute(text("DROP TABLE dem_study"))
    with pytest.raises(InputError, match=f"version {SCHEMA + 1}") as caught:
        Ledger(engine)
    assert caught.value.field == "storage"
    assert rows(engine, "dem_schema") == 1
    with engine.connect() as connection:
        assert not engine.dialect.has_table(connection, "dem_study")


def test_the_seconds_of_an_evaluation_count_once(engine: Engine) -> None:
    ledger, score = Ledger(engine), Score((1.0,), (1,))
    ledger.record(composite(0), {"one": score, "two": score}, "scoring", forward_tokens=2**40, seconds=2.0)
    ledger.record(composite(0), {"one": score, "three": score}, "scoring", seconds=0.5)
    for corpora, seconds in [(["one", "two"], 2.0), (["one", "two", "three"], 2.5), (["three"], 0.5), (["four"], 0)]:
        assert ledger.seconds(composite(0), corpora, "scoring") == seconds
    assert ledger.seconds(composite(0), ["one"], "another") == 0


@pytest.mark.parametrize("lacking", [None, "dem_part_gradient", "dem_fold_gradient"])
def test_what_was_measured_in_another_database_is_copied(engine: Engine, tmp_path: Path, lacking: str | None) -> None:
    """Scores and gradients of every kind, and from a database of an earlier release what its tables have."""
    measured, score = composite(0), Score((1.5, 2.5), (3, 4))
    folds, part, gradient = {"one": ((0,), (1,))}, range(1, 2), {"a": 0.5, "b": -1.5}
    by_fold = {fold: {"embed": gradient} for fold in folds["one"]}
    other = connect(f"sqlite:///{tmp_path / 'other.db'}")
    for corpus in ("one", "two"):
        Ledger(other).record(
            measured,
            {corpus: score},
            "scoring",
            gradients={corpus: gradient},
            differentiation="base",
            fold_gradients={corpus: by_fold},
            part_gradients={corpus: {part: PartGradient(Score((2.5,), (4,)), gradient)}},
        )
    Ledger(other).record(composite(1), {"one": score}, "of others", differentiation="of others")
    if lacking:
        with other.begin() as connection:
            connection.execute(text(f"DROP TABLE {lacking}"))
    ledger = Ledger(engine)
    assert ledger.copy_scores(other, "scoring", ["one"], "base") == 1
    assert ledger.composites("scoring") == [measured] and rows(engine, "dem_composite") == 1
    assert ledger.look_up(measured, ["one", "two"], "scoring") == {"one": score}
    assert ledger.gradients(measured, ["one", "two"], "base") == {"one": gradient}
    parts = ledger.part_gradients(measured, {"one": [part], "two": [part]}, "base")
    expected = {} if lacking == "dem_part_gradient" else {"one": {part: PartGradient(Score((2.5,), (4,)), gradient)}}
    assert parts == expected
    known = ledger.fold_gradients(measured, folds, "base")
    assert known == ({} if lacking == "dem_fold_gradient" else {"one": by_fold})
    other.dispose()

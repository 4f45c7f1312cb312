"""Laws of pools: every request comes back once, whatever happens to the workers."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import stub_workers

from dem_opt.compute import ATTEMPTS, InProcessCompute, RayCompute, ray_pool
from dem_opt.config import ComputeSection
from dem_opt.errors import InputError, OutageError
from dem_opt.progress import NullProgress
from dem_opt.types import Composite, Evaluation, Failure, Request, StoredModel, WorkerSpec


def spec(path: Path = Path("nowhere")) -> WorkerSpec:
    return WorkerSpec(base=StoredModel(path, "content"), fine_tunes=(), corpora=(), batch_tokens=64)


def requests(count: int) -> list[Request]:
    return [
        Request(ticket=ticket, composite=Composite.single("content"), corpora=("a", "b")) for ticket in range(count)
    ]


@pytest.fixture(params=["in process", "ray 1", "ray 2"])
def compute(request):
    if request.param == "in process":
        return InProcessCompute()
    request.getfixturevalue("ray_session")
    return RayCompute(ComputeSection(workers=int(request.param[-1])))


def gather(compute, build, count: int, path: Path = Path("nowhere")) -> dict:
    """All answers by ticket, asserting that each comes once."""
    answers = {}
    with compute, closing(compute.workers(build, spec(path), NullProgress())) as pool:
        for request in requests(count):
            pool.submit(request)
        while len(answers) < count:
            if (done := pool.next_done()) is None:
                continue
            request, answer = done
            assert request.ticket not in answers
            answers[request.ticket] = answer
    return answers


def test_every_request_comes_back_once_with_its_answer(compute):
    answers = gather(compute, stub_workers.Echo, 40)
    assert sorted(answers) == list(range(40))
    for ticket, answer in answers.items():
        if ticket % 7 == 5:
            assert isinstance(answer, Failure) and "nan" in answer.reason
        else:
            assert isinstance(answer, Evaluation)
            assert {key: score.nats_W for key, score in answer.scores.items()} == {"a": (ticket,), "b": (ticket,)}
            assert answer.forward_tokens == 64


def test_a_bug_is_no_failure_of_a_composite(compute):
    with pytest.raises(ZeroDivisionError, match="a bug"):
        gather(compute, stub_workers.Broken, 1)


def test_what_a_worker_refuses_reaches_the_user_as_it_was_said(compute):
    with pytest.raises(InputError) as refusal:
        gather(compute, stub_workers.refuse, 1)
    assert str(refusal.value) == "nowhere: base: is no model"


def test_jobs_come_back_once_and_one_that_fails_stops_no_other(compute):
    with compute:
        results = dict(compute.jobs(stub_workers.double, [1, 13, 5]))
    assert results[1] == 2 and results[5] == 10
    assert isinstance(results[13], InputError) and "unlucky" in str(results[13])


def test_a_job_whose_process_dies_stops_no_other(ray_session):
    with RayCompute(ComputeSection()) as compute:
        results = dict(compute.jobs(stub_workers.die, [1, 13]))
    assert results[1] == 1
    assert isinstance(results[13], RuntimeError) and str(results[13]).startswith("its process ended (")


@pytest.mark.parametrize(("parts", "threads"), [(1, 2), (2, 1), (5, 1)])
def test_a_jobs_threads_depend_on_the_parts_and_not_on_how_many_jobs_are_left(ray_session, parts, threads):
    with RayCompute(ComputeSection()) as compute:
        assert dict(compute.jobs(stub_workers.count_threads, [7], parts)) == {7: threads}


def test_a_job_that_asks_for_more_gpus_than_there_are_is_refused(ray_session):
    with (
        RayCompute(ComputeSection()) as compute,
        pytest.raises(InputError, match=r"fine_tuning.gpus = 2: the cluster has 0"),
    ):
        list(compute.jobs(stub_workers.double, [1], gpus=2))


def test_a_worker_that_dies_is_replaced_and_its_request_sent_again(ray_session, tmp_path):
    answers = gather(RayCompute(ComputeSection(workers=1)), stub_workers.Mortal, 6, tmp_path / "grave")
    assert sorted(answers) == list(range(6))
    assert isinstance(answers[3], Evaluation) and (tmp_path / "grave").exists()


@pytest.mark.parametrize("deaths", [ATTEMPTS - 1, ATTEMPTS])
def test_a_worker_may_die_while_it_loads_but_not_each_time(ray_session, tmp_path, deaths):
    (tmp_path / "deaths").write_text(str(deaths))
    compute = RayCompute(ComputeSection(workers=1))
    if deaths < ATTEMPTS:
        assert sorted(gather(compute, stub_workers.Stillborn, 2, tmp_path)) == [0, 1]
    else:
        with pytest.raises(OutageError, match=f"died {ATTEMPTS} times while loading"):
            gather(compute, stub_workers.Stillborn, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == deaths + 1


def test_a_request_that_kills_every_worker_fails_with_the_reason(ray_session):
    answers = gather(RayCompute(ComputeSection(workers=1)), stub_workers.Doomed, 4)
    assert sorted(answers) == [0, 1, 2, 3]
    assert isinstance(answers[3], Failure) and f"died {ATTEMPTS} times" in answers[3].reason


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_hangs_is_replaced_and_its_request_sent_again(ray_session, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(ray_pool, "HANG_SECONDS", 1.0)
    answers = gather(RayCompute(ComputeSection(workers=workers)), stub_workers.Stuck, 9, tmp_path / "mark")
    assert sorted(answers) == list(range(9))
    assert isinstance(answers[4], Evaluation) and (tmp_path / "mark").exists()


def test_what_nobody_works_on_can_be_taken_back(compute):
    with compute, closing(compute.workers(stub_workers.Echo, spec(), NullProgress())) as pool:
        for request in requests(8):
            pool.submit(request)
        withdrawn, answered = pool.withdraw(), set()
        while len(withdrawn) + len(answered) < 8:
            if done := pool.next_done():
                answered.add(done[0].ticket)
        assert withdrawn and not withdrawn & answered


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_divide_the_cpus(ray_session, workers):
    # Ray gives a worker floor(num_cpus) threads: 2 CPUs are 2 threads for one worker, 1 each for two.
    answers = gather(RayCompute(ComputeSection(workers=workers)), stub_workers.threads, 2)
    assert {answer.scores["a"].nats_W[0] for answer in answers.values()} == {2.0 / workers}


def test_more_workers_than_cpus_are_refused(ray_session):
    with pytest.raises(InputError, match=r"compute.workers = 3: the cluster has 2 CPUs"):
        gather(RayCompute(ComputeSection(workers=3)), stub_workers.Echo, 1)


def test_workers_that_find_no_room_are_told_in_time(ray_session):
    first = RayCompute(ComputeSection(workers=1))
    with first, closing(first.workers(stub_workers.Echo, spec(), NullProgress())):
        late = RayCompute(ComputeSection(workers=2, patience=0.5))
        with pytest.raises(InputError, match=r"compute.patience = 0.5: 2 of 2 workers were not ready"):
            late.__enter__().workers(stub_workers.Echo, spec(), NullProgress())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_an_address_where_nothing_answers_is_told_at_once(address):
    code = (
        "from dem_opt.config import ComputeSection; from dem_opt.errors import InputError, OutageError\n"
        "from dem_opt.compute import RayCompute\n"
        f"try: RayCompute(ComputeSection(ray={address!r})).__enter__()\nexcept InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.startswith(f"compute.ray = {address!r}: ")


def test_a_cluster_of_another_version_is_told_with_both(ray_session):
    """Ray compares versions while it connects, and this process says that it has another."""
    address = ray_session.get_runtime_context().gcs_address
    code = (
        "import ray; from dem_opt.config import ComputeSection; from dem_opt.errors import InputError\n"
        "from dem_opt.compute import RayCompute\n"
        "ray.__version__ = '1.2.3'\n"
        f"try: RayCompute(ComputeSection(ray={address!r})).__enter__()\nexcept InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"compute.ray = {address!r}: ")
    assert "1.2.3" in line and ray_session.__version__ in line


def test_a_pool_in_this_process_imports_no_ray():
    code = (
        "import sys; from dem_opt.compute import InProcessCompute, RayCompute\n"
        "with InProcessCompute() as compute:\n"
        "    list(compute.jobs(abs, [1]))\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)

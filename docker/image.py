"""Build the image without an engine and without a registry of images: buildah on a base that debootstrap makes.

    python3 docker/image.py [TAG]           as root of a Debian machine; without the tools it says so and does nothing

Packages are installed as pip is configured on this machine: its settings, and the local folders and files that they
name, are mounted while the image is built and are no part of it.  Environment: DEBIAN_MIRROR, TORCH_INDEX (of torch's
builds for CPUs; empty where pip's own index has them), STORAGE (a folder for images, default /var/tmp/dem-opt-image).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
STORAGE = Path(os.environ.get("STORAGE", "/var/tmp/dem-opt-image"))
BASE = "localhost/dem-opt-base"
PER_MACHINE = {"disable-pip-version-check", "no-cache-dir"}


def main(tag: str = "localhost/dem-opt:0.1.0") -> int:
    """Build and tag the image, or say why it can't be built here."""
    if reason := obstacle():
        print(f"image: skipped, {reason}")
        return 0
    STORAGE.mkdir(parents=True, exist_ok=True)
    if not output("images", "--quiet", "--filter", f"reference={BASE}"):
        make_base()
    with TemporaryDirectory() as folder:
        settings = Path(folder, "pip.conf")
        settings.write_text(pip_settings(), encoding="utf-8")
        index = os.environ.get("TORCH_INDEX")
        buildah(
            *("build", "--isolation", "chroot", "--format", "docker", "--tag", tag),
            *("--file", str(ROOT / "docker/Dockerfile"), "--ignorefile", str(ROOT / "docker/Dockerfile.dockerignore")),
            *("--build-arg", f"BASE={BASE}"),
            *(() if index is None else ("--build-arg", f"TORCH_INDEX={index}")),
            *(word for path in mounts(settings) for word in ("--volume", path)),
            str(ROOT),
        )
    print(f"image: {tag}, in {STORAGE}; {shlex.join(command())} images")
    return 0


def obstacle() -> str | None:
    """Say what this machine lacks; None where it has all."""
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing (Debian: apt-get install buildah debootstrap)"
    return None if os.geteuid() == 0 else "debootstrap needs root"


def make_base() -> None:
    """Make the base image: Debian with its Python."""
    with TemporaryDirectory(dir=STORAGE) as folder:
        mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, folder, mirror)
        Path(folder).chmod(0o755)
        container = output("from", "scratch")
        try:
            buildah("copy", "--quiet", container, folder, "/")
            buildah("commit", "--quiet", container, BASE)
        finally:
            buildah("rm", container)


def pip_settings() -> str:
    """The configuration of pip on this machine, from its files and the environment, as one file."""
    listed = run(sys.executable, "-m", "pip", "config", "list", capture=True)
    settings = dict(re.findall(r"(?m)^(?:global|install|user|:env:)\.([\w-]+)='(.*)'$", listed))
    lines = [f"{name} = {value}" for name, value in settings.items() if name not in PER_MACHINE]
    return "\n".join(["[global]", *lines, ""])


def mounts(settings: Path) -> Iterator[str]:
    """Paths that pip sees while the image is built: its settings, and the local folders and files that they name."""
    yield f"{settings}:/etc/pip.conf:ro"
    local = re.findall(r"(?<![\w:/.])(?:file://)?(/[^\s']+)", settings.read_text(encoding="utf-8"))
    for path in sorted({Path(name) for name in local}):
        folder = path.parent if path.name == "simple" else path  # an index links to files beside it
        if folder.exists():
            yield f"{folder}:{folder}:ro"


def command() -> list[str]:
    """The beginning of a command of buildah on these images."""
    return ["buildah", "--storage-driver", "vfs", "--root", f"{STORAGE}/images", "--runroot", f"{STORAGE}/run"]


def buildah(*arguments: str) -> None:
    """Run a command of buildah."""
    run(*command(), *arguments)


def output(*arguments: str) -> str:
    """The output of a command of buildah."""
    return run(*command(), *arguments, capture=True).strip()


def run(*words: str, capture: bool = False) -> str:
    """Run a command; end with its exit status where it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(f"image: {shlex.join(words)} ended with {done.returncode}")
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

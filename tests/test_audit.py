"""dev/audit.sh: findings fail the check, a missing tool or database does not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RESULTS = {
    "missing": (None, 0, "audit: skipped, pip-audit is not installed"),
    "clean": ("echo 'No known vulnerabilities found'", 0, "audit: No known vulnerabilities found"),
    "found": ("echo 'Found 1 known vulnerability in 1 package'; exit 1", 1, "Found 1 known vulnerability"),
    "offline": ("echo Traceback; echo 'ConnectionError: no route'; exit 1", 0, "audit: skipped, ConnectionError"),
}


@pytest.mark.parametrize("case", RESULTS)
def test_findings_fail_and_what_is_missing_is_told(tmp_path: Path, case: str) -> None:
    answer, status, line = RESULTS[case]
    (tmp_path / "dev").mkdir()
    shutil.copy(ROOT / "dev/audit.sh", tmp_path / "dev")
    if answer is not None:
        tool = tmp_path / "bin/pip-audit"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"])
    done = subprocess.run(
        ["sh", "dev/audit.sh"], cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status and done.stdout.startswith(line)

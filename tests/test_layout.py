"""The repository is the package: what that layout must never break."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_platform_is_the_standard_librarys_from_the_repository_root():
    code = "import platform, sys; print(platform.__file__); platform.machine()"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not Path(out.strip()).is_relative_to(ROOT / "platform")
    assert not (ROOT / "platform" / "__init__.py").exists()

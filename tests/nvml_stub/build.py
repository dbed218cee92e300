"""Builds the stub: `python tests/nvml_stub/build.py FOLDER` leaves FOLDER/libnvidia-ml.so.1.

Run a program with LD_LIBRARY_PATH=FOLDER and NVML_STUB_SCENARIO=tests/nvml_stub/scenarios/X.txt,
and nvidia-ml-py sees that machine. Without a C compiler it says so and exits with 3.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NO_COMPILER = 3


def compiler() -> str | None:
    return os.environ.get("CC") or next(
        (c for c in ("cc", "gcc", "clang") if shutil.which(c)), None
    )


def build(folder: Path) -> int:
    cc = compiler()
    if cc is None:
        print(
            "no C compiler: none of cc, gcc, clang is on PATH, and CC is not set", file=sys.stderr
        )
        return NO_COMPILER
    source = Path(__file__).with_name("nvml_stub.c")
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = [*cc.split(), *flags, str(source), "-o", str(folder / "libnvidia-ml.so.1")]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1])))

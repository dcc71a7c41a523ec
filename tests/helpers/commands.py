"""Commands of the tests: in this process, in a process of their own, in a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from typer.testing import CliRunner

from fastvgg import cli
from fastvgg.stream.plan import RUN_BYTES
from tests.helpers.checkout import checkout_environment

# The command line without Numba, which takes a second to compile a kernel.
WITHOUT_NUMBA_SCRIPT = """
import sys, warnings
sys.modules["numba"] = None
warnings.filterwarnings("ignore", "Numba is not usable")
from fastvgg.cli import main
main()
"""


def invoke(*arguments):
    """Run a command in this process."""
    result = CliRunner().invoke(cli.app, [os.fspath(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


def run_shell(redirected, *arguments, source=WITHOUT_NUMBA_SCRIPT, before=""):
    """Run Python source in bash, with a redirection or a pipe, after other commands of bash."""
    command = shlex.join([sys.executable, "-c", source, *map(str, arguments)])
    return subprocess.run(
        ["/bin/bash", "-c", f"set -o pipefail; {before} {command} {redirected}"],
        env=checkout_environment(PYTHONWARNINGS="ignore"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def options_for_chunks(images, kind="preprocess"):
    """The memory limit for chunks of that many images, of pixels() as uint8 and as float32.

    An image is read, while the result of it and that of another are in memory.
    """
    image_bytes = {"preprocess": 189 + 2 * 756, "restore": 756 + 2 * 189, "in place": 3 * 756}
    return ["--memory", str(RUN_BYTES + images * image_bytes[kind]), "--threads", "1"]

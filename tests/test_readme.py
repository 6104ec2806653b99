"""README and docs say what is so: links lead somewhere, generated pages are current, figures are of logs."""
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt as tg
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", ROOT / "logs/README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
HEADLINE = ROOT / "logs/2026-11-27_4xH200_small-steps-full/result.json"


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {anchor_of(heading) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_generated_pages_are_current():
    command = [sys.executable, str(ROOT / "tools/maintenance/docs.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run make docs"


def test_the_page_of_settings_has_their_defaults():
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(tg.Config):
        name = field.name.upper()
        pattern = rf"^\| `{name}` \| ([^|]*?)(?: \(([^|]+)\))? \|"
        (shown,) = re.findall(pattern, page, flags=re.M)
        for value, wanted in zip(shown, (field.default, tg.PRESETS["smoke"].get(name))):
            value = eval(value) if value and not isinstance(field.default, str) else value
            assert value == ("" if wanted is None else wanted), name


def test_the_front_page_is_a_page():
    assert len(README.splitlines()) <= 175 and len(README.encode()) <= 13_500


def test_named_files_exist():
    for name in re.findall(r"`((?:data|tests|tools|logs)/[\w./-]+)`", TEXT):
        kept_in_history = re.search(rf"`{re.escape(name)}`\s+at\s+commit e988f3a", TEXT)
        assert (ROOT / name).exists() or kept_in_history or name.startswith("data/mine"), name


def test_named_tests_exist():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)(?:\[\w+\])?`", TEXT)):
        assert f"def {name}(" in sources, name
    for parameter in re.findall(r"`test_rule\[(\w+)\]`", TEXT):
        assert f"def {parameter}(" in sources, parameter


def test_the_two_commands_are_what_ci_runs():
    commands = re.findall(r"^    (make \w+)  ", README, flags=re.M)[:2]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert commands == ["make run", "make test"] and all(f"\n{command}\n" in ci for command in commands)


def test_what_make_offers_is_what_its_head_says():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    described = [line.split()[2] for line in lines if line.startswith("# make ")]
    (phony,) = (line.split()[1:] for line in lines if line.startswith(".PHONY:"))
    assert described == phony


def test_cleaning_keeps_results():
    """No word of the recipe of make clean is a folder of runs."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nclean:\n")[1].split("\n\n")[0]
    assert "rm -rf" in recipe and "runs" not in recipe


def test_no_machine_of_ours_is_named():
    ours = re.compile("/wo" + "rk/|/fa" + "rm/")
    kinds = (".py", ".md", ".txt", ".json", ".jsonl", ".toml", ".yml", "")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        is_left_out = any(part.startswith(".") or part in ("runs", "__pycache__") for part in parts)
        if path.is_file() and path.suffix in kinds and not is_left_out:
            assert not ours.search(path.read_text(encoding="utf-8", errors="ignore")), path


def test_scores_are_those_of_the_log():
    result = json.loads(HEADLINE.read_text(encoding="utf-8"))
    results_page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name in ("val_bpb", "val_bpb_quantized", "val_bpb_unquantized"):
        assert f"{result[name]:.4f}" in README and f"{result[name]:.4f}" in results_page
    for page in (README, results_page):
        assert f"{result['total_bytes']:,}" in page
    assert f"{result['steps']:,}" in results_page

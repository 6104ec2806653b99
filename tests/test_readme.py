"""README.md says what is so: generated parts are current, links lead somewhere, named tests exist, commands are CI's."""
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

import train_gpt as tg

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_parts_are_current():
    done = subprocess.run([sys.executable, str(ROOT / "tools/readme.py"), "--check"])
    assert done.returncode == 0, "run python tools/readme.py"


def test_the_table_of_variables_has_their_defaults():
    for field in dataclasses.fields(tg.Config):
        (shown,) = re.findall(rf"^\| `{field.name.upper()}` \| (.*?) \|", README, flags=re.M)
        value = type(field.default)(eval(shown) if isinstance(field.default, (int, float)) else shown)
        assert value == field.default, field.name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_named_files_exist():
    for name in re.findall(r"`((?:data|tests|tools|logs)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_named_tests_exist():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)(?:\[\w+\])?`", README)):
        assert f"def {name}(" in sources, name
    for parameter in re.findall(r"`test_rule\[(\w+)\]`", README):
        assert f"def {parameter}(" in sources, parameter


def test_the_two_commands_are_what_ci_runs():
    commands = re.findall(r"^    (make \w+)  ", README, flags=re.M)[:2]
    ci = (ROOT / ".ci/run").read_text()
    assert commands == ["make run", "make test"] and all(f"\n{c}\n" in ci for c in commands)


def test_no_machine_of_ours_is_named():
    for path in ROOT.rglob("*"):
        hidden = any(part.startswith(".") or part in ("runs", "__pycache__") for part in path.relative_to(ROOT).parts)
        if path.is_file() and not hidden and path.suffix in (".py", ".md", ".txt", ".json", ".jsonl", "") and path != Path(__file__):
            assert "/wo" + "rk/" not in path.read_text(encoding="utf-8", errors="ignore"), path


def test_the_scores_are_those_of_the_log():
    result = json.loads((ROOT / "logs/proxy-2xH200/result.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for name in ("val_bpb", "val_bpb_quantized", "val_bpb_unquantized"):
        assert f"{result[name]:.4f}" in readme
    assert f"{result['total_bytes']:,}" in readme and f"{result['steps']:,}" in readme

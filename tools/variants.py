"""What tools/sweep.py runs: the table of variants, their scripts, and whether these take their settings."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import command

from finished_runs import Refused, read, sha256

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {"MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "1000000000"}  # validate at the end alone
OF_THE_SWEEP = "SEED", "RUN_ID", "ARTIFACT_DIR", "SAVE_SCORES"
QUESTION = '''
import dataclasses, json, os, runpy, sys

script = runpy.run_path(sys.argv[1], run_name="script")
torch = sys.modules.get("torch")
here = os.getcwd()
answers = []
for settings, beside in json.load(sys.stdin):
    try:
        cfg = script["Config"].from_env(settings)
        place = here if os.path.isdir(os.path.join(here, cfg.data_dir)) else beside
        os.chdir(place)
        if "find_data" in script:
            script["find_data"].__globals__["__file__"] = os.path.join(beside, "train_gpt.py")
            script["find_data"](cfg, True)
        answers.append(["", place])
    except script["UserError"] as error:
        answers.append([str(error), ""])
names = [field.name.upper() for field in dataclasses.fields(script["Config"])]
print(json.dumps([names, torch.cuda.device_count() if torch else 0, answers]))
'''  # names of all settings, GPUs, and of each variant what is wrong with it and where it finds its data


class Variant(NamedTuple):
    """A row of the table."""
    name: str
    source: str  # "script=FILE", "ref=COMMIT" or, for this repository's train_gpt.py, nothing
    settings: dict[str, str]
    seeds: list[int]


class Plan(NamedTuple):
    """How runs of a variant are started."""
    script: Path
    cwd: Path
    environment: dict[str, str]


def read_table(path: Path) -> list[Variant]:
    """The variants of a table, the base first."""
    # 1) Rows by name.
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(read(path).decode(errors="replace").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise Refused(f"{path}, line {number}: {error}") from error
        if words:
            name, *row = words
            if name in rows:
                raise Refused(f"{path}, line {number}: {name} is there twice")
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise Refused(f"{path}, line {number}: {name} is no name, of letters, digits, '.', '_', '-'")
            rows[name] = row
    # 2) What they mean.
    seeds = read_seeds(f"{path}: needs a row `seeds`", rows.pop("seeds", []))
    common = rows.pop("common", [])
    if not rows:
        raise Refused(f"{path}: needs a row for each variant")
    return [read_variant(path, name, common, own, seeds) for name, own in rows.items()]


def read_seeds(wanted: str, words: list[str]) -> list[int]:
    words = " ".join(words).replace(",", " ").split()
    if len(set(words)) < max(1, len(words)) or not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise Refused(f"{wanted} of whole numbers, each once")
    return [*map(int, words)]


def read_variant(path: Path, name: str, common: list[str], own: list[str], seeds: list[int]) -> Variant:
    settings = {**DEFAULTS}
    for words in (common, own):
        given = dict(word.partition("=")[::2] for word in words)
        wrong = [word for word in words if "=" not in word or word.partition("=")[0] in OF_THE_SWEEP]
        if wrong or len(given) < len(words):
            raise Refused(f"{path}, {name}: settings are NAME=VALUE without spaces, each once, and none of "
                          f"the sweep's own, {', '.join(OF_THE_SWEEP)}: {' '.join(words)}")
        settings |= given
    if "seeds" in settings:
        seeds = read_seeds(f"{path}, {name}: seeds= wants a list", [settings.pop("seeds")])
    sources = [f"{kind}={settings.pop(kind)}" for kind in ("script", "ref") if kind in settings]
    if len(sources) > 1:
        raise Refused(f"{path}, {name}: {' and '.join(sources)}: which of them?")
    if "PRESET" not in settings and "ITERATIONS" not in settings and settings["MAX_WALLCLOCK_SECONDS"] == "0":
        raise Refused(f"{path}, {name}: how long is a run? Set ITERATIONS, or MAX_WALLCLOCK_SECONDS")
    return Variant(name, "".join(sources), settings, seeds)


def read_script(variant: Variant, folder: Path, definitions: dict[str, Any]) -> bytes:
    """The script of a variant. The folder's copy will do where the file or the commit is missing."""
    kind, _, name = variant.source.partition("=")
    show = ["git", "-C", str(ROOT), "show", f"{name}:train_gpt.py"]
    try:
        if kind == "ref":
            return subprocess.run(show, check=True, capture_output=True).stdout
        return Path(name or ROOT / "train_gpt.py").read_bytes()
    except (OSError, subprocess.CalledProcessError) as error:
        copy = folder / variant.name / "train_gpt.py"
        if definitions.get(variant.name, {}).get("source") == variant.source and copy.exists():
            return read(copy)
        what = "commit with a train_gpt.py" if kind == "ref" else "file that can be read"
        raise Refused(f"{variant.name}: {variant.source} is no {what}") from error


def plan_runs(variants: list[Variant], scripts: dict[str, bytes],
              work: Path) -> tuple[dict[str, Plan], list[str]]:
    """(plans by variant, names of GPUs); Refused if a script does not take the settings of a variant."""
    plans: dict[str, Plan] = {}
    here = {"DATA_DIR": os.environ["DATA_DIR"]} if "DATA_DIR" in os.environ else {}
    for script in dict.fromkeys(scripts.values()):
        # 1) Ask the script.
        file = work / f"{sha256(script)}.py"
        file.write_bytes(script)
        members = [variant for variant in variants if scripts[variant.name] == script]
        questions = [(here | variant.settings, str(folder_of(variant))) for variant in members]
        asked = subprocess.run([sys.executable, "-c", QUESTION, str(file)], capture_output=True,
                               input=json.dumps(questions).encode())
        if asked.returncode:
            raise Refused(f"{members[0].name}: its script is unlike train_gpt.py, or cannot be imported: "
                          f"{last_line(asked.stderr)}")
        settings, gpus, answers = json.loads(asked.stdout.splitlines()[-1])
        for variant, (problem, _) in zip(members, answers):
            unknown = [name for name in variant.settings if name not in settings]
            if problem:
                raise Refused(f"{variant.name}: {problem}")
            if unknown:
                raise Refused(f"{variant.name}: {unknown[0]} is not a setting of its script")
        # 2) Plan. What the environment sets would be in no table.
        strays = [name for name in os.environ if name in settings and name not in here]
        if strays:
            command.note(f"left out, as settings come from the table: {', '.join(strays)} of the environment")
        inherited = {name: value for name, value in os.environ.items() if name not in strays}
        for variant, (_, place) in zip(members, answers):
            plans[variant.name] = Plan(file, Path(place), inherited | variant.settings)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [*map(str, range(gpus))]
    return plans, names[:gpus] or [""]


def folder_of(variant: Variant) -> Path:
    """Where its script is from, and where data may be, too."""
    kind, _, name = variant.source.partition("=")
    return Path(name).resolve().parent if kind == "script" else ROOT


def last_line(stderr: bytes) -> str:
    """What a script said last before it failed, or the mistake that it named."""
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ["it said nothing", *lines, *mistakes][-1]

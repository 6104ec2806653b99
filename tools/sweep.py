#!/usr/bin/env python3
"""Run variants of train_gpt.py, one a GPU, side by side, and compare them with the first, paired by seed.

    python tools/sweep.py floor.txt                  # into runs/floor; what is there already is not run again
    python tools/sweep.py floor.txt --out FOLDER     # goes on wherever this folder was copied to

The table of variants is text, and its first variant is the base:

    seeds   0 1 2
    common  PRESET=smoke ITERATIONS=100 TTT_ENABLED=0
    floor   MIN_LR=0.1
    none    MIN_LR=0
    mine    script=my_train_gpt.py         # or ref=COMMIT, whose train_gpt.py then runs

Settings are train_gpt.py's, and come from the table alone; of the environment's, DATA_DIR counts. Unless the
table says otherwise, a run has as many steps as ITERATIONS says (MAX_WALLCLOCK_SECONDS=0), and its last
weights are validated, too. Runs of one seed see the same data in the same order. Seeds come one after the
other, so that pairs are complete early. On a CPU one run follows the other.

After every run its log, its result and metrics.jsonl (with --scores also the loss of every target) are copied
to the folder, which has the scripts as well, and table.md: what has come out so far. So a sweep may be killed
at any moment, and goes on by the same command. That tries again what has failed; a variant that fails does
not stop the others. Variants and seeds may be added; a changed variant needs a new name.
"""
import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import command
from measures import measure, tables

from finished_runs import Refused, Run, read, read_finished, read_object, sha256

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {"MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "1000000000"}  # validate at the end alone
OF_THE_SWEEP = "SEED", "RUN_ID", "ARTIFACT_DIR", "SAVE_SCORES"
KEPT = "log.txt", "metrics.jsonl", "scores.npz", "result.json"
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
QUESTION = '''
import dataclasses, json, runpy, sys

script = runpy.run_path(sys.argv[1], run_name="script")
torch = sys.modules.get("torch")
answers = []
for settings in json.load(sys.stdin):
    try:
        answers.append(["", script["Config"].from_env(settings).data_dir])
    except script["UserError"] as error:
        answers.append([str(error), ""])
names = [field.name.upper() for field in dataclasses.fields(script["Config"])]
print(json.dumps([names, torch.cuda.device_count() if torch else 0, answers]))
'''  # names of all settings, GPUs, and of each variant what is wrong with it and its DATA_DIR


class Variant(NamedTuple):
    """A row of the table."""
    name: str
    source: str  # "script=FILE", "ref=COMMIT" or, for this repository's train_gpt.py, nothing
    settings: dict[str, str]


class Plan(NamedTuple):
    """How runs of a variant are started."""
    script: Path
    cwd: Path
    environment: dict[str, str]


class Started(NamedTuple):
    """A run at work."""
    variant: str
    seed: int
    gpu: str  # as CUDA_VISIBLE_DEVICES names it; nothing on a CPU
    place: Path
    process: subprocess.Popen
    began: float


# ---- Variants ----------------------------------------------------------------------------------------------

def read_table(path: Path) -> tuple[list[Variant], list[int]]:
    """(variants, seeds) of a table."""
    # 1) Rows by name.
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(read(path).decode(errors="replace").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise Refused(f"{path}, line {number}: {error}") from error
        if words and words[0] in rows:
            raise Refused(f"{path}, line {number}: {words[0]} is there twice")
        if words and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", words[0]):
            raise Refused(f"{path}, line {number}: {words[0]} is no name, of letters, digits, '.', '_', '-'")
        if words:
            rows[words[0]] = words[1:]
    # 2) What they mean.
    seeds = rows.pop("seeds", [])
    if len(set(seeds)) < max(1, len(seeds)) or not all(re.fullmatch(r"\d{1,18}", seed) for seed in seeds):
        raise Refused(f"{path}: needs a row `seeds` of whole numbers, each once")
    common = rows.pop("common", [])
    if not rows:
        raise Refused(f"{path}: needs a row for each variant")
    return [read_variant(path, name, common, own) for name, own in rows.items()], [*map(int, seeds)]


def read_variant(path: Path, name: str, common: list[str], own: list[str]) -> Variant:
    settings = {**DEFAULTS}
    for words in (common, own):
        given = dict(word.partition("=")[::2] for word in words)
        wrong = [word for word in words if "=" not in word or word.partition("=")[0] in OF_THE_SWEEP]
        if wrong or len(given) < len(words):
            raise Refused(f"{path}, {name}: settings are NAME=VALUE, each once, and none of the sweep's own, "
                          f"{', '.join(OF_THE_SWEEP)}: {' '.join(wrong or words)}")
        settings |= given
    sources = [f"{kind}={settings.pop(kind)}" for kind in ("script", "ref") if kind in settings]
    if len(sources) > 1:
        raise Refused(f"{path}, {name}: {' and '.join(sources)}: which of them?")
    if "PRESET" not in settings and "ITERATIONS" not in settings and settings["MAX_WALLCLOCK_SECONDS"] == "0":
        raise Refused(f"{path}, {name}: how long is a run? Set ITERATIONS, or MAX_WALLCLOCK_SECONDS")
    return Variant(name, "".join(sources), settings)


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
        asked = subprocess.run([sys.executable, "-c", QUESTION, str(file)], capture_output=True,
                               input=json.dumps([here | variant.settings for variant in members]).encode())
        if asked.returncode:
            raise Refused(f"{members[0].name}: its script is unlike train_gpt.py: {last_line(asked.stderr)}")
        settings, gpus, answers = json.loads(asked.stdout.splitlines()[-1])
        for variant, (problem, _) in zip(members, answers):
            unknown = [name for name in variant.settings if name not in settings]
            if problem or unknown:
                problem = problem or f"{unknown[0]} is not a setting of its script"
                raise Refused(f"{variant.name}: {problem}")
        # 2) Plan. What the environment sets would be in no table.
        strays = [name for name in os.environ if name in settings and name not in here]
        if strays:
            command.note(f"left out, as settings come from the table: {', '.join(strays)} of the environment")
        inherited = {name: value for name, value in os.environ.items() if name not in strays}
        for variant, (_, data_dir) in zip(members, answers):
            kind, _, name = variant.source.partition("=")
            beside = Path(name).resolve().parent if kind == "script" else ROOT  # where data may be, too
            cwd = Path.cwd() if Path(data_dir).is_dir() else beside
            plans[variant.name] = Plan(file, cwd, inherited | variant.settings)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [*map(str, range(gpus))]
    return plans, names[:gpus] or [""]


def last_line(stderr: bytes) -> str:
    """What a script said last before it failed, or the mistake that it named."""
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ["it said nothing", *lines, *mistakes][-1]


# ---- The folder --------------------------------------------------------------------------------------------

def read_definitions(folder: Path) -> dict[str, Any]:
    """What sweep.json in the folder says of each variant; Refused if the folder is something else."""
    file = folder / "sweep.json"
    if not file.exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise Refused(f"{folder} is there, and not the folder of a sweep: name another one by --out")
        return {}
    definitions = read_object(file).get("variants")
    if not isinstance(definitions, dict):
        raise Refused(f"{file}: damaged, it has no variants")
    return definitions


def define(variants: list[Variant], scripts: dict[str, bytes], folder: Path) -> None:
    """Write sweep.json and the scripts; Refused if a variant that is there already is another."""
    definitions = read_definitions(folder)
    for name, source, settings in variants:
        new = {"source": source, "settings": settings, "script": sha256(scripts[name])}
        old = definitions.setdefault(name, new)
        there = old["settings"]
        changed = [f"{key} ({there.get(key, 'unset')} there)" for key in {**there, **settings}
                   if there.get(key) != settings.get(key)]
        changed += ["its script"] if old["script"] != new["script"] else []
        if changed:
            raise Refused(f"{name} is another variant in {folder}, by {', '.join(changed)}: give it another "
                          "name, or name another folder by --out")
    for name, script in scripts.items():
        (folder / name).mkdir(exist_ok=True)
        command.write_whole(folder / name / "train_gpt.py", script)
    text = json.dumps({"variants": definitions}, indent=1) + "\n"
    command.write_whole(folder / "sweep.json", text.encode())


def keep(run: Path, kept: Path) -> None:
    """Copy what is kept of a finished run, whole or not at all. The rest is deleted first, to make room."""
    for path in run.iterdir():
        if path.name not in KEPT:
            path.unlink()
    part = kept.with_name(f".{kept.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for path in run.iterdir():
            command.write_whole(part / path.name, path.read_bytes())
        part.rename(kept)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise Refused(f"cannot write {kept}: {error.strerror}: make room, move {run} there, which is a "
                      "finished run, and call again") from error


# ---- Runs --------------------------------------------------------------------------------------------------

class Sweep:
    """The runs of a sweep: finished, to come, at work."""

    def __init__(self, folder: Path, variants: list[Variant], seeds: list[int]):
        self.folder = folder
        self.names = [variant.name for variant in variants]
        self.finished: dict[tuple[str, int], Run] = {}
        self.to_come: list[tuple[str, int]] = []
        self.at_work: list[Started] = []
        self.failed: dict[str, str] = {}  # by variant: which seed, and why
        for key in ((name, seed) for seed in seeds for name in self.names):
            if self.kept_at(*key).exists():
                self.finished[key] = read_finished(self.kept_at(*key))
            else:
                self.to_come.append(key)

    def kept_at(self, variant: str, seed: int) -> Path:
        return self.folder / variant / f"seed{seed}"

    def run(self, plans: dict[str, Plan], gpus: list[str], work: Path, scores: bool) -> None:
        """Run all that is to come, one run a GPU at a time; no run outlives this."""
        parallel = len(gpus)
        try:
            while self.to_come or self.at_work:
                while self.to_come and gpus:
                    variant, seed = self.to_come.pop(0)
                    self.at_work.append(start(variant, seed, plans[variant], gpus.pop(0), work, scores))
                time.sleep(0.1)
                for run in [run for run in self.at_work if run.process.poll() is not None]:
                    self.at_work.remove(run)
                    gpus.append(run.gpu)
                    command.say(f"{run.variant} seed {run.seed}: {self.end(run)}; {self.to_go(parallel)}")
                    command.write_whole(self.folder / "table.md", "\n".join([*self.table(), ""]).encode())
        finally:
            for run in self.at_work:
                run.process.terminate()
            for run in self.at_work:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(10)
                run.process.kill()

    def end(self, run: Started) -> str:
        """Keep what a run has left; returns what it came to, or why it failed."""
        kept = self.kept_at(run.variant, run.seed)
        complaint = kept.with_name(f"{kept.name}.stderr.txt")
        said = (run.place / "stderr.txt").read_bytes()
        status = run.process.returncode
        try:
            if status:
                raise Refused(f"ended by signal {-status}" if status < 0 else last_line(said))
            finished = read_finished(run.place / "run")
            measures = measure(finished)
        except Refused as error:
            shutil.rmtree(run.place)
            self.failed[run.variant] = f"seed {run.seed}: {error}"
            self.to_come = [key for key in self.to_come if key[0] != run.variant]
            command.write_whole(complaint, said)
            return f"failed: {error}"
        keep(run.place / "run", kept)
        shutil.rmtree(run.place)
        complaint.unlink(missing_ok=True)
        self.finished[run.variant, run.seed] = finished
        return f"average {measures['average']:.5f}, quantized {measures['quantized']:.5f}"

    def to_go(self, parallel: int) -> str:
        """How many runs are left, and how long they take if they take what the finished ones took."""
        left = len(self.to_come) + len(self.at_work)
        seconds = [run.result["seconds"] for run in self.finished.values()]
        if not left or not seconds:
            return f"{left} to go"
        usual = statistics.fmean(seconds)
        spent = sum(min(usual, time.monotonic() - run.began) for run in self.at_work)
        return f"{left} to go, about {(left * usual - spent) / parallel / 60:.1f} min"

    def table(self) -> list[str]:
        """What is finished, in tables, and why variants failed."""
        groups = {name: [run for (variant, _), run in self.finished.items() if variant == name]
                  for name in self.names}
        return tables(groups) + [f"{name} failed, {why}" for name, why in self.failed.items()]


def start(variant: str, seed: int, plan: Plan, gpu: str, work: Path, scores: bool) -> Started:
    place = work / f"{variant}-seed{seed}"
    place.mkdir()
    own = {"SEED": str(seed), "RUN_ID": place.name, "ARTIFACT_DIR": str(place / "run")}
    own |= {"SAVE_SCORES": str(place / "run/scores.npz")} if scores else {}
    own |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    with open(place / "stderr.txt", "wb") as stderr:
        process = subprocess.Popen([sys.executable, str(plan.script)], cwd=plan.cwd, stderr=stderr,
                                   env=plan.environment | own, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, preexec_fn=end_with_parent)
    return Started(variant, seed, gpu, place, process, time.monotonic())


def end_with_parent() -> None:
    """Let Linux end this process when the sweep is killed, so that it does not go on and hold a GPU."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)


# ---- The command -------------------------------------------------------------------------------------------

def run_sweep(table: Path, folder: Path, work: Path, scores: bool) -> int:
    """Run what is not finished and print the table; returns the exit status."""
    # 1) What to run.
    variants, seeds = read_table(table)
    definitions = read_definitions(folder)
    scripts = {variant.name: read_script(variant, folder, definitions) for variant in variants}
    plans, gpus = plan_runs(variants, scripts, work)
    # 2) Run it, in a folder that is this process's alone.
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with command.claim(folder):
            define(variants, scripts, folder)
            sweep = Sweep(folder, variants, seeds)
            command.say(f"{folder}: finished {len(sweep.finished)}, {sweep.to_go(len(gpus))}, "
                        f"{len(gpus)} at a time")
            sweep.run(plans, gpus, work, scores)
    except BlockingIOError as error:
        raise Refused(f"{folder}: another sweep.py is at work there") from error
    # 3) Tell.
    command.say("\n".join(["", *sweep.table()]))
    if sweep.failed:
        return command.report(f"failed: {', '.join(sweep.failed)}; the same command tries again")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="text file of variants")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="for results (runs/NAME_OF_TABLE)")
    parser.add_argument("--scores", action="store_true", help="keep the loss of every target, for compare.py")
    args = parser.parse_args(argv)
    folder = args.out or Path("runs", args.table.stem)
    work = Path(tempfile.mkdtemp(prefix="sweep-"))
    try:
        return run_sweep(args.table, folder, work, args.scores)
    except (Refused, OSError) as error:
        return command.report(error)
    except KeyboardInterrupt:
        command.report(f"interrupted: finished runs are in {folder}; the same command goes on")
        return 130
    finally:
        if not any(work.glob("*/run/result.json")):  # a finished run that could not be copied stays
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill ends the runs, too, as Ctrl-C does
    command.run(main)

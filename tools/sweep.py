#!/usr/bin/env python3
"""Run variants of train_gpt.py, one a GPU, side by side, and compare them with the first, paired by seed.

    python tools/sweep.py floor.txt                  # into runs/floor; what is there already is not run again
    python tools/sweep.py floor.txt --out FOLDER     # goes on wherever this folder was copied to
    python tools/sweep.py runs/floor                 # runs nothing: the tables of what is there

The table of variants is text, and its first variant is the base:

    seeds   0 1 2
    common  PRESET=smoke ITERATIONS=100 TTT_ENABLED=0
    floor   MIN_LR=0.1
    none    MIN_LR=0
    mine    script=my_train_gpt.py         # or ref=COMMIT, whose train_gpt.py then runs
    more    MIN_LR=0.2 seeds=0,1,2,3       # seeds of its own

Settings are train_gpt.py's, and come from the table alone; of the environment's, DATA_DIR counts. Unless the
table says otherwise, a run has as many steps as ITERATIONS says (MAX_WALLCLOCK_SECONDS=0), and its last
weights are validated, too. Runs of one seed see the same data in the same order. Seeds come one after the
other, so that pairs are complete early. On a CPU one run follows the other.

After every run its log, result.json and metrics.jsonl (with --scores the loss of every target) are copied to
the folder, which holds the scripts as well, and table.md, the table so far. So a sweep may be killed at any
moment, and the same command goes on. It tries again what has failed, which never stops the other variants.
Variants and seeds may be added or left out; a changed variant needs a new name. Tables hold all that is in
the folder, and pair runs of one machine only.
"""
import argparse
import contextlib
import json
import os
import platform
import re
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
from measures import MACHINE, measure, tables
from variants import Plan, Variant, last_line, plan_runs, read_script, read_table

from finished_runs import Refused, read_finished, read_object, sha256

KEPT = "log.txt", "metrics.jsonl", "scores.npz", MACHINE, "result.json"
DEFINITION = {"source", "settings", "script"}  # what sweep.json has of a variant; of its script, the SHA-256


class Started(NamedTuple):
    """A run at work."""
    variant: str
    seed: int
    gpu: str  # as CUDA_VISIBLE_DEVICES names it; nothing on a CPU
    place: Path
    process: subprocess.Popen


# ---- The folder --------------------------------------------------------------------------------------------

def read_definitions(folder: Path) -> dict[str, Any]:
    """What sweep.json in the folder says of each variant; Refused if the folder is something else."""
    file = folder / "sweep.json"
    if file.exists():
        definitions = read_object(file).get("variants")
        variants = definitions.values() if isinstance(definitions, dict) else [None]
        if any(not isinstance(variant, dict) or variant.keys() != DEFINITION for variant in variants):
            raise Refused(f"{file}: damaged, it does not define variants")
        return definitions
    others = folder.iterdir() if folder.exists() else []
    if any(not path.match(".*") and not path.match("*.part") for path in others):  # a kill leaves these
        raise Refused(f"{folder} is there, and not the folder of a sweep: name another one by --out")
    return {}


def define(variants: list[Variant], scripts: dict[str, bytes], folder: Path) -> None:
    """Write sweep.json and the scripts; Refused if a variant that is there already is another."""
    definitions = read_definitions(folder)
    for name, source, settings, _ in variants:
        new = {"source": source, "settings": settings, "script": sha256(scripts[name])}
        old = definitions.setdefault(name, new)
        there = old["settings"]
        changed = [f"{key} ({there.get(key, 'unset')} there)" for key in {**there, **settings}
                   if there.get(key) != settings.get(key)]
        changed += ["its script"] if old["script"] != new["script"] else []
        if changed:
            raise Refused(f"{name} is another variant in {folder}, by {', '.join(changed)}: give it another "
                          "name, or name another folder by --out")
    text = json.dumps({"variants": definitions}, indent=1) + "\n"
    write(folder / "sweep.json", text.encode())
    for name, script in scripts.items():
        (folder / name).mkdir(exist_ok=True)
        write(folder / name / "train_gpt.py", script)


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or not at all; Refused names it."""
    try:
        command.write_whole(path, data)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}") from error


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

    def __init__(self, folder: Path, variants: list[Variant]):
        self.folder = folder
        names = [variant.name for variant in variants]
        self.names = [*dict.fromkeys([*names, *read_definitions(folder)])]  # others are in the tables, too
        self.finished = {(name, int(path.name.removeprefix("seed"))): read_finished(path)
                         for name in self.names for path in sorted((folder / name).glob("seed*"))
                         if re.fullmatch(r"seed\d{1,18}", path.name)}
        seeds = dict.fromkeys(seed for variant in variants for seed in variant.seeds)
        wanted = [(name, seed) for seed in seeds for name, *_, own in variants if seed in own]
        self.to_come = [key for key in wanted if key not in self.finished]
        self.at_work: list[Started] = []
        self.failed: dict[str, str] = {}  # by variant: which seed, and why

    def kept_at(self, variant: str, seed: int) -> Path:
        return self.folder / variant / f"seed{seed}"

    def run(self, plans: dict[str, Plan], gpus: list[str], work: Path, scores: bool) -> None:
        """Run all that is to come, one run a GPU at a time; no run outlives this."""
        parallel = len(gpus)
        # Runs side by side would each start a thread for every core.
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // parallel))} if parallel > 1 else {}
        plans = {name: plan._replace(environment=threads | plan.environment) for name, plan in plans.items()}
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
                    write(self.folder / "table.md", "\n".join([*self.table(), ""]).encode())
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
            measures = measure(read_finished(run.place / "run"))
        except Refused as error:
            shutil.rmtree(run.place)
            self.failed[run.variant] = f"seed {run.seed}: {error}"
            self.to_come = [key for key in self.to_come if key[0] != run.variant]
            write(complaint, said)
            return f"failed: {error}"
        (run.place / "run" / MACHINE).write_text(this_machine() + "\n", encoding="utf-8")
        keep(run.place / "run", kept)
        shutil.rmtree(run.place)
        complaint.unlink(missing_ok=True)
        self.finished[run.variant, run.seed] = read_finished(kept)
        return f"average {measures['average']:.5f}, quantized {measures['quantized']:.5f}"

    def to_go(self, parallel: int) -> str:
        """How many runs are left, and how long they take if they take what most of the finished ones took."""
        left = len(self.to_come) + len(self.at_work)
        seconds = [run.result["seconds"] for run in self.finished.values()]
        if not left or not seconds:
            return f"{left} to go"
        return f"{left} to go, about {left * statistics.median(seconds) / parallel / 60:.1f} min"

    def table(self) -> list[str]:
        """What is finished, in tables, and why variants failed."""
        groups = {name: [run for (variant, _), run in self.finished.items() if variant == name]
                  for name in self.names}
        return tables(groups) + [f"{name} failed, {why}" for name, why in self.failed.items()]


def start(variant: str, seed: int, plan: Plan, gpu: str, work: Path, scores: bool) -> Started:
    """Start a run in a folder of its own."""
    place = work / f"{variant}-seed{seed}"
    place.mkdir()
    own = {"SEED": str(seed), "RUN_ID": place.name, "ARTIFACT_DIR": str(place / "run")}
    own |= {"SAVE_SCORES": str(place / "run/scores.npz")} if scores else {}
    own |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    with open(place / "stderr.txt", "wb") as stderr:
        process = subprocess.Popen([sys.executable, str(plan.script)], cwd=plan.cwd, stderr=stderr,
                                   env=plan.environment | own, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, preexec_fn=command.end_with_parent)
    return Started(variant, seed, gpu, place, process)


def this_machine() -> str:
    """A name that another machine, or this one after a restart, does not have."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="utf-8").strip() if boot.exists() else platform.node()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# ---- The command -------------------------------------------------------------------------------------------

def run_sweep(table: Path, folder: Path, work: Path, scores: bool) -> int:
    """Run what is not finished and print the table; returns the exit status."""
    # 1) What to run.
    variants = read_table(table)
    definitions = read_definitions(folder)
    scripts = {variant.name: read_script(variant, folder, definitions) for variant in variants}
    plans, gpus = plan_runs(variants, scripts, work)
    # 2) Run it, in a folder that is this process's alone.
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with command.claim(folder):
            define(variants, scripts, folder)
            sweep = Sweep(folder, variants)
            command.say(f"{folder}: finished {len(sweep.finished)}, {sweep.to_go(len(gpus))}, "
                        f"{len(gpus)} at a time")
            without = [f"{name}/seed{seed}" for (name, seed), run in sweep.finished.items()
                       if not (run.log.parent / "scores.npz").exists()]
            if scores and without:
                command.note("finished without --scores, delete them to run them again: "
                             f"{' '.join(without)}")
            sweep.run(plans, gpus, work, scores)
    except BlockingIOError as error:
        raise Refused(f"{folder}: another sweep.py is at work there") from error
    # 3) Tell.
    command.say("\n".join(["", *sweep.table()]))
    if sweep.failed:
        return command.report(f"failed: {', '.join(sweep.failed)}; the same command tries again")
    return 0


def tell(folder: Path) -> int:
    """Print the tables of what is finished in the folder of a sweep."""
    if not read_definitions(folder):
        raise Refused(f"{folder} is not the folder of a sweep, nor a table of variants")
    command.say("\n".join(Sweep(folder, []).table()))
    return 0


def remove_remains() -> None:
    """Remove the working folders of sweeps that were killed, but for finished runs that were not copied."""
    for folder in Path(tempfile.gettempdir()).glob("sweep-[0-9]*-*"):
        process = Path("/proc", folder.name.split("-")[1])
        if Path("/proc/self").exists() and not process.exists() and not any(folder.glob("*/run/result.json")):
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="text file of variants, or the folder of a sweep")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="for results (runs/NAME_OF_TABLE)")
    parser.add_argument("--scores", action="store_true", help="keep the loss of every target, for compare.py")
    args = parser.parse_args(argv)
    folder = args.out or Path("runs", args.table.stem)
    remove_remains()
    work = Path(tempfile.mkdtemp(prefix=f"sweep-{os.getpid()}-"))
    try:
        if args.table.is_dir():
            return tell(args.table)
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

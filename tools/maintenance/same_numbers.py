#!/usr/bin/env python3
"""Whether train_gpt.py computes what it did at an earlier commit: the same artifact and losses, to the byte.

    python tools/maintenance/same_numbers.py e988f3a                      # three seeds: 25 minutes
    python tools/maintenance/same_numbers.py HEAD --seeds 7 --steps 60    # a quick look

Both scripts run the smoke preset on this machine with one thread and without a scoring deadline. The exit
status is 0 if everything is equal, 1 if something differs, 2 after an error. Hashes, sizes and times of the
scripts may differ.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import command

with command.imports():
    import numpy as np


class RunFailed(Exception):
    """A script that did not finish; its text is the end of what it said."""


def run(script: Path, folder: Path, seed: int, steps: int) -> None:
    """Train, quantize and score; the folder then holds the artifact and scores.npz."""
    folder.mkdir(parents=True)
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PRESET": "smoke", "SEED": str(seed),
           "EVAL_MAX_SECONDS": "0", "DATA_DIR": str(ROOT / "data/smoke"), "ARTIFACT_DIR": str(folder / "run"),
           "SAVE_SCORES": str(folder / "scores.npz")}
    if steps:
        env["ITERATIONS"] = str(steps)
    done = subprocess.run([sys.executable, str(script)], env=env, cwd=ROOT, capture_output=True)
    if done.returncode:
        last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RunFailed(f"{script} with SEED={seed} ended with status {done.returncode}: {last_line:.300}")


def differences(before: Path, now: Path) -> list[str]:
    """What of two runs is not the same to the byte."""
    found = []
    name = "run/final_model.int6.ptz"
    if (before / name).read_bytes() != (now / name).read_bytes():
        found.append("artifact")
    with np.load(before / "scores.npz") as old, np.load(now / "scores.npz") as new:
        found += sorted(set(old.files) ^ set(new.files))
        found += [key for key in old.files if key in new.files and old[key].tobytes() != new[key].tobytes()]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="whose train_gpt.py to compare with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42, 7], help="1337 42 7")
    parser.add_argument("--steps", type=int, default=0, help="of training; default: the preset's")
    args = parser.parse_args(argv)
    show = ["git", "-C", str(ROOT), "show", f"{args.commit}:train_gpt.py"]
    try:
        script = subprocess.run(show, check=True, capture_output=True).stdout
        with tempfile.TemporaryDirectory() as scratch:
            return compare(script, Path(scratch), args.seeds, args.steps)
    except subprocess.CalledProcessError as error:
        return command.report(f"{args.commit}: {error.stderr.decode(errors='replace').strip()}")
    except (RunFailed, OSError) as error:
        return command.report(error)


def compare(script: bytes, scratch: Path, seeds: list[int], steps: int) -> int:
    """Run an earlier script and this one with every seed; 1 if they differ, else 0."""
    earlier = scratch / "train_gpt.py"
    earlier.write_bytes(script)
    equal = True
    for seed in seeds:
        before, now = scratch / f"before-{seed}", scratch / f"now-{seed}"
        run(earlier, before, seed, steps)
        run(ROOT / "train_gpt.py", now, seed, steps)
        found = differences(before, now)
        equal = equal and not found
        verdict = f"DIFFERENT: {', '.join(found)}" if found else "the same to the byte"
        command.say(f"seed {seed}: {verdict}")
    return 0 if equal else 1


if __name__ == "__main__":
    command.run(main)

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

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


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
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{script} with SEED={seed} ended with status {done.returncode}: "
                        f"{done.stderr[-300:]}")


def differences(before: Path, now: Path) -> list[str]:
    """What of two runs is not the same to the byte."""
    found = []
    name = "run/final_model.int6.ptz"
    if (before / name).read_bytes() != (now / name).read_bytes():
        found.append("artifact")
    with np.load(before / "scores.npz") as old, np.load(now / "scores.npz") as new:
        found += [key for key in old.files if old[key].tobytes() != new[key].tobytes()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="whose train_gpt.py to compare with")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1337, 42, 7], help="1337 42 7")
    parser.add_argument("--steps", type=int, default=0, help="of training; default: the preset's")
    args = parser.parse_args()
    show = ["git", "-C", str(ROOT), "show", f"{args.commit}:train_gpt.py"]
    shown = subprocess.run(show, capture_output=True, text=True)
    if shown.returncode:
        print(f"error: {shown.stderr.strip()}", file=sys.stderr)
        return 2
    equal = True
    with tempfile.TemporaryDirectory() as scratch:
        earlier = Path(scratch, "train_gpt.py")
        earlier.write_text(shown.stdout, encoding="utf-8")
        for seed in args.seeds:
            before, now = Path(scratch, f"before-{seed}"), Path(scratch, f"now-{seed}")
            try:
                run(earlier, before, seed, args.steps)
                run(ROOT / "train_gpt.py", now, seed, args.steps)
            except RunFailed as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            found = differences(before, now)
            equal = equal and not found
            verdict = f"DIFFERENT: {', '.join(found)}" if found else "the same to the byte"
            print(f"seed {seed}: {verdict}", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

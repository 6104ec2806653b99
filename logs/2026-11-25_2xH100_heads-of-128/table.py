"""Paired differences to the base of the same seed, with the standard error over documents of each, and over seeds."""
import json, os, collections
from pathlib import Path
import numpy as np
OUT = Path(os.environ.get("SWEEP_OUT", "/tmp/sweep"))
rows = [json.loads(l) for l in open(OUT / "rows.jsonl")]
for r in rows: print(r)
by = {(r["name"], r["seed"]): np.load(OUT / f"{r['name']}-{r['seed']}.npz") for r in rows}
diffs = collections.defaultdict(list)
for (name, seed), f in by.items():
    b = by.get(("base", seed))
    if name == "base" or b is None: continue
    for k in ("last", "average"):
        d, size = (f[k] - b[k]) / np.log(2), f["size"]
        m = d.sum() / size.sum(); se = np.sqrt(((d - m * size) ** 2).sum()) / size.sum()
        diffs[name, k].append(m); print(f"{name:10} seed {seed} {k:8} {m:+.5f} +- {se:.5f} (documents)")
for (name, k), v in diffs.items():
    print(f"{name:10} {k:8} n={len(v)} mean {np.mean(v):+.5f}" + (f" sd over seeds {np.std(v, ddof=1):.5f} se {np.std(v, ddof=1)/len(v)**.5:.5f}" if len(v) > 1 else ""))
for k in ("last", "average"):
    v = [r[k] for r in rows if r["name"] == "base"]
    if len(v) > 1: print("base", k, "sd over seeds", round(float(np.std(v, ddof=1)), 5), v)

"""Fabricated runs of experiments, as tools/sweep.py and tools/compare.py read them. It needs Python alone."""
import hashlib
import json
import math
from pathlib import Path

BAR = "=" * 100
SOURCE = '"""A script."""\n'
CPU = "1 x CPU x86_64"
TOKENS, BYTES = 1000, 4000


def result_of(seed: int, average: float, quantized: float | None = None, adapted: float | None = None,
              ms: float = 100.0, steps: int = 10, card: str = CPU, **changes) -> dict:
    """What a run leaves that comes to these bits per byte; without adaptation the quantized score counts."""
    scores = {"_unquantized": average, "_quantized": average + 0.001 if quantized is None else quantized}
    scores[""] = scores["_quantized"] if adapted is None else adapted
    result = {f"val_bpb{stage}": bpb for stage, bpb in scores.items()}
    result |= {f"val_loss{stage}": bpb * math.log(2) * BYTES / TOKENS for stage, bpb in scores.items()}
    clock = {"seconds": 1.0, "budget": 0.0}
    return result | dict(
        seed=seed, settings={"seed": seed}, mode="train", steps=steps, caveats=[], documents=4, tokens=TOKENS,
        bytes=BYTES, unadapted_tokens=TOKENS if adapted is None else 0, total_bytes=900_000 + seed,
        model_bytes=800_000 + seed, code_bytes=100_000, hardware=card, versions={"python": "3.12"},
        phases={"train": ms * steps / 1000}, clocks={"training": clock, "scoring": clock}, seconds=60.0,
        code_sha256=hashlib.sha256(SOURCE.encode()).hexdigest(), packed_sha256="a" * 64,
        tokenizer_sha256="b" * 64, val_sha256="c" * 64) | changes


def write_run(folder: Path, result: dict, last: float | None = None) -> Path:
    """Write log, result and metrics of a run whose last weights come to `last`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"kind": "settings"}]
    if last is not None:  # validated after the first step, too
        rows += [{"kind": "validation", "step": step, "val_bpb": bpb, "val_loss": 1.0}
                 for step, bpb in ((1, 9.0), (result["steps"], last))]
    rows.append({"kind": "result", **result})
    log = "\n".join([BAR, SOURCE, BAR, f"RESULT {json.dumps(result)}", ""])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "log.txt").write_text(log, encoding="utf-8")
    return folder

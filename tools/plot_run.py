#!/usr/bin/env python3
"""Draw runs: loss, learning rate, speed and bits per byte of one or several, from their metrics.jsonl.

    python tools/plot_run.py runs/a runs/b/metrics.jsonl -o runs.png

A run is a folder that train_gpt.py left (its ARTIFACT_DIR) or a metrics.jsonl from one.
"""
import argparse
import json
import pathlib
import sys

BPB = {"val_bpb_unquantized": "unquantized", "val_bpb_quantized": "quantized", "val_bpb": "adapted"}


def read_run(path: pathlib.Path) -> dict:
    """{"name", "settings", "steps", "validations", "result"} of a run; an unfinished one has no result."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {file}: not the metrics of a run ({error})") from error
    of = lambda kind: [row for row in rows if row.get("kind") == kind]
    run = {"name": file.parent.name if path.is_dir() or file.name == "metrics.jsonl" else file.stem, "steps": of("step"),
           "validations": of("validation"), "settings": (of("settings") or [{}])[0], "result": (of("result") or [None])[-1]}
    if not run["steps"] and not run["result"]:
        raise SystemExit(f"error: {file} has neither steps nor a result")
    return run


def speeds(run: dict) -> tuple[list[int], list[float]]:
    """(steps, tokens a second between each and the next), smoothed over 1/50 of the run."""
    steps, tokens = run["steps"], run["settings"].get("train_batch_tokens", 0)
    width = max(1, len(steps) // 50)
    pairs = [(a, b) for a, b in zip(steps, steps[width:]) if b["seconds"] > a["seconds"]]
    return [b["step"] for _, b in pairs], [tokens * (b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in pairs]


def draw(runs: list[dict], out: pathlib.Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: drawing needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((loss, rate), (speed, bpb)) = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    for color, run in zip(plt.cm.tab10.colors * len(runs), runs):
        x = [row["step"] for row in run["steps"]]
        loss.plot(x, [row["loss"] for row in run["steps"]], color=color, linewidth=0.8, label=run["name"])
        if run["validations"]:
            loss.plot([v["step"] for v in run["validations"]], [v["val_loss"] for v in run["validations"]], "o", color=color)
        rate.plot(x, [row["lr"] for row in run["steps"]], color=color)
        speed.plot(*speeds(run), color=color)
        switch = next((row["step"] for row in run["steps"] if row["looped"]), None)
        for axis in (loss, speed):
            if switch and switch > 1:
                axis.axvline(switch, color=color, linestyle=":", linewidth=0.8)
    loss.set(title="train loss (dots: validation; dotted line: loops begin)", xlabel="step", ylabel="nats a token")
    every = sorted(row["loss"] for run in runs for row in run["steps"])
    if every:
        loss.set_ylim(every[0] - 0.1, every[int(0.98 * (len(every) - 1))] + 0.3)
        loss.legend()
    rate.set(title="learning rate", xlabel="step", ylabel="of its peak", ylim=(0, 1.05))
    speed.set(title="speed", xlabel="step", ylabel="tokens a second", ylim=(0, None))
    finished = [run for run in runs if run["result"]]
    for i, run in enumerate(finished):
        values = [(label, run["result"][key]) for key, label in BPB.items() if run["result"].get(key) is not None]
        bars = bpb.bar([j + i * 0.8 / len(finished) for j, _ in enumerate(values)], [v for _, v in values],
                       width=0.8 / len(finished), label=run["name"])
        bpb.bar_label(bars, fmt="%.4f", fontsize=8)
        bpb.set_xticks([j + 0.4 - 0.4 / len(finished) for j in range(len(values))], [label for label, _ in values])
    scores = [run["result"][key] for run in finished for key in BPB if run["result"].get(key) is not None]
    if scores:
        margin = 0.4 * (max(scores) - min(scores)) + 0.002
        bpb.set_ylim(min(scores) - margin, max(scores) + margin)
    bpb.set(title="validation", ylabel="bits per byte (axis does not begin at 0)")
    save(figure, out)


def save(figure, out: pathlib.Path) -> None:
    """Write a picture; what cannot be written ends in one line."""
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: cannot write {out}: {error}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=pathlib.Path, help="folder of a run, or its metrics.jsonl")
    parser.add_argument("-o", "--out", type=pathlib.Path, default=pathlib.Path("run.png"), help="PNG to write (run.png)")
    args = parser.parse_args(argv)
    draw([read_run(path) for path in args.run], args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

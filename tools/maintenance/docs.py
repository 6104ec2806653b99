#!/usr/bin/env python3
"""Keep up to date what in docs/ follows from train_gpt.py, logs/ and submission.json.

    python tools/maintenance/docs.py            # write it
    python tools/maintenance/docs.py --check    # exit status 1 if it is out of date

docs/settings.md follows from Config as a whole. In docs/results.md the text between a pair of markers
`<!-- name -->` and `<!-- /name -->` is written.
"""
import argparse
import dataclasses
import inspect
import json
import math
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import command

with command.imports():
    import submission
    import train_gpt as tg

SETTINGS = ROOT / "docs/settings.md"
RESULTS = ROOT / "docs/results.md"
INTRODUCTION = """\
# Settings

Every setting is an environment variable. The defaults are those of a record run; `PRESET=smoke` replaces
some of them by tiny ones, given in parentheses, and `PRESET=single_gpu`, for short runs that are
[compared](experiments.md), by

    {single_gpu}

`python train_gpt.py --help` prints this list. This page is made by `make docs` from `Config` in
`train_gpt.py`.

An empty variable counts as unset. A variable that scripts of this lineage once had, or whose name is nearly
that of a setting (`MATRIX_LRR`), or begins with `TTT_`, `GPTQ_` or `MUON_` and is none, ends the run with one
line.

**Kind** says what happens when a saved model is scored again (`EVAL_ONLY_PATH`). *run*: the setting is this
run's own and is not saved. *model*: it is taken from the saved model, and another value is refused.
*quantization*: it is taken from the saved model; with another value a checkpoint is calibrated and quantized
again. Without a kind, it is taken from the saved model unless you set it. `SEED` is of two kinds: a saved
model keeps its seed, since the initial values of adapters follow from it, and calibration goes on in the
seed's order of the shards.

"""


def settings_page() -> str:
    """The whole of docs/settings.md."""
    comments = tg.setting_comments()
    rows = ["| variable | default | values | kind | meaning |", "|---|---|---|---|---|"]
    groups = setting_groups()
    for field in dataclasses.fields(tg.Config):
        if field.name in groups:
            rows.append(f"| **{groups[field.name]}** | | | | |")
        rows.append(f"| `{field.name.upper()}` | {shown_defaults(field)} | {shown_values(field)} | "
                    f"{field.metadata['kind'].replace(' ', ', ')} | {comments[field.name]} |")
    preset = " ".join(f"{name}={value}" for name, value in tg.PRESETS["single_gpu"].items())
    preset = textwrap.fill(preset, 106, subsequent_indent="    ")
    return INTRODUCTION.format(single_gpu=preset) + "\n".join(rows) + "\n"


def setting_groups() -> dict[str, str]:
    """Title of each group of settings, by the group's first field."""
    source = inspect.getsource(tg.Config)
    return {name: title for title, name in re.findall(r"^    # (.+)\n    (\w+): ", source, flags=re.M)}


def shown_defaults(field: dataclasses.Field) -> str:
    """The default of a setting and, in parentheses, that of PRESET=smoke if it is another."""
    default = field.default
    if isinstance(default, bool):
        default = int(default)
    elif field.name == "ttt_chunk_growth":
        default = "1/64"
    tiny = tg.PRESETS["smoke"].get(field.name.upper())
    return str(default) if tiny is None else f"{default} ({tiny})"


def shown_values(field: dataclasses.Field) -> str:
    """Range or choices of a setting."""
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    if choices:
        return ", ".join(map(str, choices))
    if isinstance(field.default, bool):
        return "0 or 1"
    if low is None:
        return ""
    if high == math.inf:
        return f"≥ {low:g}"
    return f"{low:g} … 2⁶³ − 1" if high == 2**63 - 1 else f"{low:g} … {high:g}"


def smoke_runs() -> str:
    """Table of the logged smoke runs."""
    rows = ["| seed | unquantized | quantized | final | bytes of the model | log |",
            "|---|---|---|---|---|---|"]
    for path in sorted((ROOT / "logs").glob("*_cpu_smoke-seed*/result.json")):
        result = json.loads(path.read_bytes())
        names = "val_bpb_unquantized", "val_bpb_quantized", "val_bpb"
        scores = " | ".join(f"{result[name]:.4f}" for name in names)
        log = f"../logs/{path.parent.name}/log.txt"
        rows.append(f"| {result['seed']} | {scores} | {result['model_bytes']:,} | [log]({log}) |")
    return "\n".join(rows)


def submitted_runs() -> str:
    """Table of the runs of submission.json."""
    made = json.loads((ROOT / "submission.json").read_bytes())
    for row in made["seed_results"].values():
        row["log"] = f"../{row['log']}"
    return submission.table(made)


def fill(page: str, blocks: dict[str, str]) -> str:
    """The page with these texts between their markers."""
    for name, text in blocks.items():
        before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if page.count(before) != 1 or page.count(after) != 1:
            problem = f"docs/results.md lacks the markers {before.strip()} and {after}"
            raise SystemExit(command.report(problem))
        head, rest = page.split(before)
        _, tail = rest.split(after)
        page = f"{head}{before}{text}\n{after}{tail}"
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit status 1 if something is out of date")
    args = parser.parse_args(argv)
    try:
        blocks = {"submission": submitted_runs(), "smoke": smoke_runs()}
        pages = {SETTINGS: settings_page(), RESULTS: fill(RESULTS.read_text(encoding="utf-8"), blocks)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return command.report(f"submission.json, docs/ or logs/ cannot be read: {error!r}")
    stale = [path for path, text in pages.items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'out of date' if args.check else 'written'}: {path.relative_to(ROOT)}")
        if not args.check:
            command.write_whole(path, pages[path].encode())
    return int(args.check and bool(stale))


if __name__ == "__main__":
    command.run(main)

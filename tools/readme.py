#!/usr/bin/env python3
"""Keep what in README.md follows from train_gpt.py, logs/ and submission.json as it should be: variables, map, runs.

    python tools/readme.py            # rewrite them
    python tools/readme.py --check    # exit status 1 if they are out of date
"""
import argparse
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import submission

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT, README = ROOT / "train_gpt.py", ROOT / "README.md"


def variables(source: str) -> str:
    """Markdown table of every setting: name, default, range, meaning, from the fields of Config and their comments."""
    body = source[source.index("class Config:") : source.index("    @classmethod\n    def from_env")]
    rows = ["| variable | default | range | meaning |", "|---|---|---|---|"]
    for line in body.splitlines():
        if group := re.fullmatch(r"    # (.+)", line):
            rows.append(f"| **{group[1]}** | | | |")
        elif field := re.fullmatch(r"    (\w+): (\w+) = knob\((.+)\)  # (.+)", line):
            name, kind, arguments, meaning = field.groups()
            default, *bounds = [a.strip() for a in re.findall(r'"[^"]*"|[^,]+', arguments)]
            shown = {"True": "1", "False": "0", '""': ""}.get(default, default.replace("_", "").strip('"'))
            limits = {0: "", 1: f"≥ {bounds[0]}" if bounds else "", 2: f"{bounds[0]} … {bounds[-1]}" if bounds else ""}[len(bounds)]
            limits = "0 or 1" if kind == "bool" else limits.replace("2**63 - 1", "2⁶³ − 1")
            rows.append(f"| `{name.upper()}` | {shown} | {limits} | {meaning} |")
    return "\n".join(rows)


def file_map(source: str) -> str:
    """Markdown table of the sections of the script with line numbers and what each defines."""
    lines = source.splitlines()
    starts = [(i, m[1].strip()) for i, line in enumerate(lines)
              if (m := re.match(r"# ---- (.+?) -+$", line)) or (lines[i - 1].startswith("# -----") and (m := re.match(r"# ([A-Z].+)", line))
                                                               and not lines[i - 2].startswith("#"))]
    rows = ["| lines | section | defines |", "|---|---|---|"]
    for (start, title), (end, _) in zip(starts, starts[1:] + [(len(lines), "")]):
        names = re.findall(r"^(?:def|class) (\w+)", "\n".join(lines[start:end]), flags=re.M)
        rows.append(f"| {start + 1}–{end} | {title.split(':')[0]} | {', '.join(f'`{n}`' for n in names)} |")
    return "\n".join(rows)


def smoke_runs() -> str:
    """Markdown table of the logged smoke runs."""
    rows = ["| seed | unquantized | quantized | adapted | bytes of the model | log |", "|---|---|---|---|---|---|"]
    for path in sorted((ROOT / "logs").glob("smoke-seed*/result.json")):
        r = json.loads(path.read_text())
        scores = " | ".join(f"{r[name]:.4f}" for name in ("val_bpb_unquantized", "val_bpb_quantized", "val_bpb"))
        rows.append(f"| {r['seed']} | {scores} | {r['model_bytes']:,} | [log](logs/{path.parent.name}/log.txt) |")
    return "\n".join(rows)


def updated(readme: str, source: str) -> str:
    made = json.loads((ROOT / "submission.json").read_text())
    for marker, text in (("variables", variables(source)), ("map", file_map(source)), ("smoke", smoke_runs()),
                         ("submission", submission.table(made))):
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
        if not re.search(pattern, readme, flags=re.S):
            raise SystemExit(f"error: README.md lacks the markers <!-- {marker} --> and <!-- /{marker} -->")
        readme = re.sub(pattern, lambda m: m[1] + text + "\n" + m[2], readme, flags=re.S)
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if they are out of date")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = updated(old, SCRIPT.read_text())
    if args.check:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

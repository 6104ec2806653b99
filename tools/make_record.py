#!/usr/bin/env python3
"""Make of finished runs a folder to add to a fork of the challenge: scripts, logs, README.md, submission.json.

    python tools/make_record.py 2026-11-21_Name runs/seed0 runs/seed1 runs/seed2 --author Me --github-id me

Its train_gpt.py is the packed script, byte for byte the one that the logs counted: that beside a log, else what
train_gpt.py packs to. The runs must add up as tools/submission.py wants it, whose options are taken here, too. The
folder appears whole or not at all, and none is written over.
"""
import argparse
import hashlib
import shlex
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

from submission import (OWN_SETTINGS, Refused, Run, about, add_options, as_json, load, read, said, signed,
                        significance, submission, table, verdicts)

ROOT = Path(__file__).resolve().parents[1]
README = """\
# {name}

val_bpb **{score}**{spread}, val_loss {loss}, at most {artifact_bytes:,} bytes of code and model,
on {hardware}. {verdict}

`train_gpt.py` trains a small GPT, quantizes and compresses it, reads the artifact back and scores the validation
documents with it, in bits per byte. While it scores, adapters learn from each document: every token is scored before
anything learns from it, and nothing is shared between documents. `train_gpt_readable.py` is the source and begins with
an overview. In the table, bytes are code and model.

{table}

{tests}## Run it again

    pip install -r requirements.txt
    {command}

Data are looked for in `DATA_DIR`, default `./data`, from the working directory and then beside the script: shards in
`datasets/fineweb10B_sp{vocab}/`, the tokenizer in `tokenizers/`. The log ends with `RESULT` and every number above;
`EVAL_ONLY_PATH=final_model.int6.ptz` before the same command scores a run's artifact again. Corpus: {corpus}.

| file | what it is |
|---|---|
| `train_gpt.py` | the script as it runs and is counted, {code_bytes:,} bytes; sha256 `{packed_sha256}` |
| `train_gpt_readable.py` | what it was packed from; only to be read |
| `train_seed*.log` | of every run: settings, versions, source (sha256 `{code_sha256}`), all lines, RESULT |
| `submission.json` | what follows from the logs |
| `requirements.txt` | the versions that ran |

## What holds, and what does not

{holds}

The four that begin with `score_before_update` are held by the script's tests, the others follow from the logs. Caveats
that the runs themselves state: {caveats}.
"""


def own_script() -> tuple[bytes, str]:
    """(packed, source) of this repository's train_gpt.py."""
    try:
        sys.path.insert(0, str(ROOT))
        import train_gpt as tg
    except ImportError as error:
        raise Refused(f"train_gpt.py has to be packed and cannot be imported: {error}") from error
    try:
        return tg.pack_script(), read(ROOT / "train_gpt.py").decode()
    except tg.UserError as error:
        raise Refused(str(error)) from error


def scripts(runs: list[Run]) -> tuple[bytes, str]:
    """(packed, source) of the runs: the very bytes that their logs counted, and what these were made from."""
    log, source, wanted = runs[0].log, runs[0].source, runs[0].result["packed_sha256"]
    packed = next((run.packed for run in runs if run.packed), None) or own_script()[0]
    if hashlib.sha256(packed).hexdigest() != wanted:
        raise Refused(f"{log}: train_gpt_packed.py is not beside it, and train_gpt.py does not pack to the bytes "
                      f"of its packed_sha256, {wanted}")
    if len(packed) != runs[0].result["code_bytes"]:
        raise Refused(f"{log}: code_bytes are {runs[0].result['code_bytes']}, but the packed script has {len(packed)}")
    if not source.startswith('"""'):  # minified: it was the packed script that ran
        own, source = own_script()
        if own != packed:
            raise Refused(f"{log}: the packed script ran, and train_gpt.py is not what that was packed from")
    return packed, source


def requirements(versions: dict[str, str], log: str) -> str:
    """The versions that ran, for pip; builds for the same CUDA come from PyTorch's index."""
    cuda = "cpu" if versions["cuda"] == "None" else "cu" + versions["cuda"].replace(".", "")
    lines = [f"# What the logged runs had, with Python {versions['python']} and CUDA {versions['cuda']}.",
             f"--extra-index-url https://download.pytorch.org/whl/{cuda}"]
    lines += [f"{name.replace('_', '-')}=={version.partition('+')[0]}" for name, version in versions.items()
              if name not in ("python", "cuda")]
    if "attention:flash3_attention" in log and "flash_attn_3" not in versions:
        lines.append("flash-attn-3  # ran from a copy that does not tell its version")
    return "\n".join(lines) + "\n"


def command(result: dict) -> str:
    """How to start such a run: the settings that are not the script's defaults, and as many processes."""
    settings = {"seed": result["seed"]} | {k: v for k, v in result["settings"].items() if k not in OWN_SETTINGS}
    shown = {name: int(value) if isinstance(value, bool) else value for name, value in settings.items()}
    variables = " ".join(f"{name.upper()}={shlex.quote(str(value))}" for name, value in shown.items())
    line = f"{variables} torchrun --standalone --nproc_per_node={result['hardware'].split()[0]} train_gpt.py"
    return " \\\n      ".join(textwrap.wrap(line, 110, break_long_words=False, break_on_hyphens=False))


def readme(name: str, made: dict, result: dict) -> str:
    """README.md of the folder."""
    spread = f" (mean of {len(made['seeds'])} seeds, standard deviation {made['val_bpb_std'] or 0:.5f})"
    texts = dict(
        name=made["name"] or name, score=f"{made['val_bpb']:.5f}", loss=f"{made['val_loss']:.5f}", table=table(made),
        spread=" (one seed)" if made["val_bpb_std"] is None else spread,
        verdict="" if made["track"] == "10min_16mb" else "**Not a record run**: the end of this file says why.",
        tests="".join(f"{line}.\n\n" for line in verdicts(made)), command=command(result),
        vocab=result["settings"].get("vocab_size", 8192), caveats="; ".join(made["caveats"]) or "none",
        holds="\n".join(f"- {'yes' if value else '**no**'}: {rule}" for rule, value in made["compliance"].items()))
    return README.format(**{**made, **texts})


def make(name: str, runs: list[Run], out: Path, args: argparse.Namespace) -> tuple[Path, dict]:
    """Write out/name, aside and then renamed; returns it and its submission.json."""
    if not name or Path(name).name != name or name.startswith("."):
        raise Refused(f"{name!r} is no name for a folder")
    target = out / name
    if target.exists():
        raise Refused(f"{target} is there already: remove it or take another name")
    packed, source = scripts(runs)
    logs = {f"train_seed{run.result['seed']}.log": read(run.log) for run in runs}
    facts = {**about(args, ROOT / "submission.json", runs[0].result["val_sha256"]), "name": args.title or name}
    made = submission(runs, list(logs), facts, significance(runs, args.baseline, args.baseline_loss))
    files = {"train_gpt.py": packed, "train_gpt_readable.py": source, "README.md": readme(name, made, runs[0].result),
             "requirements.txt": requirements(made["versions"], runs[0].text), "submission.json": as_json(made), **logs}
    out.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
    try:
        for file, content in files.items():
            (part / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        part.chmod(0o755)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target, made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the folder, DATE_NAME by custom")
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("records"), help="folder to put it in (records)")
    args = parser.parse_args(argv)
    try:
        target, made = make(args.name, load(args.log), args.out, args)
    except (Refused, OSError) as error:
        print(f"error: {said(error)}", file=sys.stderr)
        return 2
    for file in sorted(target.iterdir()):
        print(f"{file.stat().st_size:>10,} {file}")
    for line in signed(args, made):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

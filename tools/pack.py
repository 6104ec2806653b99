#!/usr/bin/env python3
"""Write train_gpt.py as it is shipped and counted: minified, compressed, self-extracting. No GPU, no data.

    python tools/pack.py -o train_gpt_packed.py
    python tools/pack.py --check FILE     # exit status 1 if FILE is not what train_gpt.py packs to

The bytes depend on the versions of Python and python-minifier, so a submission ships those that its run left.
"""
import argparse
import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path

import command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with command.imports():
    import train_gpt as tg


def described(data: bytes) -> str:
    return f"{len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("train_gpt_packed.py"),
                        help="file to write (train_gpt_packed.py)")
    parser.add_argument("--check", type=Path, metavar="FILE",
                        help="write nothing; say whether FILE is the packed script")
    args = parser.parse_args(argv)
    try:
        given, packed = tg.read_file(args.check) if args.check else b"", tg.pack_script()
        if not args.check:
            tg.write_file(args.out, packed)
    except tg.UserError as error:
        return command.report(error)
    print(f"train_gpt.py: {described(tg.read_file(Path(tg.__file__)))}")
    print(f"packed: {described(packed)}")
    if not args.check:
        print(args.out)
    elif given == packed:
        print(f"{args.check} is what train_gpt.py packs to")
    else:
        print(f"{args.check} is not what train_gpt.py packs to with Python {platform.python_version()} and "
              f"python-minifier {importlib.metadata.version('python-minifier')}: {described(given)}")
    return int(bool(args.check) and given != packed)


if __name__ == "__main__":
    command.run(main)

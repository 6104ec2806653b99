#!/usr/bin/env python3
"""Check a finished run by the rules of the game, from outside: its script is a program that scores documents.

    DATA_DIR=... python tools/audit.py runs/x                       # with the train_gpt.py above tools/
    DATA_DIR=... python tools/audit.py runs/x --script FILE         # with what was shipped, or any copy of it
    DATA_DIR=... python tools/audit.py runs/x --skip all            # without scoring all documents again
    DATA_DIR=... python tools/audit.py runs/x --write runs/x/audit.json   # the verdicts, for submission.py

The script is started six times, each time in a folder of its own that nothing outlasts, and scores what lies
there: the whole set (all), whose sum is the headline; then some documents, among them the longest and those
with the lowest losses, as they are (unaltered), in reverse order (reversed), every second one with another
end (tails), cut, continued or absent (lengths), half of them with all that follows replaced (rest). What it
must not know must not move a loss. A script that is not this repository's is compared with it, too, on the
whole set (ours): it may do otherwise, but that is said. Shards, tokenizer and artifact are read, targets and
bytes counted here; no code of the script is imported.

Losses that must be equal differ by rounding: on a CPU by less than EXACT, root mean square. On a GPU other
neighbours in a batch are another rounding, and learning amplifies it: there the reverse order shows how much,
which may not pass COARSE; elsewhere losses may spread 4 times as much, but not drift. What was not checked is
no pass. Exit status: 0 if no rule fails, 1 if one does, 2 after an error.
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, Callable, NamedTuple

import command
import confined

with command.imports():
    import brotli
    import numpy as np
    from altered import (
        MOST_DEPTH,
        Alterations,
        AuditError,
        Case,
        Data,
        choose,
        hiding_places,
        read,
        sidecar_of,
        write_shard,
    )
from finished_runs import AUDITED_VALUES, CAP_BYTES, CLOCK_SECONDS, once_each, sha256

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
EXACT, FAR = 1e-5, 1e-3  # nats between equal losses on a CPU: root mean square, largest
COARSE, DRIFT, MOST_DRIFT = 0.04, 1e-4, 1e-3  # nats on a GPU: root mean square, mean if exact, if noisy
MOST_SURPLUS = 5e-3  # of the sum of all p on a GPU, in the mean over the tried places
LEAST_CHUNK = 8  # targets, by TTT_CHUNK_SIZE
MOST_RATIO = 10  # of p to the chance of a random token
HEADLINE = 1e-4  # bits per byte between two scores of an artifact, if a GPU made one
RULES = ("origin", "clocks", "all documents", "raw text", "size", "caveats", "every target once", "headline",
         "causal", "score before update", "documents independent", "full distribution", "no drift",
         "confined", "as this script")
RESCORES = "ours", "all", "unaltered", "reversed", "tails", "lengths", "rest"
RECORD = dict(vocab_size=8192, ttt_enabled=True, ttt_chunk_size=24, ttt_chunk_growth=1 / 64,
              ttt_eval_seq_len=3072, ttt_batch_size=64, val_doc_fraction=1.0, data_dir="./data")
RANGES = dict(vocab_size=(2, 1 << 16), ttt_chunk_size=(1, 1 << 14), ttt_chunk_growth=(-1, 100),
              ttt_eval_seq_len=(1, 1 << 20), ttt_batch_size=(1, 1 << 12), val_doc_fraction=(1e-9, 1))
MOST_BYTES = 1 << 26  # of what a script wrote, beside its losses
FIELDS = {float: "val_loss val_bpb", int: "unadapted_tokens code_bytes total_bytes", list: "caveats",  # in
          dict: "settings phases clocks", str: "hardware code_sha256 packed_sha256 val_sha256"}  # result.json
OF_A_RUN = ("preset run_id artifact_dir data_dir eval_only_path save_scores attention val_doc_fraction "
            "train_log_every val_loss_every eval_max_seconds").split()  # settings that no artifact has
KEPT_VARIABLES = ("CC CXX OMP_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_HOME CUDA_PATH "
                  "NCCL_P2P_DISABLE NCCL_SHM_DISABLE NCCL_NVLS_ENABLE NVSHMEM_DISABLE_NVLS "
                  "TORCH_SYMM_MEM_DISABLE_MULTICAST").split()
LONGEST_VALUE = 100  # characters of such a variable


def say(text: Any):
    """Print in one line; an audit goes on, and writes its file, when the console is gone or full."""
    try:
        command.say(command.one_line(text))
    except OSError as error:
        command.report(error)
        command.silence()


def number(kind: type, low: float, high: float = 1e8) -> Callable[[str], Any]:
    """A type of arguments: numbers between two limits."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:g} to {high:g}")
        return value

    return parse


class Incomplete(Exception):
    """The script gave other losses than one for each target, so that there is nothing to compare."""


class Verdict(NamedTuple):
    rule: str
    passed: bool | None  # None: not checked
    figures: str

    @property
    def word(self) -> str:
        return {True: "pass", False: "FAIL", None: "NOT CHECKED"}[self.passed]

    def __str__(self) -> str:
        return f"{self.word:<13}{self.rule:<23}{self.figures}"


class Moved(NamedTuple):
    """How far losses lie from what they were."""
    targets: int
    largest: float
    rms: float
    mean: float
    error: float  # standard error of the mean, over documents or, if that is larger, over targets

    @classmethod
    def of(cls, pairs: list[tuple[np.ndarray, np.ndarray]]) -> "Moved":
        """Of (losses before, losses after) by document."""
        by_document = [after - before for before, after in pairs if len(before)]
        if not by_document:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        every = np.concatenate(by_document)
        mean, rms = every.mean(), math.sqrt((every**2).mean())
        over_documents = math.sqrt(sum((d - mean).sum() ** 2 for d in by_document)) / len(every)  # 0 for one
        over_targets = every.std() / math.sqrt(len(every))
        return cls(len(every), abs(every).max(), rms, mean, max(over_documents, over_targets))

    def little(self, noise: float | None) -> bool | None:
        """Whether only rounding moved them; `noise` is what it may be, root mean square, on a GPU."""
        if not self.targets:
            return None
        if noise is None:
            return bool(self.rms <= EXACT and self.largest <= FAR)
        return bool(self.rms <= max(EXACT, noise) and abs(self.mean) <= self.shift())

    def shift(self) -> float:
        """How far the mean may lie from 0 on a GPU: there is a limit to what a script's own noise excuses."""
        return max(DRIFT, min(4 * self.error, max(MOST_DRIFT, self.of_few())))

    def of_few(self) -> float:
        """How uncertain the mean of so many targets is, with as much noise as a GPU may have."""
        return 4 * COARSE / math.sqrt(max(1, self.targets))

    def __str__(self) -> str:
        if not self.targets:
            return "nothing to compare, more --documents are needed"
        if not self.largest:
            return f"{self.targets} losses equal"
        return (f"{self.targets} losses moved by at most {self.largest:.1e}, rms {self.rms:.1e}, "
                f"mean {self.mean:+.1e} +- {self.error:.0e}")


def at_most_1(ratios: np.ndarray) -> tuple[bool, str]:
    """Whether p / chance of drawn tokens is 1 on average, or less, as it is if all p add up to 1.

    Clipping can only lower the mean, and bounds the error, which a script could widen by a few large ratios.
    """
    clipped = ratios.clip(max=MOST_RATIO)
    mean, error = clipped.mean(), clipped.std() / math.sqrt(len(clipped))
    return (bool(mean <= 1 + max(1e-3, 4 * error)),
            f"p / chance {mean:.3f} +- {error:.3f} for {len(ratios)}, 1 at most")


# ------------------------------------------------------------------------------------------------------------
# A finished run, and its script as a program


class FinishedRun(NamedTuple):
    """What a run left."""
    folder: Path
    artifact: bytes
    result: dict[str, Any]
    settings: dict[str, Any]
    phases: dict[str, float]
    clocks: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        artifact = read(folder / "final_model.int6.ptz")
        file = folder / "result.json"
        data = read(file)
        try:
            result = dict(json.loads(data, object_pairs_hook=once_each))
            for kind, names in FIELDS.items():
                for name in names.split():
                    if not isinstance(result[name], kind):
                        raise ValueError(f"{name} is {result[name]!r:.50}")
            phases = {name: float(seconds) for name, seconds in result["phases"].items()}
            clocks = {name: float(result["clocks"][name]["seconds"]) for name in ("training", "scoring")}
            for name, seconds in phases.items():
                if not 0 <= seconds <= 1e7:
                    raise ValueError(f"{name:.50} took {seconds} s")
        except Exception as error:  # whatever foreign bytes lead to
            raise AuditError(f"{file} is not what a finished run leaves: {error!r:.200}") from error
        settings = {**RECORD, **result["settings"], **saved_settings(artifact)}
        for name, value in RECORD.items():
            low, high = RANGES.get(name, (None, None))
            if not isinstance(settings[name], type(value)) or low and not low <= settings[name] <= high:
                raise AuditError(f"{file} and its artifact: {name} is {settings[name]!r:.50}")
        return cls(folder, artifact, result, settings, phases, clocks)


def saved_settings(artifact: bytes) -> dict[str, Any]:
    """The settings in an artifact's header, by docs/artifact.md; none if it is of another format."""
    with contextlib.suppress(Exception):  # whatever foreign bytes lead to
        if artifact.startswith(b"PGOLF"):
            size = int.from_bytes(artifact[24:28], "little")
            head = brotli.Decompressor().process(artifact[28 : 28 + size], output_buffer_limit=MOST_BYTES)
            return dict(json.loads(head[4 : 4 + int.from_bytes(head[:4], "little")])["settings"])
    return {}


def environment_in(place: Path) -> dict[str, str]:
    """The variables of a re-score: what the machine needs, and folders of its own.

    None may hold a text that helps to score, so the search paths are of folders that exist.
    """
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    for name, value in kept.items():
        if len(value) > LONGEST_VALUE:
            raise AuditError(f"{name} has {len(value)} characters, of which a script may see {LONGEST_VALUE}")
    paths = {name: ":".join(confined.search_path(name)) for name in confined.SEARCH_PATHS}
    kept |= {name: path for name, path in paths.items() if path} | {"LC_ALL": "C.UTF-8"}
    folders = dict(HOME="home", TMPDIR="tmp", DATA_DIR="data", EVAL_ONLY_PATH="model/final_model.int6.ptz",
                   ARTIFACT_DIR="run", SAVE_SCORES="scores.npz")
    kept |= {name: str(place / folder) for name, folder in folders.items()}
    return {**kept, "EVAL_MAX_SECONDS": "0"}


class Rescore(NamedTuple):
    """What the script left when it had scored a validation set."""
    losses: np.ndarray  # that it saved, fp64
    result: dict[str, Any]
    confined: bool  # whether it ran in namespaces of its own


class Program:
    """A script that scores validation sets with a run's artifact, each time in a place of its own."""

    def __init__(self, script: Path, source: bytes, run: FinishedRun, data: Data, timeout: float,
                 args: argparse.Namespace):
        self.script, self.source, self.confine = script, source, not args.unconfined
        self.run, self.data, self.timeout = run, data, timeout
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
        self.command = [sys.executable, *(torchrun if args.processes > 1 else []), script.name]

    def score(self, name: str, tokens: np.ndarray | None) -> Rescore:
        """Have a stream of tokens scored, or the run's validation set as it was."""
        with confined.temporary_folder() as place:
            self.furnish(place, tokens)
            environment = environment_in(place)
            fraction = self.run.settings["val_doc_fraction"]
            if tokens is None and fraction < 1:
                environment["VAL_DOC_FRACTION"] = str(fraction)
            ended = confined.run(self.command, environment, place, self.timeout, self.confine)
            if ended.status is None:
                raise AuditError(f"{self.script} had not scored {name} after {self.timeout:.0f} s, and was "
                                 "ended; --timeout gives it more")
            targets = len(self.data.tokens if tokens is None else tokens) - 1
            losses = None
            with contextlib.suppress(Exception):  # whatever foreign bytes lead to: they are no scores
                result = dict(json.loads(written(place, "run/result.json")))
                losses = saved_losses(written(place, "scores.npz", 64 * targets), targets)
            if ended.status or losses is None:
                status = ended.status or "0, without scores"
                raise AuditError(f"{self.script} ended with status {status} when it was to score {name}: "
                                 f"{ended.last_words or 'it said nothing'}")
        return Rescore(losses, result, ended.confined)

    def furnish(self, place: Path, tokens: np.ndarray | None):
        """Write all that the script is given into a place."""
        root = self.data.tokenizer.parents[1]
        shards = place / "data" / self.data.shards[0].parent.relative_to(root)
        for folder in (place / "home", place / "tmp", place / "model", place / "data/tokenizers", shards):
            folder.mkdir(parents=True)
        (place / self.script.name).write_bytes(self.source)
        (place / "model/final_model.int6.ptz").write_bytes(self.run.artifact)
        shutil.copyfile(self.data.tokenizer, place / "data/tokenizers" / self.data.tokenizer.name)
        pieces = self.data.pieces
        if tokens is None:
            sidecars = map(sidecar_of, self.data.shards) if pieces.needs_sidecars else []
            for path in (*self.data.shards, *sidecars):
                shutil.copyfile(path, shards / path.name)
        else:
            shard = shards / "fineweb_val_000000.bin"
            write_shard(shard, tokens)
            if pieces.needs_sidecars:  # no raw text belongs to altered documents: what the table says
                write_shard(sidecar_of(shard), np.append(0, pieces.target_bytes(tokens)))


def written(place: Path, name: str, most: int = 0) -> bytes:
    """What a script wrote as a file, and not as a link, in its place; OSError if it is none, or too large."""
    if (place / name).resolve() != place / name:
        raise OSError(f"{name} is a link")
    return confined.read_regular(place / name, most + MOST_BYTES)


def saved_losses(data: bytes, targets: int) -> np.ndarray:
    """The losses of scores.npz in fp64; ValueError, among others, if it is none for about so many targets."""
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        if sum(member.file_size for member in members.infolist()) > 64 * targets + MOST_BYTES:
            raise ValueError("it would fill the memory")
    with np.load(io.BytesIO(data)) as scores:
        losses = scores["nll"]
    if losses.dtype.kind != "f":
        raise ValueError(f"losses of the kind {losses.dtype}")
    return losses.astype(np.float64).ravel()


def seconds_expected(run: FinishedRun, share: float, processes: int) -> float:
    """Of scoring a share of the run's targets, by its phases: those of every start, and those of scoring."""
    starting = ("imports", "join", "setup", "warm-up", "open validation", "open artifact",
                "prepare adaptation", "report")  # what warm-up has compiled a re-score compiles anew
    scoring = "count bytes", "score quantized", "count n-grams", "adapt"
    ranks = int(re.match(r"[0-9]{0,4}", run.result["hardware"])[0] or 1)
    once, shared = (sum(run.phases.get(name, 0) for name in names) for names in (starting, scoring))
    return once + shared * share * ranks / processes


def is_ours(source: bytes) -> bool:
    """Whether a script is this repository's train_gpt.py, or what that packs to."""
    if source == read(SCRIPT) or b"b85decode" not in source[:500]:
        return source == read(SCRIPT)
    with tempfile.NamedTemporaryFile(suffix=".py") as file:
        file.write(source)
        file.flush()
        check = [sys.executable, ROOT / "tools/pack.py", "--check", file.name]
        return subprocess.run(check, capture_output=True).returncode == 0


def on_gpu() -> bool:
    """Whether a script will find a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return visible not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))


# ------------------------------------------------------------------------------------------------------------
# Verdicts


def differing(said: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """The names of facts of which something else is said."""
    def same(value: Any, fact: Any) -> bool:
        if isinstance(fact, float):
            return isinstance(value, float) and math.isclose(value, fact, rel_tol=1e-6)
        return value == fact

    return [name for name, fact in facts.items() if not same(said.get(name), fact)]


class Audit:
    """The verdicts on a run. A method that is named like a re-score judges it."""

    def __init__(self, run: FinishedRun, data: Data, program: Program, sets: Alterations, gpu: bool):
        self.run, self.data, self.program, self.sets, self.gpu = run, data, program, sets, gpu
        self.whole: list[np.ndarray] = []  # losses of all documents; none if they are not scored
        self.others: np.ndarray | None = None  # the same by this repository's script
        self.base: list[np.ndarray] = []  # losses of the chosen documents, unaltered
        self.repeated: list[tuple[np.ndarray, np.ndarray]] = []  # these, and the losses of a repetition
        self.pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # of all comparisons, by document
        self.verdicts, self.each_confined = [], []

    def add(self, rule: str, passed: bool | None, figures: str):
        self.verdicts.append(Verdict(rule, passed, figures))
        say(self.verdicts[-1])

    def by_rule(self) -> dict[str, str]:
        """The worst word on every rule."""
        worst = {}
        for rule in RULES:
            words = [verdict.word for verdict in self.verdicts if verdict.rule == rule] or ["NOT CHECKED"]
            worst[rule] = min(words, key=("FAIL", "NOT CHECKED", "pass").index)
        return worst

    # What the run says of itself

    def statements(self, ours: bool):
        """Rules that result.json speaks of. `ours`: the script is this repository's."""
        said, settings = self.run.result, self.run.settings
        names = {sha256(self.program.source), sha256(read(SCRIPT))}
        trusted = True if ours and names & {said["code_sha256"], said["packed_sha256"]} else None
        self.add("origin", trusted,
                 "result.json names this script, which is this repository's" if trusted else
                 "how the artifact came about, and by which data, cannot be seen from it")
        late = [clock for clock, seconds in self.run.clocks.items() if not 0 <= seconds <= CLOCK_SECONDS]
        unadapted = said["unadapted_tokens"] if settings["ttt_enabled"] else 0
        self.add("clocks", False if late or unadapted else trusted,
                 ", ".join(f"{clock} {seconds:g} s" for clock, seconds in self.run.clocks.items())
                 + f", {unadapted} targets unadapted, by result.json")
        fraction = settings["val_doc_fraction"]
        self.add("all documents", fraction == 1 and said.get("documents") == self.data.available,
                 f"{said.get('documents')} of {self.data.available}, VAL_DOC_FRACTION={fraction:g}")
        self.raw_text()
        due = {"training took": "training" in late, "scoring took": "scoring" in late,
               f"{unadapted} targets have their plain score": unadapted, "VAL_DOC_FRACTION": fraction < 1,
               f"{said['total_bytes']} bytes of": said["total_bytes"] > CAP_BYTES}
        if ours or "tokenizer_sha256" in said:  # older scripts did not state these
            due |= {"unknown validation set": not self.data.known(),
                    "not on 8 GPUs": not said["hardware"].startswith("8 x NVIDIA"),
                    "not trained by this run": settings.get("eval_only_path"),
                    "preset": settings.get("preset"), "VAL_LOSS_EVERY": settings.get("val_loss_every"),
                    "recompilations": said.get("recompilations")}
        stated = "; ".join(map(str, said["caveats"])) or "none"
        missing = [text for text, holds in due.items()
                   if holds and not any(str(caveat).startswith(text) for caveat in said["caveats"])]
        self.add("caveats", not missing, stated + "".join(f"; not stated: {text}" for text in missing))

    def raw_text(self):
        """Whether the bytes that are counted are those of the text that the tokens decode to."""
        pieces, documents = self.data.pieces, len(self.data.starts)
        if pieces.exact:
            wrong = self.data.miscounted()
            self.add("raw text", not wrong, f"{documents - wrong} of {documents} documents decode to as many "
                                            "bytes as are counted")
        else:
            counted = "by side-cars" if pieces.needs_sidecars else "of the text as it left it"
            self.add("raw text", None, f"the tokenizer changes texts: bytes are counted {counted}")

    def size(self, ours: bool):
        """Bytes and hashes of code and model, as files. What is audited has to be what is counted."""
        said, model, packed = self.run.result, self.run.artifact, self.run.folder / "train_gpt_packed.py"
        facts = {"model_bytes": len(model), "model_sha256": sha256(model)}
        total = said["code_bytes"] + len(model)
        if packed.is_file():
            code = read(packed)
            total = len(code) + len(model)
            facts |= {"code_bytes": len(code), "packed_sha256": sha256(code), "total_bytes": total}
        wrong = differing(said, facts)
        counted = packed.is_file() and (self.program.source == code or ours and is_ours(code))
        passed = True if counted else None
        self.add("size", False if wrong or total > CAP_BYTES else passed,
                 f"code {total - len(model)} + model {len(model)} = {total} bytes of {CAP_BYTES}"
                 + ("" if counted else f"; {packed} is not the script of this audit, as it packs to here")
                 + (f"; result.json differs in {' '.join(wrong)}" if wrong else ""))

    def headline(self):
        """Whether result.json names these documents, and its loss and bits per byte belong together."""
        said, data = self.run.result, self.data
        targets = len(data.tokens) - 1
        counted = int(data.token_bytes.sum())
        tokenizer = read(data.tokenizer)
        facts = dict(documents=len(data.starts), tokens=targets, bytes=counted, val_sha256=data.sha256,
                     tokenizer_sha256=sha256(tokenizer),
                     val_bpb=said["val_loss"] * targets / (math.log(2) * counted))
        wrong = differing(said, facts)
        self.add("headline", not wrong,
                 f"{len(data.starts)} documents, {targets} targets, {counted} bytes: val_loss "
                 f"{said['val_loss']:.6f} is val_bpb {facts['val_bpb']:.6f}"
                 + (f"; result.json differs in {' '.join(wrong)}" if wrong else ""))
        if hidden := hiding_places(tokenizer):
            self.add("confined", None, f"the tokenizer holds {', '.join(hidden)}: data could hide there")

    # What the script does with documents that it is given

    def noise(self, targets: int | None = None) -> float | None:
        """How far losses may move on a GPU, root mean square; or those of so many first targets."""
        if not self.gpu:
            return None
        moved = Moved.of([(before[:targets], after[:targets]) for before, after in self.repeated])
        return 4 * min(moved.rms, COARSE) if moved.targets else COARSE

    def score(self, name: str, tokens: np.ndarray, starts: np.ndarray, digest: str) -> list[np.ndarray]:
        """The losses of a re-score by document; the script must have reported them as they are."""
        began = time.perf_counter()
        losses, said, closed = self.program.score(name, None if name == "all" else tokens)
        if name == "all":
            self.compare_statements(said)
        targets = len(tokens) - 1
        say(f"scored {name}: {len(starts)} documents, {targets} targets, {time.perf_counter() - began:.1f} s")
        good = int((np.isfinite(losses) & (losses > -EXACT)).sum())
        self.add("every target once", good == len(losses) == targets,
                 f"{name}: {targets} targets, {len(losses)} losses, {good} of them possible")
        if len(losses) != targets:
            raise Incomplete
        token_bytes = self.data.token_bytes if name == "all" else self.data.pieces.target_bytes(tokens)
        counted = int(token_bytes.sum())
        loss, bpb = float(losses.sum() / targets), float(losses.sum() / (math.log(2) * counted))
        facts = dict(documents=len(starts), tokens=targets, bytes=counted, val_loss=loss, val_bpb=bpb,
                     val_sha256=digest, model_sha256=sha256(self.run.artifact))
        wrong = differing(said, facts)
        self.add("headline", not wrong, f"{name}: its losses are {loss:.6f} a target, {bpb:.6f} bits a byte"
                 + (f"; what the script reports differs in {' '.join(wrong)}" if wrong else ""))
        self.each_confined.append(closed)
        return np.split(losses, starts[1:])

    def compare_statements(self, said: dict[str, Any]):
        """Whether the artifact has the settings that result.json says, and its scoring clock is likely."""
        settings = said.get("settings")
        given = settings if isinstance(settings, dict) else {}
        ours, theirs = ({name: value for name, value in values.items() if name not in OF_A_RUN}
                        for values in (given, self.run.result["settings"]))
        wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if wrong:
            self.add("origin", False, f"result.json and the artifact differ in settings: {' '.join(wrong)}")
        if said.get("hardware") == self.run.result["hardware"]:
            seconds, then = math.nan, self.run.clocks["scoring"]
            with contextlib.suppress(Exception):  # whatever foreign values lead to
                seconds = float(said["clocks"]["scoring"]["seconds"])
            if math.isnan(seconds):
                self.add("clocks", None, "it does not say how long scoring took")
            elif seconds > 2 * then + 5:
                self.add("clocks", None, f"scoring takes {seconds:.1f} s on like hardware, not {then:.1f}")

    def score_cases(self, name: str, cases: list[Case]) -> list[tuple[Case, np.ndarray]]:
        tokens = np.concatenate([case.tokens for case in cases])
        lengths = np.array([len(case.tokens) for case in cases])
        digest = sha256(tokens.astype("<u2").tobytes())
        return list(zip(cases, self.score(name, tokens, np.cumsum(lengths) - lengths, digest)))

    def compare(self, rule: str, what: str, scored: list[tuple[Case, np.ndarray]],
                *changes: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Whether documents with some changes, or with none, have the losses they had up to there."""
        pairs = []
        for case, losses in scored:
            if case.number >= 0 and case.change in (changes or [""]):
                before = self.base[case.number][: case.kept]
                count = min(len(before), len(losses))  # the last document of a set has no BOS after it
                pairs.append((before[:count], losses[:count]))
                self.pairs.setdefault(case.number, []).append(pairs[-1])
        moved = Moved.of(pairs)
        self.add(rule, moved.little(self.noise()), f"{what}: {moved}")
        return pairs

    def all(self, count: int, seed: int):
        """The whole set, whose losses add up to the headline; by these, so many documents are chosen."""
        data, said = self.data, self.run.result
        self.whole = self.score("all", data.tokens, data.starts, data.sha256)
        bpb = np.concatenate(self.whole).sum() / (math.log(2) * data.token_bytes.sum())
        limit = HEADLINE if self.gpu or "CPU" not in said["hardware"] else EXACT
        self.add("headline", bool(abs(bpb - said["val_bpb"]) <= limit),
                 f"by all documents val_bpb is {bpb:.6f}, by result.json {said['val_bpb']:.6f}, which may "
                 f"differ by {limit:.0e}")
        self.sets = Alterations(data, choose(data, self.whole, count, seed), self.run.settings, seed)

    def unaltered(self):
        scored = self.score_cases("unaltered", self.sets.unaltered())
        self.base = [losses for _, losses in scored]
        if self.others is not None:
            self.as_ours()
        if len(self.sets.numbers) < len(self.whole):
            among_all = [self.whole[i] for i in self.sets.numbers]
            self.compare("documents independent", "among all documents",
                         [(case, losses) for (case, _), losses in zip(scored, among_all)])

    def ours(self, program: Program, everything: bool):
        """What this repository's script makes of the documents, before a stranger has run."""
        tokens = None if everything else np.concatenate(self.sets.documents)
        try:
            self.others = program.score("ours", tokens).losses
        except AuditError as error:
            self.add("as this script", None, "this repository's script cannot score the artifact: ALL OF THE "
                     f"OTHER HAS TO BE READ ({error})")

    def as_ours(self):
        """Whether the script scores as this repository's does. It may honestly do otherwise."""
        theirs = self.whole or self.base
        others = np.split(self.others, np.cumsum(list(map(len, theirs)))[:-1])
        moved = Moved.of(list(zip(others, theirs)))
        alike = moved.little(4 * COARSE if self.gpu else None)
        if self.gpu:  # what widens its own noise gains no room by that
            alike = alike and abs(moved.mean) <= max(DRIFT, moved.of_few())
        doubt = "" if self.whole else "; other documents were not compared"
        doubt = doubt if alike else "; WHAT IT DOES OTHERWISE HAS TO BE READ"
        self.add("as this script", None if doubt else True,
                 f"beside this repository's train_gpt.py, {len(theirs)} documents: {moved}{doubt}")

    def reversed(self):
        scored = self.score_cases("reversed", self.sets.reversed())
        self.repeated = self.compare("documents independent", "order reversed", scored)

    def tails(self):
        scored = self.score_cases("tails", self.sets.tails())
        ends = [0, *self.sets.ends.tolist()]
        in_chunk, after = [], []
        tails = "tail", "tail anywhere"
        for case, losses in scored:
            if case.change in tails:
                before, count = self.base[case.number], min(len(losses), len(self.base[case.number]))
                start = max(end for end in ends if end <= case.kept)
                if case.change == "tail":
                    in_chunk.append((before[start : case.kept], losses[start : case.kept]))
                after.append((before[case.kept : count], losses[case.kept : count]))
        seen, chunk = Moved.of(after), Moved.of(in_chunk)
        noticed = seen.largest > FAR and seen.rms > (self.noise() or EXACT)
        self.add("causal", noticed if seen.targets else None, f"altered tokens: {seen}")
        self.compare("causal", "before altered tokens", scored, *tails)
        passed, figures = chunk.little(self.noise()), str(chunk)
        size = self.run.settings["ttt_chunk_size"]
        if size < LEAST_CHUNK and passed is not False:  # the script may learn from longer ones
            passed, figures = None, f"TTT_CHUNK_SIZE={size} is too small to see it, {LEAST_CHUNK} at least"
        self.add("score before update", passed, f"before altered tokens, in their chunk: {figures}")
        self.compare("documents independent", "others altered, and others before", scored)

    def lengths(self):
        scored = self.score_cases("lengths", self.sets.lengths())
        self.compare("causal", "before a cut", scored, "cut")
        self.compare("causal", "continued", scored, "continued")
        self.compare("documents independent", "others cut, continued or absent", scored)

    def rest(self, depths: list[int]):
        beginnings = self.sets.beginnings(depths, self.base)
        scored = self.score_cases("rest", self.sets.rest(beginnings))
        self.compare("causal", "all later documents replaced", scored)
        self.compare("causal", "before random ends", scored, "random end")
        for change in "random", "repeating", "random end":
            drawn = [(losses[: len(case.tokens) - 1], case.chances[1:])
                     for case, losses in scored if case.change == change]
            losses, chances = map(np.concatenate, zip(*drawn))
            random = ~np.isnan(chances)  # the others are of a document
            passed, figures = at_most_1(np.exp(-losses[random]) / chances[random])
            self.add("full distribution", passed, f"{change} tokens: {figures}")
        base = [*self.base, next(losses for case, losses in scored if case is self.sets.most_repeating)]
        sums = []
        for number, (document, length) in enumerate(beginnings):
            tries = {self.token(case.tokens, length): losses[:length]
                     for case, losses in scored if case.beginning == number}
            before = base[document][:length]
            sums.append(self.every_next_token(self.sets.bases[document], before, tries))
        self.surplus(sums)

    def surplus(self, sums: list[float]):
        """Judge the sums of p of all places together: on a GPU a script's own noise widens each limit."""
        mean = float(np.mean(sums)) - 1
        if self.gpu:
            self.add("full distribution", bool(mean <= MOST_SURPLUS),
                     f"in the mean over {len(sums)} places the sum of p is {1 + mean:.6f}, "
                     f"1 + {MOST_SURPLUS:.0e} at most")

    def token(self, document: np.ndarray, number: int) -> int:
        """A token of a document, which is followed by a BOS."""
        return int(np.append(document, self.data.pieces.bos)[number])

    def every_next_token(self, document: np.ndarray, before: np.ndarray,
                         tries: dict[int, np.ndarray]) -> float:
        """Judge a beginning of a document: `tries` are its losses by the token that was put after it.

        The probabilities of these tokens, whose sum this returns, add up to 1. The losses of the beginning,
        in the mean over all tries, and that of the true next token are what they were `before`, in the whole
        document.
        """
        length = len(before)
        p = np.exp([-losses[-1] for losses in tries.values()])
        limit = 1e-4
        if self.gpu:
            limit = 1e-3 + self.noise(length) * math.sqrt((p**2).sum())  # each p has its own noise
        self.add("full distribution", bool(-0.01 <= p.sum() - 1 <= limit),  # the unknown piece is not tried
                 f"each of {len(p)} tokens after {length}: sum of p is {p.sum():.6f}, "
                 f"0.99 to 1 + {limit:.0e} allowed")
        losses = np.mean(list(tries.values()), axis=0)
        losses[-1] = tries[self.token(document, length)][-1]
        moved = Moved.of([(before, losses)])
        self.add("causal", moved.little(self.noise(length)),
                 f"before the token after {length}, whatever it is, and at the true one: {moved}")
        return float(p.sum())

    def all_comparisons(self, readable: list[str]):
        """What all re-scores show. `readable`: what the script could read and must not, in words."""
        # All comparisons of a document share its first losses and their noise: a document is one sample.
        moved = Moved.of([tuple(map(np.concatenate, zip(*pairs))) for pairs in self.pairs.values()])
        limit = moved.shift() if self.gpu else EXACT
        self.add("no drift", bool(abs(moved.mean) <= limit) if moved.targets else None,
                 f"all comparisons together: {moved}")
        if not all(self.each_confined):
            obstacle = confined.obstacle() or "--unconfined"
            passed, why = None, f"it could read and write everywhere: {obstacle}"
        elif readable:
            passed, why = None, f"it could read {readable[0]}"
        else:
            passed, why = True, ("nothing but its own folder outlasted it, and it could read neither the "
                                 "true data nor the run's folder")
        self.add("confined", passed, why)


def write_verdicts(path: Path, audit: Audit):
    values = {name: audit.run.result[name] for name in AUDITED_VALUES}
    values |= {"model_sha256": sha256(audit.run.artifact), "script_sha256": sha256(audit.program.source),
               "rules": audit.by_rule(), "verdicts": list(map(str, audit.verdicts))}
    command.write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


def perform(args: argparse.Namespace) -> Audit:
    # 1) Read the run and its validation set; choose documents, and alter them.
    run = FinishedRun.read(args.run)
    given = Path(os.environ.get("DATA_DIR") or RECORD["data_dir"])  # whatever the run says
    data = Data.read(next((root / given for root in (Path.cwd(), ROOT) if (root / given).is_dir()), given),
                     run.settings)
    count = min(args.documents, len(data.starts))
    if count < 4:
        raise AuditError(f"{count} documents are too few to compare: 4 at least")
    seed = int.from_bytes(os.urandom(3), "little") if args.seed is None else args.seed
    sets = Alterations(data, choose(data, [], count, seed), run.settings, seed)
    # 2) Say what comes.
    source = read(args.script)
    gpu, ours = on_gpu(), is_ours(source)
    device = "GPU" if gpu else "CPU"
    say(f"{args.run} on a {device}: {count} of {len(data.starts)} documents, --seed {seed}")
    tokenizer = sha256(read(data.tokenizer))
    say(f"validation set {data.sha256}, tokenizer {tokenizer}: {data.shards[0].parent}, {data.tokenizer}")
    if run.result.get("tokenizer_sha256", tokenizer) != tokenizer:
        say(f"{data.tokenizer} is not the tokenizer that result.json names: is DATA_DIR={given} this run's?")
    if not ours:
        say(f"{args.script} IS NOT THIS REPOSITORY'S TRAIN_GPT.PY, PACKED OR NOT: HOW THE ARTIFACT CAME "
            "ABOUT IS NOT CHECKED.")
    depths = args.depth or [int(sets.rng.integers(2, MOST_DEPTH))]
    skipped = {*args.skip, "ours"} if ours else {*args.skip}
    targets = {"all": len(data.tokens), **sets.targets(depths)}
    if "all" not in skipped:
        targets["ours"] = targets["all"]
    expected = {name: seconds_expected(run, targets[name] / len(data.tokens), args.processes)
                for name in RESCORES if name not in skipped}
    say(f"about {sum(expected.values()):.0f} s, if this machine is as fast as the run's: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in expected.items()))
    # 3) Judge.
    timeout = args.timeout or max(900, 10 * max(expected.values()))
    program = Program(args.script, source, run, data, timeout, args)
    own = Program(SCRIPT, read(SCRIPT), run, data, timeout, args)
    audit = Audit(run, data, program, sets, gpu)
    audit.statements(ours)
    audit.size(ours)
    audit.headline()
    if "all" in skipped:
        audit.add("headline", None, "whether all documents have this score: they are not scored again")
    if ours:
        audit.add("as this script", True, "it is this repository's")
    arguments = {"all": [count, seed], "ours": [own, "all" not in skipped], "rest": [depths]}
    with contextlib.suppress(Incomplete):
        for name in [*expected]:
            began = time.perf_counter()
            getattr(audit, name)(*arguments.get(name, []))
            late = time.perf_counter() - began - expected.pop(name)
            if expected:
                more = sum(expected.values()) + max(0, late) * len(expected)  # a cold start comes each time
                say(f"about {more:.0f} s more")
        hidden = [data.tokenizer, *data.shards, run.folder, *([] if ours else [args.script])]
        audit.all_comparisons([*filter(None, map(confined.way_to, hidden))])
    return audit


def terminated(*signal_and_frame):
    """End by SIGTERM as by an exception, so that what the script started and left is removed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(143)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False)
    parser.add_argument("run", type=Path, help="folder of a run, with final_model.int6.ptz and result.json")
    parser.add_argument("--script", type=Path, default=SCRIPT,
                        help="the train_gpt.py, or copy of it, to score with")
    parser.add_argument("--documents", type=number(int, 1), default=64,
                        help="how many validation documents to alter (64)")
    parser.add_argument("--seed", type=number(int, 0, 2**63),
                        help="of choice and alterations (another each time)")
    optional = [name for name in RESCORES if name != "unaltered"]
    parser.add_argument("--skip", nargs="+", choices=optional, default=[], help="re-scores to leave out")
    parser.add_argument("--depth", type=number(int, 1), nargs="+", default=[], metavar="TOKENS",
                        help="try every token after so many, too (one random depth below 200)")
    parser.add_argument("--processes", type=number(int, 1, 1024), default=1,
                        help="GPUs to score on, by torchrun (1)")
    parser.add_argument("--timeout", type=number(float, 0.1),
                        help="seconds that a re-score may take (10 times what is expected, 900 at least)")
    parser.add_argument("--unconfined", action="store_true", help="let the script read and write everywhere")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the verdicts, as JSON")
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        return command.report(error)
    try:
        if args.write and args.write.is_symlink():  # a run's folder holds what somebody else put there
            raise AuditError(f"{args.write} is a link, which --write does not follow")
        if args.write and not args.write.parent.is_dir():
            raise AuditError(f"--write {args.write}: there is no such folder")
        audit = perform(args)
        if args.write:
            write_verdicts(args.write, audit)
    except MemoryError:
        return command.report("out of memory")
    except (AuditError, OSError) as error:
        return command.report(error)
    by_rule = audit.by_rule()
    for word in ("FAIL", "NOT CHECKED"):
        rules = [rule for rule in RULES if by_rule[rule] == word]
        say(f"{word}: {', '.join(rules) or 'none'}")
    words = [verdict.word for verdict in audit.verdicts]
    unchecked = [*by_rule.values()].count("NOT CHECKED")
    say(f"{words.count('pass')} checks passed, {words.count('FAIL')} failed; rules not checked: {unchecked}"
        + (", so this audit is not complete" if unchecked else ""))
    return int("FAIL" in words)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    command.run(main)

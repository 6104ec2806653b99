#!/usr/bin/env python3
"""What quantization costs a finished run, against the ancestor's recipe at its own and at equal bytes.

    python tools/bench_quant.py runs/x              # a folder with final_model.pt, made by train_gpt.py
    DATA_DIR=... python tools/bench_quant.py runs/x --code-bytes 33000

The ancestor's recipe: GPTQ, int6 matrices with the largest code at 12.85 standard deviations of their row,
int8 embedding at 20, fp16 scales, Brotli 11. Its artifact counts codes, scales and small tensors here,
nothing else. Scores are plain ones, of all validation documents in DATA_DIR; calibration reads its training
shards, as the run did. One GPU, or a CPU.
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with command.imports():
    import brotli
    import numpy as np
    import torch

    import train_gpt as tg


def say(*words, **options) -> None:
    print(*words, flush=True, **options)


class Clock:
    """Seconds since it was made, once the device has done all its work."""

    def __init__(self, ranks: tg.Ranks):
        self.ranks = ranks
        ranks.synchronize()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        self.ranks.synchronize()
        return time.perf_counter() - self.began


def round_as_ancestor(model: tg.GPT, sums: tg.Calibration, widen: float) -> list[bytes]:
    """Quantize the model in place by the old recipe, clips times `widen`; the streams of its artifact."""
    # 1) Group matrices by shape, columns by falling energy.
    groups = collections.defaultdict(list)
    for name, W in [("embed", model.embed), *model.named_matrices()]:
        layer, _, kind = name.rpartition(".")
        H = sums.hessians[f"{layer}.qkv" if kind in ("q", "k", "v") else name]
        W.masked_fill_(H.diagonal() == 0, 0)
        order = (H.diagonal() + (H.diagonal() == 0)).argsort(descending=True)
        U, _ = tg.gptq_factors(H[order][:, order])
        groups[W.shape, name == "embed"].append((W, order, U))
    # 2) Round each group at once.
    streams = []
    for (_, is_embed), group in groups.items():
        W, order, U = map(torch.stack, zip(*group))
        bits, clip = (8, 20.0) if is_embed else (6, 12.85)
        top = 2 ** (bits - 1) - 1
        scale = (widen * clip / top * W.std(dim=2)).clamp(min=1e-7).half()
        order = order[:, None].expand_as(W)
        codes = tg.gptq(W.gather(2, order) / scale.float()[:, :, None], U, top=top)
        codes = torch.empty_like(W).scatter_(2, order, codes)
        for (target, _, _), matrix_codes, row_scale in zip(group, codes, scale):
            target.copy_(matrix_codes * row_scale.float()[:, None])
            streams.append(matrix_codes.to(torch.int8).cpu().numpy().tobytes())
            streams.append(row_scale.cpu().numpy().tobytes())
    # 3) Small tensors stay fp16.
    return streams + [p.half().cpu().numpy().tobytes() for name, p in model.named_parameters()
                      if name in tg.Optimizers.SCALARS]


def compressed_bytes(streams: list[bytes]) -> int:
    compress = functools.partial(brotli.compress, quality=11, lgwin=24)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(map(len, pool.map(compress, streams)))


def entropy(counts: np.ndarray) -> float:
    """Bytes of codes in contexts (..., contexts, symbols) at best."""
    frequency = counts / counts.sum(-1, keepdims=True).clip(1)
    return -(counts[counts > 0] * np.log2(frequency[counts > 0])).sum() / 8


class Quantized(NamedTuple):
    """What one recipe gave."""
    total_bytes: int
    cost: float  # bits per byte above the unquantized model
    codes: int


class Bench:
    """A run's checkpoint with its statistics, to be quantized one way after the other; results in `rows`."""

    @torch.no_grad()
    def __init__(self, folder: Path, code_bytes: int):
        self.saved = tg.read_saved(folder / "final_model.pt")
        self.code_bytes = code_bytes or len(tg.pack_script())
        cfg, ranks = tg.Config.from_env(os.environ, self.saved.settings), tg.Ranks.join()
        backend = tg.Backend.for_machine(cfg, ranks.device)
        self.run = tg.Run(cfg, ranks, lambda line, **_: say("   ", line), backend)
        files = tg.find_data(cfg, need_train=True)
        if self.saved.tokenizer_sha256 not in ("", tg.sha256(tg.read_file(files.tokenizer))):
            raise tg.UserError(f"{files.tokenizer} is not the tokenizer that {folder} was trained with")
        tokenizer = tg.load_tokenizer(files.tokenizer, cfg.vocab_size)
        self.val = tg.load_validation(files.val, tokenizer, cfg)
        with tg.parsing(str(folder / "final_model.pt")):
            self.model = tg.GPT(cfg).to(ranks.device).with_weights(self.saved.weights)
        buffers, buffer_tokens = tg.split_step(cfg, 1)
        loader = tg.PackedLoader(files.train, tokenizer.bos, cfg, buffer_tokens)
        clock = Clock(ranks)
        self.sums = tg.calibrate(self.run, self.model, loader, self.saved.steps * buffers)
        say(f"calibration {clock.seconds():.1f} s")
        self.rows = []
        self.unquantized = 0.0
        self.unquantized = self.add_row("unquantized", self.model, 0)

    def add_row(self, name: str, model: tg.GPT, total_bytes: int) -> float:
        """Score a model, add a row for it and print that; returns bits per byte."""
        cfg = self.run.cfg
        nll = tg.evaluate(self.run, model, self.val, tg.depth_plan(cfg, cfg.loops_at_end))
        bpb = tg.Score.of(nll, self.val).bpb
        cost = f"{bpb - self.unquantized:+9.5f}" if total_bytes else ""
        self.rows.append(f"{name:36}{total_bytes or '':>12}{bpb:10.5f}{cost}")
        say(self.rows[-1])
        return bpb

    @torch.no_grad()
    def ours(self, states: int) -> Quantized:
        """By this script, with a trellis of so many states."""
        run = self.run._replace(cfg=dataclasses.replace(self.run.cfg, quant_states=states))
        clock = Clock(run.ranks)
        with tempfile.TemporaryDirectory() as scratch:
            blob = tg.export(run, self.model, self.sums, self.code_bytes, Path(scratch, "artifact"))
        export_seconds = clock.seconds()
        quantizers = tg.make_quantizers(run, self.model, self.sums)
        clock = Clock(run.ranks)
        for quantizer in quantizers.local:
            quantizer.quantize(0.1, states)
        gptq_seconds = clock.seconds()
        clock = Clock(run.ranks)
        _, tensors = tg.unpack_artifact(blob, Path("artifact"))
        say(f"{states} states: export {export_seconds:.1f} s, GPTQ of everything {gptq_seconds:.1f} s a "
            f"time, decoding {clock.seconds():.1f} s")
        self.say_bytes(tensors, len(blob))
        total_bytes = self.code_bytes + len(blob)
        bpb = self.add_row(f"this script's, {states} states", tg.restore(self.model, tensors), total_bytes)
        codes = sum(tensors[f"{name}.codes"].numel() for name in tg.matrix_names(tensors))
        return Quantized(total_bytes, bpb - self.unquantized, codes)

    @staticmethod
    def say_bytes(tensors: dict, total: int) -> None:
        """How long codes are beside their entropy, in contexts by spread and without."""
        words, counts = tg.encode_codes(tensors)
        size = 4 * len(words)
        in_contexts = sum(map(entropy, counts.values()))
        without = entropy(counts["odd_counts"].sum(0))
        without += entropy(counts["counts"].reshape(tg.SPREADS, 4, -1).sum(0))
        say(f"    codes: {size} bytes; their entropy in contexts {in_contexts:.0f}, without spreads "
            f"{without:.0f}; side information and small tensors {total - size}")

    @torch.no_grad()
    def ancestors(self, total_bytes: int, codes: int) -> float | None:
        """What the ancestor's recipe costs at these bytes; None if it cannot be brought to them."""
        widen = 1.0
        for _ in range(12):
            model = self.model.with_weights(self.saved.weights)
            clock = Clock(self.run.ranks)
            streams = round_as_ancestor(model, self.sums, widen)
            seconds = clock.seconds()
            size = compressed_bytes(streams) + self.code_bytes
            say(f"ancestor's: clips x {widen:.4f}, {size} bytes, GPTQ {seconds:.1f} s")
            if widen == 1.0:
                self.add_row("ancestor's", model, size)
            elif abs(size - total_bytes) < 3e-4 * total_bytes:
                return self.add_row("ancestor's, at equal bytes", model, size) - self.unquantized
            widen *= 2 ** (8 * (size - total_bytes) / codes)
            if not 0.1 < widen < 10:  # far from the cap
                break
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with final_model.pt")
    parser.add_argument("--states", type=int, nargs="*", default=[],
                        choices=tg.Config.__dataclass_fields__["quant_states"].metadata["choices"],
                        help="other numbers of states; 1: no trellis")
    parser.add_argument("--code-bytes", type=int, default=0,
                        help="of the packed script; default: of this one's")
    args = parser.parse_args(argv)
    if args.code_bytes < 0:
        parser.error("--code-bytes wants at least 0")
    try:
        compare(Bench(args.run, args.code_bytes), args.states)
    except tg.UserError as error:
        return command.report(error)
    return 0


def compare(bench: Bench, other_states: list[int]) -> None:
    """Quantize by both recipes and by other numbers of states, and print what each costs."""
    ours = bench.ours(bench.run.cfg.quant_states)
    theirs = bench.ancestors(ours.total_bytes, ours.codes)
    if theirs is None:
        ratio = "the ancestor's recipe cannot be brought to these bytes"
    else:
        ratio = f"{ours.cost / theirs:.3f}"
    say(f"ratio of costs at equal bytes: {ratio}")
    for states in other_states:
        bench.ours(states)
    say(f"{'recipe':36}{'bytes':>12}{'val_bpb':>10}{'cost':>9}", *bench.rows, sep="\n")
    say(f"ratio of costs at equal bytes: {ratio}")


if __name__ == "__main__":
    command.run(main)

#!/usr/bin/env python3
"""What quantization costs a finished run, against the ancestor's recipe at its own and at equal bytes.

    python tools/bench_quant.py runs/x              # a folder with final_model.pt, made by train_gpt.py
    DATA_DIR=... python tools/bench_quant.py runs/x --code-bytes 33000

The ancestor's recipe: GPTQ, int6 matrices with the largest code at 12.85 standard deviations of their row, int8 embedding at
20, fp16 scales, Brotli 11. Its artifact counts codes, scales and small tensors here, nothing else. Scores are plain ones, of
all validation documents in DATA_DIR; calibration reads its training shards, as the run did. One GPU, or a CPU.
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import brotli
import numpy as np
import torch

import train_gpt as tg


def say(*words, **options) -> None:
    print(*words, flush=True, **options)


def ancestor(model, found, widen: float) -> tuple[int, float]:
    """Quantize the model in place by the old recipe; (bytes, seconds of GPTQ)."""
    began, groups, streams = time.perf_counter(), collections.defaultdict(list), []
    for name, W in [("embed", model.embed), *model.named_matrices()]:
        layer, _, kind = name.rpartition(".")
        H = found.hessians[f"{layer}.qkv" if kind in tuple("qkv") else name]
        W.masked_fill_(H.diagonal() == 0, 0)
        order = (H.diagonal() + (H.diagonal() == 0)).argsort(descending=True)
        groups[W.shape, name == "embed"].append((W, order, tg.column_energies(H[order][:, order])[0]))
    for (_, is_embed), group in groups.items():  # matrices of one shape together
        W, order, U = map(torch.stack, zip(*group))
        bits, clip = (8, 20.0) if is_embed else (6, 12.85)
        top = 2 ** (bits - 1) - 1
        scale = (widen * clip / top * W.std(dim=2)).clamp(min=1e-7).half()
        order = order[:, None].expand_as(W)
        codes = torch.empty_like(W).scatter_(2, order, tg.gptq(W.gather(2, order) / scale.float()[:, :, None], U, top=top))
        for (target, *_), made, steps in zip(group, codes, scale):
            target.copy_(made * steps.float()[:, None])
            streams += [made.to(torch.int8).cpu().numpy().tobytes(), steps.cpu().numpy().tobytes()]
    small = [p.half().cpu().numpy().tobytes() for n, p in model.named_parameters() if n in tg.Optimizers.SCALARS]
    seconds = time.perf_counter() - began
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(map(len, pool.map(lambda s: brotli.compress(s, quality=11, lgwin=24), streams + small))), seconds


def entropy(counts: np.ndarray) -> float:
    """Bytes of codes in contexts (..., contexts, symbols) at best."""
    share = counts / counts.sum(-1, keepdims=True).clip(1)
    return -(counts[counts > 0] * np.log2(share[counts > 0])).sum() / 8


class Bench:
    """A run's checkpoint with its statistics, to be quantized one way after the other; `rows` are the results."""

    @torch.no_grad()
    def __init__(self, folder: Path, code: int):
        self.saved, self.place = tg.read_saved(folder / "final_model.pt"), folder / "bench_quant.ptz"
        cfg, ranks = tg.Config.from_env(os.environ, self.saved["settings"]), tg.Ranks.join()
        self.run = tg.Run(cfg, ranks, lambda line, **_: say("   ", line), tg.Ops.choose(cfg, ranks.device))
        files, self.code = tg.find_data(cfg, train=True), code or len(tg.pack_script())
        tokenizer = tg.load_tokenizer(files.tokenizer, cfg.vocab_size)
        self.val, self.model = tg.load_validation(files.val, tokenizer, cfg), tg.GPT(cfg).to(ranks.device)
        self.model.load_state_dict(self.saved["weights"])
        count, size = tg.split_step(cfg, 1)
        began = time.perf_counter()
        self.found = tg.calibrate(self.run, self.model, tg.PackedLoader(files.train, tokenizer.bos, cfg, size),
                                  self.saved["steps"] * count)
        ranks.synchronize()
        say(f"calibration {time.perf_counter() - began:.1f} s")
        self.whole, self.rows = 0.0, []
        self.whole = self.row("unquantized", 0)

    def row(self, name: str, size: int) -> float:
        """Score the model as it is, add a row for it and print that."""
        cfg = self.run.cfg
        bpb = tg.Score.of(tg.evaluate(self.run, self.model, self.val, tg.depth_plan(cfg, cfg.loops_at_end)), self.val).bpb
        self.rows.append(f"{name:36}{size or '':>12}{bpb:10.5f}" + (f"{bpb - self.whole:+9.5f}" if size else ""))
        say(self.rows[-1])
        return bpb

    @torch.no_grad()
    def ours(self, states: int) -> tuple[int, float, int]:
        """(bytes, what it costs, number of codes)"""
        model, run = self.model, self.run._replace(cfg=dataclasses.replace(self.run.cfg, quant_states=states))
        model.load_state_dict(self.saved["weights"])
        began = time.perf_counter()
        blob = tg.export(run, model, self.found, self.code, self.place)
        self.place.unlink()
        exported = time.perf_counter() - began
        own, _ = tg.make_quantizers(run, model, self.found)
        run.ranks.synchronize()
        began = time.perf_counter()
        for quantizer in own:
            quantizer.codes(0.1, states)
        run.ranks.synchronize()
        gptq_seconds, began = time.perf_counter() - began, time.perf_counter()
        _, tensors = tg.unpack_artifact(blob, self.place)
        decoded = time.perf_counter() - began
        tg.restore(model, tensors)
        words, counts = tg.encode_codes(tensors)
        size, alike = 4 * len(words), counts["counts"].reshape(tg.WIDTHS, 4, -1).sum(0)  # of all widths together
        say(f"{states} states: export {exported:.1f} s, GPTQ of everything {gptq_seconds:.1f} s a time, decoding {decoded:.1f} s")
        say(f"    codes: {size} bytes; their entropy in contexts {sum(map(entropy, counts.values())):.0f}, without widths "
            f"{entropy(counts['odd_counts'].sum(0)) + entropy(alike):.0f}; side information and small tensors {len(blob) - size}")
        cost = self.row(f"this script's, {states} states", self.code + len(blob)) - self.whole
        return self.code + len(blob), cost, sum(tensors[f"{name}.codes"].numel() for name in tg.coded(tensors))

    @torch.no_grad()
    def ancestors(self, total: int, codes: int) -> float | None:
        """What the ancestor's recipe costs at these bytes; None if it cannot be brought to them."""
        widen = 1.0
        for _ in range(12):
            self.model.load_state_dict(self.saved["weights"])
            held, seconds = ancestor(self.model, self.found, widen)
            off = held + self.code - total
            say(f"ancestor's: clips x {widen:.4f}, {held + self.code} bytes, GPTQ {seconds:.1f} s")
            if widen == 1.0:
                self.row("ancestor's", held + self.code)
            elif abs(off) < 3e-4 * total:
                return self.row("ancestor's, at equal bytes", held + self.code) - self.whole
            widen *= 2 ** (8 * off / codes)
            if not 0.1 < widen < 10:  # far from the cap
                break
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with final_model.pt")
    parser.add_argument("--states", type=int, nargs="*", default=[], help="other numbers of states of the trellis; 1: no trellis")
    parser.add_argument("--code-bytes", type=int, default=0, help="of the packed script; default: of this one, packed")
    args = parser.parse_args()
    bench = Bench(args.run, args.code_bytes)
    total, cost, codes = bench.ours(bench.run.cfg.quant_states)
    theirs = bench.ancestors(total, codes)
    ratio = "the ancestor's recipe cannot be brought to these bytes" if theirs is None else f"{cost / theirs:.3f}"
    say(f"ratio of costs at equal bytes: {ratio}")
    for states in args.states:
        bench.ours(states)
    say(f"{'recipe':36}{'bytes':>12}{'val_bpb':>10}{'cost':>9}", *bench.rows, f"ratio of costs at equal bytes: {ratio}", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except tg.UserError as error:
        raise SystemExit(f"error: {error}") from None

#!/usr/bin/env python3
"""What quantization costs a finished run, against the ancestor's recipe at its own and at equal bytes.

    python tools/bench_quant.py runs/x              # a folder with final_model.pt, made by train_gpt.py
    DATA_DIR=... python tools/bench_quant.py runs/x --code-bytes 33000

The ancestor's recipe: GPTQ, int6 matrices with the largest code at 12.85 standard deviations of their row, int8 embedding at
20, fp16 scales, Brotli 11. Its artifact counts codes, scales and small tensors here, nothing else. Scores are plain ones, of
all validation documents in DATA_DIR; calibration reads its training shards, as the run did. One GPU, or a CPU.
"""
import argparse
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


def say(*words) -> None:
    print(*words, flush=True)


def ancestor(model, found, widen: float) -> tuple[int, float]:
    """Quantize the model in place by the old recipe; (bytes, seconds of GPTQ)."""
    began, streams = time.perf_counter(), []
    for name, W in [("embed", model.embed), *model.named_matrices()]:
        layer, _, kind = name.rpartition(".")
        H = found.hessians[f"{layer}.qkv" if kind in tuple("qkv") else name]
        order = (H.diagonal() + (H.diagonal() == 0)).argsort(descending=True)
        bits, clip = (8, 20.0) if name == "embed" else (6, 12.85)
        top = 2 ** (bits - 1) - 1
        U, _ = tg.column_energies(H[order][:, order])
        scale = (widen * clip / top * W.std(dim=1)).clamp(min=1e-7).half()
        W.masked_fill_(H.diagonal() == 0, 0)
        codes = tg.gptq(W[:, order] / scale.float()[:, None], U, top=top)[:, order.argsort()]
        W.copy_(codes * scale.float()[:, None])
        streams += [codes.to(torch.int8).cpu().numpy().tobytes(), scale.cpu().numpy().tobytes()]
    small = [p.half().cpu().numpy().tobytes() for n, p in model.named_parameters() if n in tg.Optimizers.SCALARS]
    seconds = time.perf_counter() - began
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(map(len, pool.map(lambda s: brotli.compress(s, quality=11, lgwin=24), streams + small))), seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with final_model.pt")
    parser.add_argument("--states", type=int, nargs="*", default=[], help="other numbers of states of the trellis; 1: no trellis")
    parser.add_argument("--code-bytes", type=int, default=0, help="of the packed script; default: of this one, packed")
    args = parser.parse_args()
    saved = tg.read_saved(args.run / "final_model.pt")
    cfg, ranks = tg.Config.from_env(os.environ, saved["settings"]), tg.Ranks.join()
    run = tg.Run(cfg, ranks, lambda line, **_: say("   ", line), tg.Ops.choose(cfg, ranks.device))
    files, plan = tg.find_data(cfg, train=True), tg.depth_plan(cfg, cfg.loops_at_end)
    tokenizer = tg.load_tokenizer(files.tokenizer, cfg.vocab_size)
    val, model = tg.load_validation(files.val, tokenizer, cfg), tg.GPT(cfg).to(ranks.device)
    model.load_state_dict(saved["weights"])
    code = args.code_bytes or len(tg.pack_script())
    count, size = tg.split_step(cfg, 1)
    began = time.perf_counter()
    found = tg.calibrate(run, model, tg.PackedLoader(files.train, tokenizer.bos, cfg, size), saved["steps"] * count)
    ranks.synchronize()
    say(f"calibration {time.perf_counter() - began:.1f} s")
    bpb = lambda: tg.Score.of(tg.evaluate(run, model, val, plan), val).bpb
    rows = [("unquantized", 0, whole := bpb())]

    entropy = lambda c: -(c[c > 0] * np.log2((c / c.sum(-1, keepdims=True).clip(1))[c > 0])).sum() / 8
    total, place = 0, args.run / "bench_quant.ptz"
    for states in dict.fromkeys((cfg.quant_states, *args.states)):
        model.load_state_dict(saved["weights"])
        run = run._replace(cfg=dataclasses.replace(cfg, quant_states=states))
        began = time.perf_counter()
        blob = tg.export(run, model, found, code, place)
        place.unlink()
        exported = time.perf_counter() - began
        own, _ = tg.make_quantizers(run, model, found)
        ranks.synchronize()
        began = time.perf_counter()
        for quantizer in own:
            quantizer.codes(0.1, states)
        ranks.synchronize()
        gptq_seconds, began = time.perf_counter() - began, time.perf_counter()
        _, tensors = tg.unpack_artifact(blob, place)
        decoded = time.perf_counter() - began
        tg.restore(model, tensors)
        total = total or code + len(blob)
        rows.append((f"this script's, {states} states", code + len(blob), bpb()))
        words, counts = tg.encode_codes(tensors)
        codes = sum(tensors[f"{name}.codes"].numel() for name in tg.coded(tensors))
        size, alike = 4 * len(words), counts["counts"].reshape(tg.WIDTHS, 4, -1).sum(0)  # of all widths together
        say(f"{states} states: export {exported:.1f} s, GPTQ of everything {gptq_seconds:.1f} s a time, decoding {decoded:.1f} s")
        say(f"    codes: {size} bytes; their entropy in contexts {sum(map(entropy, counts.values())):.0f}, without widths "
            f"{entropy(counts['odd_counts'].sum(0)) + entropy(alike):.0f}; side information and small tensors {len(blob) - size}")

    widen = 1.0
    for _ in range(12):
        model.load_state_dict(saved["weights"])
        held, seconds = ancestor(model, found, widen)
        if widen == 1.0 or abs(held + code - total) < 3e-4 * total:
            name = "ancestor's" + ", at equal bytes" * (widen != 1.0)
            rows.append((name, held + code, bpb()))
            say(f"{name}: clips x {widen:.4f}, GPTQ {seconds:.1f} s")
            if widen != 1.0:
                break
        widen *= 2 ** (8 * (held + code - total) / codes)
    say(f"{'recipe':36}{'bytes':>12}{'val_bpb':>10}{'cost':>9}")
    for name, size, score in rows:
        say(f"{name:36}{size or '':>12}{score:10.5f}" + (f"{score - whole:+9.5f}" if size else ""))
    if rows[-1][0].endswith("equal bytes"):
        say(f"ratio of costs at equal bytes: {(rows[1][2] - whole) / (rows[-1][2] - whole):.3f}")
    else:
        say("the ancestor's recipe cannot be brought to these bytes")


if __name__ == "__main__":
    try:
        main()
    except tg.UserError as error:
        raise SystemExit(f"error: {error}") from None

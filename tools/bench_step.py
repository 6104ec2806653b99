#!/usr/bin/env python3
"""Time a training step on this machine's GPUs: ceilings, micro-batch, optimizer, whole steps, memory, kernels.

    python tools/bench_step.py                               # on 1, 2, 4 and 8 GPUs, as far as there are
    python tools/bench_step.py --gpus 1 --compare HEAD~3     # against the file of a commit, or a path, taking turns

Settings are train_gpt.py's environment variables. Tokens are random and document lengths log-normal (median 490) or, with
--data, those of the first two steps of its shards. Weights have noise added: a GPU multiplies the zeros of a fresh model
faster. Every time is the median of --rounds rounds, in each of which every file is timed in turn.
"""
import argparse
import collections
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(ref: str, name: str):
    """train_gpt.py of a commit or a path as a module, whose name is its operators' namespace: older files have one of their own."""
    path = Path(ref)
    source = path.read_text() if path.is_file() else subprocess.run(
        ["git", "-C", str(ROOT), "show", f"{ref}:train_gpt.py"], check=True, capture_output=True, text=True).stdout
    file = Path(tempfile.mkdtemp(), f"{name}.py")  # a real file: Triton reads the source of its kernels
    file.write_text(source.replace("train_gpt::", f"{name}::"))
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Candidate:
    """One file's model, optimizers and compiled operators, ready to be timed."""

    def __init__(self, ref: str, name: str, shards: list[Path], ranks):
        import torch
        t = self.t = load(ref, name)
        self.name, self.cfg, self.ranks = ref, t.Config.from_env(), t.Ranks(ranks.rank, ranks.world, str(ranks.device))
        self.local_buffers, total = t.split_step(self.cfg, ranks.world)
        self.batches = [t.to_device(batch, ranks.device) for batch in self.buffers(shards, total)]
        self.batch, self.spans = self.batches[0], len(self.batches[0].seqs.cu_seqlens.unique()) - 1
        self.model = t.GPT(self.cfg).to(ranks.device)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        run = t.Run(self.cfg, self.ranks, None, t.Ops.choose(self.cfg, ranks.device))
        self.trainer = t.Trainer(run, self.model, None)

    def buffers(self, shards: list[Path], total: int) -> list:
        """Those of two steps of real documents or, without shards, one of random tokens."""
        import numpy as np
        t, cfg, rng = self.t, self.cfg, np.random.default_rng(0)
        if shards:
            loader = t.PackedLoader(shards, int(t.open_shard(shards[0])[0]), cfg, total)
            return [loader.buffer(n) for n in range(2 * cfg.train_batch_tokens // total)]
        starts = np.cumsum(np.append(0, np.maximum(20, rng.lognormal(6.2, 0.95, 40_000)).astype(int)))
        bounds = t.span_bounds(starts[starts < total], total, cfg.train_seq_len)
        tokens = rng.integers(0, cfg.vocab_size, total + 1)
        return [t.make_batch(tokens[:-1], tokens[1:], bounds, len(bounds) + 3, cfg.train_seq_len)]

    def each(self, looped: bool, rounds: int):
        """Milliseconds of every micro-batch, (steps, buffers): eight GPUs wait for the slowest of a step's eight."""
        import numpy as np
        calls = {n: lambda batch=batch: self.micro_batch(looped, batch) for n, batch in enumerate(self.batches)}
        return np.array(list(medians(calls, rounds, 2, self.ranks).values())).reshape(2, -1)

    def exchange(self):
        """The collectives of the banks alone: gradients out, updates back."""
        import torch.distributed as dist
        for shard in self.trainer.optimizers.muon.shards.values():
            dist.reduce_scatter_tensor(shard.mine, shard.full)
        for shard in self.trainer.optimizers.muon.shards.values():
            dist.all_gather_into_tensor(shard.full, shard.mine)

    def micro_batch(self, looped: bool, batch=None):
        self.trainer.optimizers.zero_grad()
        self.model(batch or self.batch, self.t.depth_plan(self.cfg, looped), self.trainer.ops).mean().backward()

    def step(self, looped: bool):
        self.trainer.step([self.batch] * self.local_buffers, self.t.depth_plan(self.cfg, looped), 0.01, 0.95)

    def optimizer_step(self):
        self.trainer.optimizers.step(0.01, 0.95)


def medians(calls: dict, rounds: int, repeat: int, ranks) -> dict:
    """{name: median milliseconds of a call}, each round timing every call in turn; all ranks together."""
    import torch
    times = collections.defaultdict(list)
    for r in range(rounds + 1):
        for name, call in calls.items():
            torch.cuda.synchronize()
            ranks.max(0.0)
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
            marks[0].record()
            for mark in marks[1:]:
                call()
                mark.record()
            torch.cuda.synchronize()
            if r:  # the first round warms up
                times[name] += [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    return {name: statistics.median(values) for name, values in times.items()}


def ceilings(ranks):
    """(a product of 8192^3 to call, the operations it does in a second, bytes copied in a second, read and written)."""
    import torch
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    c = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    product = lambda: a @ b
    ms = medians({"product": product, "copy": lambda: c[: 2**29].copy_(c[2**29 :])}, 3, 10, ranks)
    return product, 2e3 * 8192**3 / ms["product"], 1e3 * 2**30 / ms["copy"]


def kernel_times(call, times: int, ready=lambda: None) -> tuple[collections.Counter, collections.Counter, float]:
    """Milliseconds and launches of every kernel by name, in one of `times` calls: without waiting for the host.

    Third, milliseconds in which collectives run and nothing else does, with the wait for the slowest GPU. `ready`
    is called after the profiler has started, for ranks to begin together.
    """
    import torch
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as prof:
        ready()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    spent, count = collections.Counter(), collections.Counter()
    kernels = [event for event in prof.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in kernels:
        spent[event.name] += event.device_time / times / 1e3
        count[event.name] += 1 / times
    return spent, count, exposed(kernels) / times / 1e3


def exposed(kernels) -> float:
    """Microseconds in which a collective runs and nothing else does, copies included."""
    marks = sorted((at, step, "nccl" in event.name) for event in kernels
                   for at, step in ((event.time_range.start, 1), (event.time_range.end, -1)))
    running, since, total = [0, 0], 0.0, 0.0
    for at, step, collective in marks:
        total += (at - since) * (running[True] > 0 and not running[False])
        running[collective] += step
        since = at
    return total


def profile(call, top: int, ranks) -> list[str]:
    """Lines "ms, launches, name" of the kernels that a call spends most of its time in."""
    spent, count, unhidden = kernel_times(call, 3, lambda: ranks.max(0.0))
    lines = [f"{sum(spent.values()):9.3f} ms in {sum(count.values()):.0f} kernels"]
    if sent := sum(ms for name, ms in spent.items() if "nccl" in name):
        lines.append(f"{sent:9.3f} ms of them in collectives, and {unhidden:.3f} with nothing else running")
    return lines + [f"{ms:9.3f} ms {count[name]:6.1f} x  {name[:110]}" for name, ms in spent.most_common(top)]


def worker(args) -> None:
    import torch
    t = load(str(ROOT / "train_gpt.py"), "bench_now")
    ranks, cfg = t.Ranks.join(), t.Config.from_env()
    say = lambda *a: print(*a, flush=True) if ranks.is_main else None
    if not ranks.on_gpu:
        raise SystemExit("error: this needs a GPU")
    alone = ranks.world == 1
    say(f"== {ranks.world} x {t.device_name(ranks.device)}, torch {torch.__version__}")
    product, operations, copied = ceilings(ranks)
    say(f"8192^3 bf16 product {operations / 1e12:.0f} TFLOP/s, copy {copied / 1e12:.2f} TB/s")
    shards = sorted(Path(args.data).glob("**/fineweb_train_*.bin")) if args.data else []
    if args.data and not shards:
        raise SystemExit(f"error: --data {args.data} has no fineweb_train_*.bin")
    refs = [str(ROOT / "train_gpt.py"), *args.compare]
    files = [Candidate(ref, f"bench_{i}", shards, ranks) for i, ref in enumerate(refs)]
    rows = []
    for looped in (False, True):
        for file in files:
            began = time.perf_counter()
            file.step(looped)
            torch.cuda.synchronize()
            say(f"first step{', looped' * looped}: {time.perf_counter() - began:.1f} s  {file.name}")
    for looped in (False, True):
        form, repeat = ("looped" if looped else "un-looped"), args.repeat
        if alone:
            hot = medians({f.name: lambda f=f: f.micro_batch(looped) for f in files} | {"": product},
                          args.rounds, repeat, ranks)  # a product in turn with micro-batches, when the GPU is as hot
            rows += [(f"micro-batch {form}, ms", hot),
                     ("  8192^3 product meanwhile, TFLOP/s", dict.fromkeys(refs, 2 * 8192**3 / hot[""] / 1e9))]
        steps = medians({f.name: lambda f=f: f.step(looped) for f in files}, args.rounds, max(2, repeat // 4), ranks)
        rows += [(f"step {form}, ms", steps),
                 (f"step {form}, M tokens/s", {n: cfg.train_batch_tokens / ms / 1e3 for n, ms in steps.items()})]
        if alone and shards:
            each = {file.name: file.each(looped, args.rounds) for file in files}
            rows += [(f"all micro-batches {form}, mean, ms", {name: ms.mean() for name, ms in each.items()}),
                     ("  slowest of a step over its mean", {n: (ms.max(1) / ms.mean(1)).mean() for n, ms in each.items()})]
    if not alone:
        rows.append(("collectives of the banks alone, ms", medians({f.name: f.exchange for f in files}, args.rounds,
                                                                   args.repeat, ranks)))
    rows.append(("optimizer step, ms", medians({f.name: f.optimizer_step for f in files}, args.rounds, args.repeat, ranks)))
    memory = {}
    for file in files:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        file.micro_batch(True)
        torch.cuda.synchronize()
        memory[file.name] = (torch.cuda.max_memory_allocated() - held) / 1e9
    rows.append(("activations of a looped micro-batch, GB", memory))
    say(f"{len(files[0].batch.tokens)} tokens and {files[0].spans} spans a buffer, {files[0].local_buffers} buffers a rank and step")
    for what, values in rows:
        first = values[refs[0]]
        say(f"{what:46}" + "".join(f"{values[ref]:10.3f}" + (f" (x {values[ref] / first:.3f})" if ref != refs[0] else "")
                                   for ref in refs))
    for file in files[: 1 + args.profile_all] if args.top else ():
        for looped in (False, True):
            call = (lambda: file.micro_batch(looped)) if alone else (lambda: file.step(looped))
            lines = profile(call, args.top, ranks)
            say(f"kernels of a {'micro-batch' if alone else 'step'}{', looped' * looped}, {file.name}")
            say("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs="*", default=[], metavar="REF", help="commits or files to time in turn")
    parser.add_argument("--gpus", default="", help="numbers of GPUs, with commas; default: 1, 2, 4, 8 as far as there are")
    parser.add_argument("--data", default="", help="folder with fineweb_train_*.bin to take buffers from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=8, help="micro-batches a round")
    parser.add_argument("--top", type=int, default=25, help="kernels to list; 0: none")
    parser.add_argument("--profile-all", action="store_true", help="list the kernels of every file, not of this one alone")
    args = parser.parse_args()
    if "RANK" in os.environ:
        return worker(args)
    import torch
    counts = [int(n) for n in args.gpus.split(",")] if args.gpus else [
        n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    if not counts:
        raise SystemExit("error: this needs a GPU")
    for n in counts:
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                               __file__, *sys.argv[1:]])
        if done.returncode:
            raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()

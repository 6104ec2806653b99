#!/usr/bin/env python3
"""Time a training step on this machine's GPUs: ceilings, micro-batch, optimizer, steps, memory, kernels.

    python tools/bench_step.py                             # on 1, 2, 4 and 8 GPUs, as far as there are
    python tools/bench_step.py --gpus 1 --compare FILE     # against another train_gpt.py, taking turns
    python tools/bench_step.py --compare HEAD~1            # against that of a commit which has the same names

Settings are train_gpt.py's environment variables. Tokens are random and document lengths log-normal (median
490) or, with --data, those of the first two steps of its shards. Weights have noise added: a GPU multiplies
the zeros of a fresh model faster. Every time is the median of --rounds rounds, in each of which every file is
timed in turn. The parts of a micro-batch stand beside their floors, the least time for their bytes at the
speed of a copy or for their operations at that of a product.
"""
import argparse
import atexit
import collections
import functools
import importlib.util
import inspect
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import command

with command.imports():
    import numpy as np
    import torch
    import torch.distributed as dist

import floors

ROOT = Path(__file__).resolve().parents[1]
THIS_SCRIPT = str(ROOT / "train_gpt.py")


def read_script(ref: str) -> bytes:
    """The train_gpt.py of a commit or a path; ends in one line if there is none."""
    show = ["git", "-C", str(ROOT), "show", f"{ref}:train_gpt.py"]
    try:
        if Path(ref).is_file():
            return Path(ref).read_bytes()
        return subprocess.run(show, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        problem = f"{ref} is neither a file nor a commit with a train_gpt.py, or git is missing"
        raise SystemExit(command.report(problem)) from None


def load_script(ref: str, name: str):
    """train_gpt.py of a commit or a path as a module; in older ones its name is also the
    namespace of operators.
    """
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    file = Path(folder.name, f"{name}.py")  # a real file: Triton reads the source of its kernels
    file.write_bytes(read_script(ref))
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Candidate:
    """One file's model, optimizers and compiled functions, ready to be timed."""

    def __init__(self, ref: str, name: str, shards: list[Path], ranks):
        self.name = ref
        self.tg = tg = load_script(ref, name)
        self.cfg = tg.Config.from_env()
        self.ranks = tg.Ranks(ranks.rank, ranks.world_size, str(ranks.device))
        self.local_buffers, buffer_tokens = tg.split_step(self.cfg, ranks.world_size)
        batches = self.make_batches(shards, buffer_tokens)
        self.batches = [tg.to_device(batch, ranks.device) for batch in batches]
        self.batch = self.batches[0]
        self.spans = len(self.batch.spans.cu_seqlens.unique()) - 1
        self.model = tg.GPT(self.cfg).to(ranks.device)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        run = tg.Run(self.cfg, self.ranks, None, tg.Backend.for_machine(self.cfg, ranks.device))
        self.trainer = tg.Trainer(run, self.model, None)

    def make_batches(self, shards: list[Path], buffer_tokens: int) -> list:
        """Those of two steps of real documents or, without shards, one of random tokens.

        Spans are as long as in the middle of a run.
        """
        tg, cfg = self.tg, self.cfg
        grows = hasattr(tg, "longest_span")  # in earlier scripts spans are of one length throughout
        max_len = tg.longest_span(0.5, cfg) if grows else cfg.train_seq_len
        if shards:
            bos = int(tg.open_shard(shards[0])[0])
            loader = tg.PackedLoader(shards, bos, cfg, buffer_tokens)
            if hasattr(loader, "begin_stage"):
                loader.begin_stage(0, loader.shape_at(0.5))
            elif grows:
                loader.lengthen(0, max_len)
            return [loader.buffer(n) for n in range(2 * cfg.train_batch_tokens // buffer_tokens)]
        rng = np.random.default_rng(0)
        lengths = np.maximum(20, rng.lognormal(6.2, 0.95, 40_000)).astype(int)
        starts = np.cumsum(np.append(0, lengths))
        bounds = tg.span_bounds(starts[starts < buffer_tokens], buffer_tokens, max_len)
        tokens = rng.integers(0, cfg.vocab_size, buffer_tokens + 1)
        most = max_len if hasattr(tg, "LENGTHEN_AT") else cfg.train_seq_len  # as a run has it
        return [tg.make_batch(tokens[:-1], tokens[1:], bounds, len(bounds) + 3, most)]

    def plan(self, looped: bool):
        return self.tg.depth_plan(self.cfg, looped)

    def micro_batch(self, looped: bool, batch=None) -> None:
        """Forward and backward pass of one buffer, as a CUDA graph if the script makes them."""
        batch, plan, trainer = batch or self.batch, self.plan(looped), self.trainer
        trainer.optimizers.zero_grad()
        graphs = getattr(trainer, "graphs", {})
        longest = batch.spans.max_seqlen
        # By plan and shape, the newest form first; then by plan and longest span, and by plan alone.
        keys = (plan, (len(batch.tokens), longest)), (plan, longest), plan
        if graph := next(filter(None, map(graphs.get, keys)), None):
            graph.replay(batch)
        else:
            self.model(batch, plan, trainer.backend).mean().backward()

    def every_micro_batch(self, looped: bool, rounds: int) -> np.ndarray:
        """Milliseconds of all micro-batches, (steps, buffers): GPUs wait for the slowest of a step."""
        calls = {n: functools.partial(self.micro_batch, looped, batch)
                 for n, batch in enumerate(self.batches)}
        return np.array(list(medians(calls, rounds, 2, self.ranks).values())).reshape(2, -1)

    def capture(self) -> None:
        """Make CUDA graphs of micro-batches, as a run does; 30 GB a file."""
        backend = self.trainer.backend
        if hasattr(self.trainer, "capture") and backend.fused and backend.compilable:
            (wanted,) = inspect.signature(self.trainer.capture).parameters
            calls = [(plan, self.batch) for plan in self.trainer.plans]
            earlier = dict(batches=[self.batch], batch=self.batch)  # by the name of the parameter
            self.trainer.capture(earlier.get(wanted, calls))

    def step(self, looped: bool) -> None:
        self.trainer.step([self.batch] * self.local_buffers, self.plan(looped), 0.01, 0.95)

    def optimizer_step(self) -> None:
        self.trainer.optimizers.step(0.01, 0.95)

    def exchange_banks(self) -> None:
        """The collectives of the banks alone: gradients out, updates back."""
        shards = self.trainer.optimizers.muon.shards.values()
        for shard in shards:
            dist.reduce_scatter_tensor(shard.own, shard.full)
        for shard in shards:
            dist.all_gather_into_tensor(shard.full, shard.own)


def medians(calls: dict, rounds: int, repeat: int, ranks) -> dict:
    """{name: median milliseconds of a call}, each round timing every call in turn; all ranks together.

    Every second round goes the other way round: what heats the GPU, or cools it, comes before each of them.
    """
    times = collections.defaultdict(list)
    for number in range(rounds + 1):
        for name, call in calls.items() if number % 2 else reversed(calls.items()):
            torch.cuda.synchronize()
            ranks.barrier()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
            marks[0].record()
            for mark in marks[1:]:
                call()
                mark.record()
            torch.cuda.synchronize()
            if number > 0:  # the first round warms up
                times[name] += [before.elapsed_time(after) for before, after in zip(marks, marks[1:])]
    return {name: statistics.median(values) for name, values in times.items()}


def ceilings(ranks):
    """(a product of 8192^3 to call, its operations in a second, bytes read and written in a second)."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    memory = torch.empty(2**30, device="cuda", dtype=torch.uint8)

    def product():
        return a @ b

    def copy():
        memory[: 2**29].copy_(memory[2**29 :])

    ms = medians({"product": product, "copy": copy}, 3, 10, ranks)
    return product, 2e3 * 8192**3 / ms["product"], 1e3 * 2**30 / ms["copy"]


def nothing() -> None:
    pass


def kernel_times(call, times: int, ready=nothing) -> tuple[collections.Counter, collections.Counter, float]:
    """Milliseconds and launches of every kernel by name, in one of `times` calls: without waits for the host.

    Third, milliseconds in which collectives run and nothing else does, with the wait for the slowest GPU.
    `ready` is called after the profiler has started, for ranks to begin together.
    """
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda, acc_events=True) as profiler:
        ready()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    spent, count = collections.Counter(), collections.Counter()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in kernels:
        spent[event.name] += event.device_time / times / 1e3
        count[event.name] += 1 / times
    return spent, count, exposed_collectives(kernels) / times / 1e3


def exposed_collectives(kernels) -> float:
    """Microseconds in which a collective runs and nothing else does, copies included."""
    changes = []
    for event in kernels:
        is_collective = "nccl" in event.name
        changes += [(event.time_range.start, 1, is_collective), (event.time_range.end, -1, is_collective)]
    running = {True: 0, False: 0}
    since, total = 0.0, 0.0
    for at, change, is_collective in sorted(changes):
        if running[True] and not running[False]:
            total += at - since
        running[is_collective] += change
        since = at
    return total


def part_lines(candidate: Candidate, looped: bool, spent, operations: float, copied: float) -> list[str]:
    """What each part of a micro-batch takes, and its floor on this GPU."""
    cfg, plan = candidate.cfg, candidate.plan(looped)
    lengths = candidate.batch.spans.cu_seqlens.diff().cpu().numpy()
    lanes = sum(layer >= cfg.parallel_start_layer for layer in plan.decoder)
    fp8 = getattr(candidate.trainer.backend, "fp8", False)  # scripts of before had none
    work = floors.work_of(cfg, len(plan.visits), len(plan.encoder), lanes, lengths, fp8)
    row_bytes = 2 * len(candidate.batch.tokens) * cfg.model_dim
    return floors.table(spent, {part: of.ms(row_bytes, copied, operations) for part, of in work.items()})


def profile(spent, count, exposed: float, top: int) -> list[str]:
    """Lines "ms, launches, name" of the kernels that a call spends most of its time in: see kernel_times."""
    lines = [f"{sum(spent.values()):9.3f} ms in {sum(count.values()):.0f} kernels"]
    in_collectives = sum(ms for name, ms in spent.items() if "nccl" in name)
    if in_collectives:
        lines.append(f"{in_collectives:9.3f} ms of them in collectives, and {exposed:.3f} with nothing else "
                     "running")
    return lines + [f"{ms:9.3f} ms {count[name]:6.1f} x  {name[:110]}" for name, ms in spent.most_common(top)]


def activation_memory(candidate: Candidate) -> float:
    """Gigabytes that a looped micro-batch needs beside weights, gradients and optimizer state."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    candidate.micro_batch(True)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e9


def measure(files: list[Candidate], args, ranks, product) -> list[tuple[str, dict]]:
    """Rows of the table: what was measured, and its figure for every file."""
    rows, alone = [], ranks.world_size == 1
    for looped in (False, True):
        form = "looped" if looped else "un-looped"
        if alone:
            # A product in turn with micro-batches, when the GPU is as hot as these make it.
            calls = {file.name: functools.partial(file.micro_batch, looped) for file in files}
            hot = medians({**calls, "product": product}, args.rounds, args.repeat, ranks)
            rate = 2 * 8192**3 / hot.pop("product") / 1e9
            rows.append((f"micro-batch {form}, ms", hot))
            rows.append(("  8192^3 product meanwhile, TFLOP/s", dict.fromkeys(hot, rate)))
        calls = {file.name: functools.partial(file.step, looped) for file in files}
        steps = medians(calls, args.rounds, max(2, args.repeat // 4), ranks)
        tokens = files[0].cfg.train_batch_tokens
        rows.append((f"step {form}, ms", steps))
        rows.append((f"step {form}, M tokens/s", {name: tokens / ms / 1e3 for name, ms in steps.items()}))
        if alone and args.data:
            every = {file.name: file.every_micro_batch(looped, args.rounds) for file in files}
            rows.append((f"all micro-batches {form}, mean, ms",
                         {name: ms.mean() for name, ms in every.items()}))
            rows.append(("  slowest of a step over its mean",
                         {name: (ms.max(1) / ms.mean(1)).mean() for name, ms in every.items()}))
    if not alone:
        calls = {file.name: file.exchange_banks for file in files}
        rows.append(("collectives of the banks alone, ms", medians(calls, args.rounds, args.repeat, ranks)))
    calls = {file.name: file.optimizer_step for file in files}
    rows.append(("optimizer step, ms", medians(calls, args.rounds, args.repeat, ranks)))
    return rows


def make_candidate(ref: str, name: str, args, ranks) -> Candidate:
    """Load a script; another than this one may be unlike it."""
    try:
        return Candidate(ref, name, train_shards(args.data), ranks)
    except Exception as error:
        if ref == THIS_SCRIPT:
            raise
        problem = f"--compare {ref}: it has other names or settings than this script ({error!r})"
        raise SystemExit(command.report(problem)) from error


def worker(args, tg) -> None:
    """One of the processes that the command line starts."""
    ranks = tg.Ranks.join()

    def say(*words):
        if ranks.is_main:
            print(*words, flush=True)

    # 1) Ceilings of the machine.
    say(f"== {ranks.world_size} x {tg.device_name(ranks.device)}, torch {torch.__version__}")
    product, operations, copied = ceilings(ranks)
    say(f"8192^3 bf16 product {operations / 1e12:.0f} TFLOP/s, copy {copied / 1e12:.2f} TB/s")
    # 2) The files, compiled.
    refs = [THIS_SCRIPT, *args.compare]
    files = [make_candidate(ref, f"bench_{i}", args, ranks) for i, ref in enumerate(refs)]
    for looped in (False, True):
        for file in files:
            began = time.perf_counter()
            file.step(looped)
            torch.cuda.synchronize()
            say(f"first step{', looped' * looped}: {time.perf_counter() - began:.1f} s  {file.name}")
    activations = {file.name: activation_memory(file) for file in files}  # before graphs: replays show none
    for file in files:
        file.capture()
    # 3) The table, with every other file's ratio to this one.
    rows = measure(files, args, ranks, product)
    rows.append(("activations of a looped micro-batch, GB", activations))
    first = files[0]
    say(f"{len(first.batch.tokens)} tokens and {first.spans} spans a buffer, {first.local_buffers} buffers a "
        "rank and step")
    for what, figures in rows:
        base = figures[THIS_SCRIPT]
        others = "".join(f"{figures[ref]:10.3f} (x {figures[ref] / base:.3f})" for ref in args.compare)
        say(f"{what:46}{base:10.3f}{others}")
    # 4) Kernels.
    profiled = files if args.profile_all else files[:1]
    for file in profiled if args.top else ():
        for looped in (False, True):
            alone = ranks.world_size == 1
            call = file.micro_batch if alone else file.step
            spent, count, exposed = kernel_times(functools.partial(call, looped), 3, ranks.barrier)
            if alone:
                say(f"parts of a micro-batch{', looped' * looped}, {file.name}")
                say("\n".join(part_lines(file, looped, spent, operations, copied)))
            say(f"kernels of a {'micro-batch' if alone else 'step'}{', looped' * looped}, {file.name}")
            say("\n".join(profile(spent, count, exposed, args.top)))


def train_shards(folder: str) -> list[Path]:
    """The shards of --data; none without it."""
    return sorted(Path(folder).glob("**/fineweb_train_*.bin")) if folder else []


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs="*", default=[], metavar="REF",
                        help="commits or files to time in turn")
    parser.add_argument("--gpus", default="",
                        help="numbers of GPUs, with commas; default: 1, 2, 4, 8 as far as there are")
    parser.add_argument("--data", default="", help="folder with fineweb_train_*.bin to take buffers from")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a median (5)")
    parser.add_argument("--repeat", type=int, default=8, help="micro-batches a round (8)")
    parser.add_argument("--top", type=int, default=25, help="kernels to list; 0: none (25)")
    parser.add_argument("--profile-all", action="store_true",
                        help="list kernels of every file, not of this alone")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.repeat < 1 or args.top < 0:
        parser.error("--rounds and --repeat want at least 1, --top at least 0")
    if not re.fullmatch(r"([1-9]\d{0,3}(,[1-9]\d{0,3})*)?", args.gpus):
        parser.error("--gpus wants numbers with commas between them")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # 1) Refuse what cannot be timed, before processes are started.
    there = torch.cuda.device_count()
    counts = [int(n) for n in args.gpus.split(",")] if args.gpus else [n for n in (1, 2, 4, 8) if n <= there]
    if not there or max(counts) > there:
        return command.report(f"this needs {max(counts, default=1)} GPUs, here are {there}")
    if args.data and not train_shards(args.data):
        return command.report(f"--data {args.data} has no fineweb_train_*.bin")
    for ref in args.compare:
        read_script(ref)
    tg = load_script(THIS_SCRIPT, "bench_this")
    # 2) Be a process of a measurement, or start those of every measurement.
    try:
        tg.Config.from_env()
        if "RANK" in os.environ:
            worker(args, tg)
            return 0
    except tg.UserError as error:
        return command.report(error)
    for count in counts:
        command_line = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={count}", __file__, *(sys.argv[1:] if argv is None else argv)]
        done = subprocess.run(command_line)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    command.run(main)

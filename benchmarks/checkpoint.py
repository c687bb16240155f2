"""What a checkpoint costs, beside `accelerator.save_state`, DeepSpeed's engine and torch's distributed checkpoint.

    python benchmarks/checkpoint.py [--rounds 3] [--resumes 3] [--folder DIR] [--layers 12] [--hidden 768]

Two processes, ZeRO-2, fp32, AdamW, a model of 100M parameters: 1.2 GB of weights and moments. Each round saves and
loads with everything in turn, on the same disk, with `dd` before each. The rivals do not wait for the disk, so `dd`
with fsync is the measure of writing. What training waits for a save beside it is measured in a step: until the call
returns, and before the update until the state is copied; `copy_sec` is that without a step's forward and backward pass
to copy beside. Then each is started anew and loads what it saved, as a run does that goes on:
that is what loading is judged by. Loads are measured twice: from the disk, and from the page cache. Last, the time
from turbolm's resume to its first step is taken apart. The last line is one JSON object.

A resuming turbolm hashes the files while it builds the engine, as the trainer does; what it waits for is the rest of
that and the reading. Within a process, as when a run rolls back, hashing is part of the wait.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = float(os.environ.get("BENCH_STARTED_UNIX_SEC", "0"))  # by the parent, before the interpreter
RECIPE = Path(__file__).parents[1] / "recipes/quickstart/config.yaml"
SEQ_LEN = 256
RIVALS = ["save_state", "deepspeed", "dcp"]
SOURCES = ["disk", "cache"]
TARGETS = {"stall_over_save_state": 0.1, "write_over_dd": 0.8, "load_over_fastest_rival": 1.0}


def overrides(arguments: argparse.Namespace) -> list[str]:
    width = arguments.hidden
    model = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": 1024,
        "vocab_size": 16384,
    }
    return [
        f"model.config={json.dumps(model)}",
        f"data.seq_len={SEQ_LEN}",
        f"train.global_batch={2 * SEQ_LEN}",
        f"execution.micro_batch={SEQ_LEN}",
        "train.precision=fp32",
        "cluster.device=cpu",
        "execution.zero_stage=2",
    ]


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def remember(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    memory = bytearray(2**24)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(memory):
                    pass


class Worker:
    """One rank: the trainer's own engine, and what is measured on it."""

    def __init__(self, arguments: argparse.Namespace):
        self.parts: dict[str, float] = {}
        self.saved = 0
        self.cpu_sec = 0.0
        self._mark = STARTED
        import torch
        import torch.distributed as dist

        from turbolm.checkpoint.verify import hash_ahead, not_hashed
        from turbolm.data.batch.loader import BatchLoader
        from turbolm.data.order.batch_order import recipe_order
        from turbolm.data.prepare.build import find_store
        from turbolm.data.store.token_store import open_store
        from turbolm.engine.start import build_accelerator
        from turbolm.plan.machine import detect_machine
        from turbolm.plan.plan import build_plan
        from turbolm.recipe.load import load_recipe
        from turbolm.train.build import build_engine
        from turbolm.train.run_directory import RunDirectory

        self.torch, self.dist = torch, dist
        recipe = load_recipe(RECIPE, overrides(arguments))
        torch.set_num_threads(1)
        self.part("interpreter and imports")
        plan = build_plan(recipe, detect_machine(), 2)
        self.folder = Path(arguments.folder)
        self.paths = {name: self.folder / name for name in ("turbolm", *RIVALS)}
        self.hashed = not_hashed
        if arguments.worker == "resume" and arguments.contender == "turbolm":  # as early as the trainer
            self.hashed = hash_ahead(self.paths["turbolm"], (int(os.environ["RANK"]), 2))
        self.accelerator = build_accelerator(plan.ds_config, device="cpu", precision="fp32", timeout_sec=1800)
        self.part("process group")
        store = open_store(find_store(recipe) or "missing")
        order = recipe_order(recipe, store, plan.curriculum, save=False)
        self.loader = BatchLoader(order, store, "train", 2, dist.get_rank(), recipe.execution.micro_batch)
        self.part("data")
        self.engine, self.attention = build_engine(self.accelerator, plan, store, RunDirectory(self.folder / "run"))
        self.part("model and engine")
        self.group = dist.new_group(backend="gloo")

    def part(self, name: str) -> None:
        now = time.time()
        self.parts[name], self._mark = now - self._mark, now

    def step(self, index: int) -> float:
        from turbolm.train.step import train_step

        start = time.perf_counter()
        batch = self.loader.global_batch(index)
        self.engine.set_learning_rate(1e-4)
        float(train_step(self.engine, batch.micro_batches, batch.num_targets, self.attention).loss_sum)
        return time.perf_counter() - start

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds until the slowest rank is done; `cpu_sec` is what this rank computed for it."""
        self.dist.barrier()
        start, computed = time.perf_counter(), time.process_time()
        work()
        self.cpu_sec = time.process_time() - computed
        self.dist.barrier()
        return time.perf_counter() - start

    def slowest(self, seconds: float) -> float:
        """The most that any rank has."""
        most = self.torch.tensor(seconds)
        self.dist.all_reduce(most, op=self.dist.ReduceOp.MAX)
        return float(most)

    def saver(self, asynchronous: bool) -> Any:
        from turbolm.checkpoint.retention import Retention
        from turbolm.checkpoint.saver import CheckpointSaver

        return CheckpointSaver(
            folder=self.folder / "turbolm",
            engine=self.engine,
            retention=Retention(1),
            contract_fingerprint="c",
            asynchronous=asynchronous,
            group=self.group,
            report=print,
        )

    def save(self, saver: Any) -> None:
        self.saved += 1
        saver.save(self.saved, {"step": self.saved, "order_digest": ""})

    def step_beside(self, saver: Any, index: int) -> None:
        """A step beside which a checkpoint is saved, until both are done."""
        self.save(saver)
        self.step(index)
        saver.finish()

    def load(self, parts: dict[str, float] | None = None) -> None:
        """As the trainer does it; `parts` gets the seconds, by the clock and of the processor, of both halves."""
        from turbolm.checkpoint.agreement import gather_over
        from turbolm.checkpoint.load import load_checkpoint
        from turbolm.checkpoint.verify import find_newest_valid

        def now() -> tuple[float, float]:
            return time.perf_counter(), time.process_time()

        start = now()
        agree = gather_over(self.group)
        found, rejected = find_newest_valid(self.paths["turbolm"], {"c"}, agree, hashed=self.hashed)
        assert found is not None, rejected
        middle = now()
        load_checkpoint(found, self.engine)
        if parts is not None:
            for unit, first, second, third in zip(("sec", "cpu_sec"), start, middle, now(), strict=True):
                parts[f"verify_{unit}"], parts[f"read_{unit}"] = second - first, third - second

    def load_with(self, name: str, parts: dict[str, float] | None = None) -> None:
        """What `name` saved, into the engine as it is."""
        import torch.distributed.checkpoint as dcp

        path = str(self.paths[name])
        if name == "turbolm":
            self.load(parts)
        elif name == "save_state":
            self.accelerator.load_state(path)
        elif name == "deepspeed":
            self.engine.deepspeed_engine.load_checkpoint(path, tag="bench")
        else:  # spared: copying the weights to the model, which are not in its files
            self.engine.materialise_state()  # it loads into what is there
            dcp.load(self.state_dict(), checkpoint_id=path)

    def state_dict(self) -> dict[str, Any]:
        """The same tensors for torch's distributed checkpoint: each rank its own, under names of its own."""
        from turbolm.checkpoint.snapshot import take_snapshot

        rank = self.dist.get_rank()
        return {f"{rank}/{name}": tensor for name, tensor in take_snapshot(self.engine, 1, {}).tensors.items()}

    def dcp_beside(self, path: Path, group: Any) -> Any:
        import torch.distributed.checkpoint as dcp

        return dcp.async_save(self.state_dict(), checkpoint_id=str(path), process_group=group)

    def forget(self, folder: Path) -> None:
        """Take a folder's files out of the page cache."""
        self.dist.barrier()
        if self.dist.get_rank() == 0:
            forget(folder)
        self.dist.barrier()

    def dd(self, num_bytes: int) -> float:
        """Bytes a second of one sequential write of as much, fsync included."""

        def write() -> None:
            if self.dist.get_rank() == 0:
                count = str(num_bytes // 2**24 + 1)
                target = f"of={self.folder / 'dd'}"
                command = ["dd", "if=/dev/zero", target, "bs=16M", f"count={count}", "conv=fsync"]
                subprocess.run(command, check=True, capture_output=True)
                (self.folder / "dd").unlink()

        return num_bytes / self.timed(write)

    def flushed(self) -> None:
        """Let nothing that was written before disturb what comes next."""
        if self.dist.get_rank() == 0:
            os.sync()
        self.dist.barrier()

    def measure(self, rounds: int) -> dict[str, list[float]]:
        import torch.distributed.checkpoint as dcp

        figures: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            figures.setdefault(name, []).append(value)
            if self.dist.get_rank() == 0:
                print(f"{name}: {value:.4g}", flush=True)

        def note_timed(name: str, work: Callable[[], Any]) -> None:
            note(name, self.timed(work))
            note(name.replace("_sec", "_cpu_sec"), self.cpu_sec)

        self.step(0)
        waiting, beside = self.saver(False), self.saver(True)
        beside.prepare()  # as the trainer does after its first step
        dcp_group = self.dist.new_group(backend="gloo")  # its thread's messages would meet the others
        paths, ours = self.paths, self.paths["turbolm"]
        for index in range(rounds):
            self.save(waiting)
            waiting.finish()
            num_bytes = sum(path.stat().st_size for path in ours.rglob("*") if path.is_file())
            self.flushed()
            disk = self.dd(num_bytes)
            note("dd_bytes_per_sec", disk)
            rate = num_bytes / self.timed(lambda: (self.save(waiting), waiting.finish()))
            note("write_bytes_per_sec", rate)
            disk = (disk + self.dd(num_bytes)) / 2
            note("write_over_dd", rate / disk)
            self.flushed()
            note_timed("step_sec", lambda i=index: self.step(2 * i + 1))
            note_timed("step_and_save_sec", lambda i=index: self.step_beside(beside, 2 * i + 2))
            note("stall_sec", self.slowest(beside.waited_sec))
            self.flushed()
            note("copy_sec", self.timed(lambda: (self.save(beside), beside.wait_for_copy())))
            beside.finish()
            for source in SOURCES:
                if source == "disk":
                    self.flushed()
                    self.forget(ours)
                parts: dict[str, float] = {}
                note_timed(f"load_{source}_sec", lambda p=parts: self.load(p))
                for name, seconds in parts.items():
                    note(f"load_{source}_{name}", seconds)
            rivals: dict[str, Callable[[Path], Any]] = {
                "save_state": lambda path: self.accelerator.save_state(str(path)),
                "deepspeed": lambda path: self.engine.deepspeed_engine.save_checkpoint(str(path), tag="bench"),
                "dcp": lambda path: dcp.save(self.state_dict(), checkpoint_id=str(path)),
            }
            for name, save in rivals.items():
                self.flushed()
                if self.dist.get_rank() == 0:
                    shutil.rmtree(paths[name], ignore_errors=True)
                note_timed(f"{name}_save_sec", lambda s=save, p=paths[name]: s(p))
                self.flushed()
                self.forget(paths[name])
                for source in SOURCES:
                    note_timed(f"{name}_load_{source}_sec", lambda n=name: self.load_with(n))
            self.flushed()
            if self.dist.get_rank() == 0:
                shutil.rmtree(paths["dcp"], ignore_errors=True)
            futures: list[Any] = []
            stall = self.timed(lambda f=futures: f.append(self.dcp_beside(paths["dcp"], dcp_group)))
            note("dcp_async_stall_sec", stall)
            futures[0].result()
            figures["bytes"] = [float(num_bytes)]
        return figures

    def resume(self, name: str, source: str) -> dict[str, Any]:
        """Load what `name` saved into the engine just built; what that took, and for turbolm the parts of the start."""
        if source == "cache" and name != "turbolm" and self.dist.get_rank() == 1:
            remember(
                self.paths[name]
            )  # the machine may have other uses for its memory; turbolm has just hashed its own
        parts: dict[str, float] = {}
        wait_sec = self.timed(lambda: self.load_with(name, parts))
        taken: dict[str, Any] = {"wait_sec": wait_sec, "wait_cpu_sec": self.cpu_sec, **parts}
        # From the interpreter on until all is loaded; hashing beside the building of the engine is in it.
        taken |= {"start_sec": time.time() - STARTED, "start_cpu_sec": time.process_time()}
        if name == "turbolm":
            self.part("load")
            self.step(0)
            self.part("first step")
            self.parts["whole"] = time.time() - STARTED
            taken["parts"] = self.parts
        return taken


def work(arguments: argparse.Namespace) -> None:
    worker = Worker(arguments)
    result: Any = (
        worker.measure(arguments.rounds)
        if arguments.worker == "measure"
        else worker.resume(arguments.contender, arguments.source)
    )
    if worker.dist.get_rank() == 0:
        (Path(arguments.folder) / f"{arguments.worker}.json").write_text(json.dumps(result))
    worker.dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def launch(arguments: argparse.Namespace, what: str, *options: str) -> Any:
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    ranks += ["--rdzv-endpoint", "localhost:0", __file__, "--worker", what, "--folder", arguments.folder]
    ranks += [f"--{key}={getattr(arguments, key)}" for key in ("rounds", "layers", "hidden")] + list(options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_STARTED_UNIX_SEC": str(time.time())}
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}  # as the launcher sets them
    subprocess.run(ranks, env={**environment, **keep, "DS_ACCELERATOR": "cpu"}, check=True)
    return json.loads((Path(arguments.folder) / f"{what}.json").read_text())


def measure_resumes(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """By contender and source, of every round: what a fresh process takes to load. They take turns."""
    resumes: dict[str, list[Any]] = {}
    for _ in range(arguments.resumes):
        for source in SOURCES:
            for name in ("turbolm", *RIVALS):
                folder = Path(arguments.folder) / name
                (remember if source == "cache" else forget)(folder)
                taken = launch(arguments, "resume", f"--contender={name}", f"--source={source}")
                print(f"resume, {name} from {source}: {taken}", flush=True)
                resumes.setdefault(f"{name}_{source}", []).append(taken)
    return resumes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resumes", type=int, default=3, help="rounds of resumes, eight in each")
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    for hidden in ("worker", "contender", "source"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.resumes) < 1:
        parser.error("--rounds and --resumes: at least 1")
    if arguments.worker:
        work(arguments)
    from turbolm.data.prepare.build import prepare
    from turbolm.recipe.load import load_recipe

    prepare(load_recipe(RECIPE, overrides(arguments)))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.folder = folder
        figures = launch(arguments, "measure")
        resumes = measure_resumes(arguments)
    report(figures, resumes)


def ratio(ours: list[float], theirs: list[list[float]]) -> float:
    """Median over the rounds of ours / the best of theirs."""
    return statistics.median(row[0] / min(row[1:]) for row in zip(ours, *theirs, strict=True))


def report(figures: dict[str, list[float]], resumes: dict[str, list[Any]]) -> None:
    for name, taken in resumes.items():
        contender, source = name.rsplit("_", 1)
        for key in taken[0]:
            if key != "parts":
                figures[f"{contender}_restart_{source}_{key}"] = [one[key] for one in taken]

    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratios = {
        "stall_over_save_state": ratio(figures["stall_sec"], [figures["save_state_save_sec"]]),
        "write_over_dd": medians["write_over_dd"],
    }
    for source in SOURCES:
        for unit in ("sec", "cpu_sec"):
            suffix = "_in_cpu_time" if unit == "cpu_sec" else ""
            for ratio_name, ours, theirs in (
                ("load", f"turbolm_restart_{source}_wait_{unit}", f"restart_{source}_wait_{unit}"),
                ("whole_start", f"turbolm_restart_{source}_start_{unit}", f"restart_{source}_start_{unit}"),
                ("load_within_a_process", f"load_{source}_{unit}", f"load_{source}_{unit}"),
            ):
                theirs_by_name = [figures[f"{name}_{theirs}"] for name in RIVALS]
                ratios[f"{ratio_name}_over_fastest_rival_{source}{suffix}"] = ratio(figures[ours], theirs_by_name)
    slower_load = max(ratios[f"load_over_fastest_rival_{source}"] for source in SOURCES)
    met = {
        "stall_over_save_state": ratios["stall_over_save_state"] <= TARGETS["stall_over_save_state"],
        "write_over_dd": ratios["write_over_dd"] >= TARGETS["write_over_dd"],
        "load_over_fastest_rival": slower_load <= TARGETS["load_over_fastest_rival"],
    }
    is_rival = tuple(f"{name}_" for name in RIVALS)
    print(
        json.dumps(
            {
                "bench": "checkpoint",
                "figures": {name: value for name, value in medians.items() if not name.startswith(is_rival)},
                "rivals": {name: value for name, value in medians.items() if name.startswith(is_rival)},
                "ratios": ratios,
                "restart_sec": {source: resumes[f"turbolm_{source}"][-1]["parts"] for source in SOURCES},
                "targets": TARGETS,
                "met": met,
            }
        )
    )


if __name__ == "__main__":
    main()

"""Generated times, sizes, dependencies, features and hosts: a recipe reads them as the real Slurm does, or refuses.

Each is given to `sbatch --hold`, which tells what it read; `--test-only` tells no more than whether it could.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator

from pydantic import ValidationError

from turbolm.recipe.execution import Slurm
from turbolm.recipe.slurm_values import slurm_clock
from turbolm.units import parse_duration

from .cluster import SlurmCluster

SCRIPT = "#!/bin/bash\ntrue\n"


def ours(key: str, text: str) -> tuple[object, str]:
    """What a recipe makes of a text: (value, "") or (None, why it is refused)."""
    try:
        return getattr(Slurm.model_validate({key: text, "stop_grace": 1}), key), ""
    except ValidationError as error:
        return None, error.errors()[0]["msg"]


def theirs(cluster: SlurmCluster, option: str, field: str) -> str | None:
    """What Slurm made of an option of a job, or None where it refused it."""
    done = subprocess.run(
        ["sbatch", "--parsable", "--hold", option], input=SCRIPT, env=cluster.env, cwd=cluster.root / "jobs",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return None
    job_id = int(done.stdout)
    try:
        return cluster.job(job_id)[field]
    finally:
        cluster.run("scancel", str(job_id))


def minutes(limit: str) -> int | str:
    """`scontrol show job` says D-HH:MM:SS, HH:MM:SS or UNLIMITED."""
    if limit == "UNLIMITED":
        return limit
    days, _, clock = limit.rpartition("-")
    hours, mins, secs = map(int, clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + mins + (secs > 0)


def times(rng: random.Random) -> Iterator[str]:
    yield from ("0", "60", "UNLIMITED", "infinite", "-1", "1-", "1-12:", "1h", ":30", "30:", "1::3", "1-2-3", "1.5", "")
    for _ in range(50):
        numbers = [rng.choice(["0", "1", "07", "30", "59", "90"]) for _ in range(rng.randint(1, 4))]
        yield (f"{rng.randrange(40)}-" if rng.random() < 0.5 else "") + ":".join(numbers)


def test_times(cluster: SlurmCluster) -> None:
    compared = 0
    for text in times(random.Random(0)):
        (read, why), limit = ours("time", text), theirs(cluster, f"--time={text}", "TimeLimit")
        two_readings = re.search(r"is (\d+) minutes for sbatch|for others; write (\w+) or", why)
        if read is not None and not (read == 3600 and text == "1h"):
            assert limit is not None, text
            expected = read if isinstance(read, str) else -(-int(str(read)) // 60)
            assert minutes(limit) == expected == minutes(theirs(cluster, f"--time={slurm_clock(read)}", "TimeLimit"))  # type: ignore[arg-type]
            compared += 1
        elif two_readings:
            told = int(two_readings[1] or 0) or -(-parse_duration(two_readings[2] or "0") // 60)
            assert limit is not None and minutes(limit) == (told or "UNLIMITED"), text
            compared += 1
        elif read is None:
            assert limit in (None, "UNLIMITED") or text == "1-" or ":" in text, text
    assert compared > 30


def test_memory(cluster: SlurmCluster) -> None:
    rng = random.Random(0)
    for number in ("0", "1", "4096", "7", "1.5", "-1"):
        for unit in ("", "K", "M", "G", "k", "m", "g", "KB", "MB", "GB", "gb", "B", "Gi", "GiB", "P", "x"):
            text = f"{number}{unit}"
            if rng.random() < 0.4 and unit not in ("", "GB"):
                continue
            (read, _), size = ours("mem", text), theirs(cluster, f"--mem={text}", "MinMemoryNode")
            assert (read is None) == (size is None), text
            if read is not None:
                assert theirs(cluster, f"--mem={read}", "MinMemoryNode") == size


def test_dependencies(cluster: SlurmCluster) -> None:
    rng = random.Random(0)
    job_id = cluster.sbatch("--hold", script=SCRIPT)
    kinds = ["afterok", "afterany", "AFTERNOTOK", "aftercorr", "after", "foo"]
    outcomes = set()
    for _ in range(50):
        items = [
            rng.choice(["singleton", f"{rng.choice(kinds)}:{job_id}", f"after:{job_id}+{rng.randint(1, 9)}", "afterok"])
            for _ in range(rng.randint(1, 3))
        ]
        text = "".join(part for item in items for part in (rng.choice(",?"), item))[1:]
        (read, _), dependency = ours("dependency", text), theirs(cluster, f"--dependency={text}", "Dependency")
        is_mixed = "," in text and "?" in text  # `?` for Slurm, which says nothing
        assert (read is None) == (dependency is None or is_mixed), text
        outcomes.add((read is None, is_mixed))
    assert len(outcomes) == 3
    cluster.run("scancel", str(job_id))


def features(rng: random.Random, depth: int = 0) -> str:
    """An expression that sbatch(1) allows."""
    if depth == 2 or rng.random() < 0.4:
        return rng.choice(["ib", "ssd"])
    joined = rng.choice("&|,").join(features(rng, depth + 1) for _ in range(rng.randint(1, 2)))
    return rng.choice(["{}", "{}", "({})"]).format(joined)


def spoiled(rng: random.Random, text: str, letters: str) -> str:
    """`text` with one letter more, or as it is."""
    place = rng.randint(0, len(text))
    return text[:place] + rng.choice(["", *letters]) + text[place:]


def test_features(cluster: SlurmCluster) -> None:
    rng, taken, refused = random.Random(0), 0, 0
    for number in range(80):
        text = spoiled(rng, features(rng), "&|()[]" if number % 2 else "")
        (read, _), by_slurm = ours("constraint", text), theirs(cluster, f"--constraint={text}", "Features")
        taken, refused = taken + (read is not None and by_slurm is not None), refused + (read is None)
        if read is None:
            assert by_slurm is None or re.search(r"[&|,]\)*$", text), (text, by_slurm)
    assert taken > 20 and refused > 5


def test_hosts(cluster: SlurmCluster) -> None:
    """What `scontrol show hostnames` expands; a bracket left in a name is one that it did not understand."""
    rng, taken, refused = random.Random(0), 0, 0
    for number in range(120):
        parts = [
            rng.choice(["a", "b1", "n-x.y", "a[1-3]", "b[2,4-5]c[07-09]", "a[1][2]"]) for _ in range(rng.randint(1, 3))
        ]
        text = spoiled(rng, ",".join(parts), "[],-3" if number % 2 else "")
        command = ["scontrol", "show", "hostnames", text]
        done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=False)
        is_misread = any(set("[]") & set(name) for name in done.stdout.split())
        by_slurm = done.returncode == 0 and "nvalid" not in done.stderr and not is_misread
        read, _ = ours("nodelist", text)
        taken, refused = taken + (read is not None and by_slurm), refused + (read is None)
        if read is None:
            assert not by_slurm or re.search(r"^[,-]|,,|,$|,-|\d-[,\]]", text), (text, done.stdout)
        elif not re.search(r"\][^,\[]+(,|$)", text):  # a suffix, which Slurm 22.05 refuses aloud
            assert by_slurm, (text, done.stdout, done.stderr)
    assert taken > 50 and refused > 10

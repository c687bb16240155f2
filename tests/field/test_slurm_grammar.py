"""Slurm's grammar in a recipe: the forms that sbatch(1) documents, and what is refused with its readings.

tests/slurm/test_grammar.py compares generated texts with a real Slurm.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from turbolm.recipe.execution import Slurm
from turbolm.recipe.slurm_values import slurm_clock

# sbatch(1), --time: "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes" and
# "days-hours:minutes:seconds"; the first two are refused, for they are read otherwise elsewhere.
READ = [
    ("time", "1:30:00", "0-01:30:00"),
    ("time", "01:30:00", "0-01:30:00"),
    ("time", "30:90:00", "1-07:30:00"),  # as Slurm 22.05 reads it
    ("time", "2-12", "2-12:00:00"),
    ("time", "2-12:30", "2-12:30:00"),
    ("time", "2-12:30:15", "2-12:30:15"),
    ("time", "1h30m", "0-01:30:00"),
    ("time", "3d", "3-00:00:00"),
    ("time", "UNLIMITED", "UNLIMITED"),
    ("time", "infinite", "UNLIMITED"),
    ("time", -1, "UNLIMITED"),
    ("mem", 4096, "4096"),
    ("mem", "4096", "4096"),
    ("mem", 0, "0"),
    ("mem", "4G", "4G"),
    ("mem", "4GB", "4G"),
    ("mem", "4g", "4G"),
    ("mem", "512kb", "512K"),
    ("mem", "1T", "1T"),
    ("nodelist", "a[1-3,7],b", "a[1-3,7],b"),
    ("nodelist", "a[1-2]b[01-02]", "a[1-2]b[01-02]"),
    ("nodelist", "./hosts.txt"[1:], "/hosts.txt"),
    ("exclude", "node[03,07-09]", "node[03,07-09]"),
    ("dependency", "after:1+5:2", "after:1+5:2"),
    ("dependency", "afterok:12:13,afterany:14", "afterok:12:13,afterany:14"),
    ("dependency", "afterok:1_2?singleton", "afterok:1_2?singleton"),
    ("constraint", "ib&ssd", "ib&ssd"),
    ("constraint", "[rack1|rack2|rack3]", "[rack1|rack2|rack3]"),
    ("constraint", "[rack1*2&rack2*4]", "[rack1*2&rack2*4]"),
    ("constraint", "(knl&snc4)|haswell", "(knl&snc4)|haswell"),
]
REFUSED = [
    ("time", 60, "60 minutes for sbatch and 60 seconds in the rest of a recipe; write 60m or 60s"),
    ("time", "60", "write 60m or 60s"),
    ("time", 0, "UNLIMITED for no limit, which 0 is for sbatch"),
    ("time", "0-0", "more than 0"),
    ("time", "30:00", "minutes and seconds for Slurm, hours and minutes for others; write 30m00s or 30h00m"),
    ("time", "99999999-0", "at most 3650 days"),  # Slurm 22.05 counts in 32 bits
    ("time", "1-", "expected a duration"),
    ("time", "-5", "expected a duration"),  # 2,982,611 days for Slurm 22.05
    ("time", True, "expected a time limit"),
    ("time", 1.5, "expected a time limit"),
    ("stop_grace", "05:00", "write 05m00s or 05h00m"),
    ("mem", "4GiB", "a size as Slurm writes it"),
    ("mem", "1.5G", "a size as Slurm writes it"),
    ("mem", "4 G", "a size as Slurm writes it"),
    ("mem", -1, "a size as Slurm writes it"),
    ("nodelist", "a[1-3", "hosts as Slurm lists them"),  # one host, `a]`, for Slurm 22.05
    ("nodelist", "a1-3]", "hosts as Slurm lists them"),
    ("nodelist", "a[3-1]", "hosts as Slurm lists them"),
    ("nodelist", "a,,b", "hosts as Slurm lists them"),
    ("exclude", "a[1-3]*2", "hosts as Slurm lists them"),
    ("dependency", "1234", "did you mean afterok:1234, or afterany:1234"),
    ("dependency", "afterok", "jobs to wait for"),
    ("dependency", "afterok:x", "jobs to wait for"),
    ("dependency", "foo:1", "jobs to wait for"),
    ("dependency", "afterok:1,afterany:2?afterok:3", "all joined by `,` or all by"),
    ("constraint", "ib&", "features as sbatch takes them"),
    ("constraint", "(ib", "features as sbatch takes them"),
    ("constraint", "[ib|ssd", "features as sbatch takes them"),
    ("constraint", "ib(ssd)", "features as sbatch takes them"),
]


@pytest.mark.parametrize(("key", "text", "for_slurm"), READ)
def test_read_as_sbatch_reads_it(key: str, text: Any, for_slurm: str) -> None:
    slurm = Slurm.model_validate({key: text, "stop_grace": 1})
    value = getattr(slurm, key)
    assert (slurm_clock(value) if key == "time" else value) == for_slurm
    assert Slurm.model_validate(slurm.model_dump(mode="json", exclude_none=True) | {"seeds": []}) == slurm


@pytest.mark.parametrize(("key", "text", "reason"), REFUSED)
def test_refused_with_the_readings(key: str, text: Any, reason: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Slurm.model_validate({key: text})
    assert reason in str(refusal.value)

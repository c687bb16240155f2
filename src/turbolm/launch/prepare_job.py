"""The job of one node that prepares the data before the training job starts. Torch-free.

Nodes with GPUs should not wait while one of them tokenizes. `turbolm submit` hands Slurm two jobs: NAME-prepare, which
runs `turbolm prepare` for each run of the submission, and the training job, which waits for it with afterok.
"""

from __future__ import annotations

import re

from turbolm.data.batch.kept_sets import are_kept
from turbolm.data.order.batch_order import is_order_kept, table_folder
from turbolm.data.prepare.build import find_store, store_folder
from turbolm.data.prepare.remote_store import fetched_so_far
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.hub import find_origins, pretrained_folder
from turbolm.launch.store import run_curriculum
from turbolm.recipe.schema import Recipe
from turbolm.train.run_contract import with_commits

_OF_THE_JOB = re.compile(r"singleton|aftercorr\b", re.IGNORECASE)  # they mean the training job's name and its tasks


def is_wanted(recipe: Recipe) -> bool:
    """Whether a job of its own prepares the recipe's data where they are not there.

    Not for one node without GPUs: nothing dear waits there, and a second job would queue a second time.
    """
    cluster = recipe.cluster
    assert cluster.slurm is not None
    return cluster.slurm.prepare.separate and (cluster.num_nodes > 1 or cluster.gpus_per_node is not None)


def is_prepared(recipe: Recipe) -> bool:
    """Whether all that is prepared for the recipe's next start is on this file system.

    Token store, plan table, the documents of sets behind URLs, and pretrained weights.

    What cannot be told here, such as sources that only the nodes see, counts as missing.
    """
    recipe = with_commits(recipe)
    try:
        if any(origin.section == "model" for origin in find_origins(recipe)):
            pretrained_folder(recipe.model)
        folder = find_store(recipe)
        if folder is None:
            return False
        store = open_store(folder)
        return is_order_kept(recipe, store, run_curriculum(recipe)) and are_kept(recipe, store)
    except (UserError, OSError):
        return False


def prepared_bytes(recipe: Recipe) -> int:
    """The bytes of store, fetch and plan table that are written so far: what a stopped prepare goes on from."""
    recipe = with_commits(recipe)
    try:
        folder = store_folder(recipe)
        folders = [folder, *(fetched_so_far(folder.parent) if recipe.execution.store else ())]
        if (found := find_store(recipe)) is not None:
            folders.append(table_folder(recipe, open_store(found), run_curriculum(recipe)))
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*"))
    except (UserError, OSError):
        return 0


def recipe_of_job(recipe: Recipe) -> Recipe:
    """The recipe as its prepare job asks for a node: one, without GPUs, as `cluster.slurm.prepare` says.

    Raises UserError for a dependency that cannot be divided.
    """
    cluster = recipe.cluster
    slurm = cluster.slurm
    assert slurm is not None
    own = slurm.prepare
    taken = {name: getattr(own, name) or getattr(slurm, name) for name in ("partition", "account", "qos", "time")}
    counts_nodes = slurm.constraint is not None and "*" in slurm.constraint
    changes = {
        **taken,
        "exclusive": slurm.exclusive and own.cpus_per_task is None,
        "cpus_per_task": own.cpus_per_task or slurm.cpus_per_task,
        "mem": own.mem or slurm.mem,
        "nodelist": None,  # sbatch refuses more hosts than nodes
        "constraint": None if own.partition or counts_nodes else slurm.constraint,
        "reservation": None if own.partition else slurm.reservation,
        "dependency": divide_dependency(slurm.dependency)[0],
        "seeds": (),
    }
    one_node = {"num_nodes": 1, "gpus_per_node": None, "gpu": None, "slurm": slurm.model_copy(update=changes)}
    return recipe.model_copy(update={"name": f"{recipe.name}-prepare", "cluster": cluster.model_copy(update=one_node)})


def divide_dependency(dependency: str | None) -> tuple[str | None, list[str]]:
    """What of the user's dependency the prepare job waits for, and what stays with the training job.

    Raises UserError where one of several is enough (`?`), and some mean the training job itself.
    """
    if dependency is None:
        return None, []
    if "?" in dependency:
        if _OF_THE_JOB.search(dependency):
            raise UserError(
                f"cluster.slurm.dependency: {dependency} cannot be divided between the training job and the job that "
                "prepares its data; run `turbolm prepare RECIPE` first, or set cluster.slurm.prepare.separate=false"
            )
        return dependency, []
    items = dependency.split(",")
    stays = [item for item in items if _OF_THE_JOB.match(item)]
    return ",".join(item for item in items if item not in stays) or None, stays

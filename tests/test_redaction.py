"""Secrets of the environment and of URLs reach no message; a recipe that spells one out is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.harness import make_recipe
from turbolm.errors import RunError, UserError
from turbolm.launch.slurm import write_submission
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.redaction import holds_secret, is_secret_name, redact
from turbolm.reliability.outcome import read_rank_ends, record_rank_end

CANARY = "c4n4ry-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://user:{CANARY}@host/data?x=1", "https://***@host/data?x=1"),
        (f"https://{CANARY}@github.com/x.git", "https://***@github.com/x.git"),
        (f"https://host/x?token={CANARY}&b=1", "https://host/x?token=***&b=1"),
        (f"https://s3/x?a=1&X-Amz-Signature={CANARY}", "https://s3/x?a=1&X-Amz-Signature=***"),
        (f"https://blob/x?sv=2020&sig={CANARY}%3D'", "https://blob/x?sv=2020&sig=***'"),
        (f"https://host/x?api_key={CANARY}#top", "https://host/x?api_key=***#top"),
        (f"export HF_TOKEN={CANARY}", "export HF_TOKEN=***"),
        (f'AWS_SECRET_ACCESS_KEY="{CANARY}"', 'AWS_SECRET_ACCESS_KEY="***"'),
        (f"environment={{WANDB_API_KEY: {CANARY}, A: b}}", "environment={WANDB_API_KEY: ***, A: b}"),
        (f"Authorization: Bearer {CANARY}", "Authorization: Bearer ***"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        (f"authorization: token {CANARY}", "authorization: token ***"),
        (f"Authorization: {CANARY}", "Authorization: ***"),
        (f"{{'Authorization': 'Bearer {CANARY}', 'Accept': '*'}}", "{'Authorization': 'Bearer ***', 'Accept': '*'}"),
        (f"X-Api-Key: {CANARY}", "X-Api-Key: ***"),
        (f"PRIVATE-TOKEN: {CANARY}", "PRIVATE-TOKEN: ***"),
        (f"set-cookie: {CANARY}; Path=/", "set-cookie: ***; Path=/"),
        (f'"api_key": "{CANARY}"', '"api_key": ***'),
        (f"'access_token':'{CANARY}'", "'access_token':***"),
        (f"password = '{CANARY} with blanks'", "password = ***"),
        (f"hf_token: {CANARY}", "hf_token: ***"),
        (f"db_pass={CANARY}", "db_pass=***"),
        (f"export DB_PASS={CANARY}", "export DB_PASS=***"),
        (f"MYSQL_PWD={CANARY} mysql", "MYSQL_PWD=*** mysql"),
        (f"s3://user:p@ss@{CANARY}@host/x", "s3://***@host/x"),
        (f"postgres://me:{CANARY}@db:5432/x", "postgres://***@db:5432/x"),
        (f"Server=db;User Id=me;Password={CANARY};", "Server=db;User Id=me;Password=***;"),
        (f"AccountName=a;AccountKey={CANARY}==;EndpointSuffix=x", "AccountName=a;AccountKey=***;EndpointSuffix=x"),
        (f"401 for hf_{'a' * 34} here", "401 for *** here"),
        (f"ghp_{'A1' * 18}", "***"),
        (f"key sk-proj-{'a1' * 12}.", "key ***."),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
    ],
)
def test_what_is_hidden(text: str, shown: str) -> None:
    assert redact(text, {}) == shown
    assert holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x?page=2&sort=key",
        "docker://me@registry.example#image:1",
        "export HF_TOKEN=$(cat ~/.token)",
        'export HF_TOKEN="$OTHER"',
        "TOKENIZERS_PARALLELISM=false",
        "evaluation.tokens=100k",
        "model.config={pad_token_id: 0}",
        "cluster.slurm.environment.HF_TOKEN: expected text",
        "a@b.c: 3/4",
        "eos_token: </s>",
        "tokenizer.special_tokens_in_text: keep",
        "pad_token='<pad>'",
        "max_tokens=64, min_tokens: 5",
        "password: expected text",
        "step 10: 14k tokens/s, key: value",
        "the basic idea; the bearer of news",
        "hf_hub_download and sk-learn",
        "PWD=/home/me",
        "http://[::1]:8080/x",
        "api_key=$KEY",
        "bypass: 3 compass: 4",
    ],
)
def test_what_stays(text: str) -> None:
    assert redact(text, {}) == text


def test_names_of_secrets() -> None:
    secret = "HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY MY_PASSWORD DB_PASSWD GITHUB_PAT TOKEN hf_token".split()
    secret += ["DB_PASS", "MYSQL_PWD"]
    plain = "TOKENIZERS_PARALLELISM NCCL_DEBUG HF_TOKEN_PATH KEYBOARD PATH PWD OLDPWD COMPASS HF_HOME MONKEY".split()
    assert all(map(is_secret_name, secret)) and not any(map(is_secret_name, plain))


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("SHORT_KEY", "on")
    assert redact(f"failed with {CANARY} on x") == "failed with *** on x"
    for kind in (UserError, RunError):
        assert str(kind(f"401 for {CANARY}")) == "401 for ***"
    record_rank_end(tmp_path, 1, "error", f"401 for {CANARY}")
    assert read_rank_ends(tmp_path)[0].message == "401 for ***"


def test_a_worker_that_fails_tells_no_secret(tmp_path: Path) -> None:
    """The traceback of a rank goes to its log and to the terminal."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(tmp_path)), encoding="utf-8")
    code = (
        "import sys, types\n"
        f"def fail(*_): raise OSError('403 for https://user:{CANARY}@host/x')\n"
        "sys.modules['turbolm.train.worker'] = types.SimpleNamespace(run_worker=fail)  # without torch\n"
        "import turbolm.train.__main__ as start\n"
        f"sys.argv = ['x', '--recipe', {str(recipe)!r}, '--attempt', '1']\n"
        "sys.exit(start.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OSError: 403 for https://***@host/x" in done.stderr
    assert CANARY not in done.stdout + done.stderr
    assert read_rank_ends(tmp_path / "runs/cell/attempts/1")[0].message == "OSError: 403 for https://***@host/x"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"data.sources.0.path=https://user:{CANARY}@host/x.jsonl", "data.sources.0.path"),
        (f"tokenizer={{path: 'https://host/x?token={CANARY}'}}", "tokenizer"),
        (f"cluster.slurm.setup=[export HF_TOKEN={CANARY}]", "cluster.slurm.setup.0"),
        (f"cluster.slurm.environment.HF_TOKEN={CANARY}", "cluster.slurm.environment"),
        (f"cluster.slurm.environment={{DATA: 'https://u:{CANARY}@h/'}}", "cluster.slurm.environment.DATA"),
        (f"name=https://user:{CANARY}@host/", "name"),
    ],
)
def test_a_recipe_that_spells_out_a_secret_is_refused(override: str, key: str, tmp_path: Path) -> None:
    """It would end up in the run directory, the job's script and the model card."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(tmp_path)), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [override])
    assert f" {key}: " in str(caught.value)
    assert key == "name" or "a recipe is copied to the run directory" in str(caught.value)
    assert CANARY not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_job_takes_its_secrets_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch passes it on; neither the script nor the recipe beside it holds a value."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    recipe = make_recipe(tmp_path, cluster={"slurm": {"setup": ["export OTHER_TOKEN=$(cat /run/token)"]}})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_submission(tmp_path / "recipe.yaml", [])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"submit.slurm", "recipe.yaml"} <= {path.name for path in written}
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]

"""What many tests share: small models and texts, and the pipeline of this tree with tiny parameters."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a waiting thread leaves its core to others

import pytest
import torch
from torch import Tensor

from lego import DeepSupervisionTransformer, Trainer, create_standard_config
from lego.base.artifacts import read_json

ROOT = Path(__file__).resolve().parent.parent
os.environ["TOKENIZERS_PARALLELISM"] = "true"
torch.set_num_threads(1)

VOCAB = 97
LONGEST = ("test_dvc.py", "test_experiments.py", "test_golden.py", "test_runs.py")
SOURCE = inspect.getsource(argparse)  # real text


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: workers take whole files (`--dist loadfile`), and one would wait for them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def random_batches(count: int, batch: int = 4, length: int = 12, vocab: int = VOCAB, seed: int = 0) -> list:
    """(x, y) batches of a noisy cyclic language: y = x + 1 most of the time, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        start = torch.randint(0, vocab, (batch, 1), generator=generator)
        rows = (start + torch.arange(length + 1)) % vocab  # (B, T + 1)
        noise = torch.randint(0, vocab, rows.shape, generator=generator)
        rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.3, noise, rows)
        batches.append((rows[:, :-1], rows[:, 1:]))
    return batches


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return random_batches(6)


@pytest.fixture(scope="module")
def block1() -> DeepSupervisionTransformer:
    """A trained two-layer block 1."""
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2)
    trainer = Trainer(create_standard_config(2), VOCAB)
    optimizer = trainer.create_optimizer(model, 3e-3)
    for _ in range(6):
        trainer.train_epoch(model, random_batches(40, seed=1), optimizer)
    return model.eval()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """A known seed before each test, and torch's switches as they were after it: stages set them for their process."""
    torch.manual_seed(0)
    yield
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


def committed(path: str) -> str:
    """A file of the tree as the last commit has it: runs rewrite metrics and locks in the work tree."""
    return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def logits_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def train_llama(folder: Path) -> None:
    """A Llama that has learned something of SOURCE: trained, and saved with its tokenizer, by transformers alone."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lego.text.tokenizer import TextEncoder, fit_bpe

    TextEncoder.fitted(fit_bpe([SOURCE], 300, 10**6)).save(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304,  # more rows than the tokenizer has ids, as checkpoints often have
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(SOURCE)["input_ids"])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    model = LlamaForCausalLM(config)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for step in range(60):
        batch = ids[torch.arange(8 * step, 8 * step + 8) % len(ids)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.5
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of transformers' own, see `train_llama`."""
    folder = tmp_path_factory.mktemp("llama")
    train_llama(folder)
    return folder


TINY = {
    "stdlib_tests": "false",
    "vocab_size": 300,
    "max_tokenizer_bytes": 200_000,
    "max_train_tokens": 60_000,
    "max_validation_tokens": 2_500,
    "max_calibration_tokens": 4_000,
    "max_test_tokens": 2_500,
    "dim": 32,
    "ffn_dim": 64,
    "seq_len": 32,
    "batch_size": 8,
    "tokens_per_epoch": 8_000,
    "warmup_steps": 2,
    "phase1_lr": "3.0e-03",
    "phase1_epochs": 3,
    "phase2_share": "0.5",
    "phase2_lr": "1.0e-03",
    "phase2_layers": "4",
    "phase2_epochs": 2,
    "lr": "1.0e-03",
    "shard_tokens": 9_000,
    "threads": 1,
}


COPIED = {"lego", "stages", "tables", "text", ".ci", ".dvc", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"}


class Clone:
    """A git repository in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_this_tree(cls, folder: Path) -> Clone:
        """A new repository with this tree's pipeline and tiny parameters."""
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in files.stdout.splitlines():
            if name.split("/")[0] in COPIED and not name.endswith("dvc.lock"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        text = (folder / "params.yaml").read_text()
        for key, value in TINY.items():
            text, count = re.subn(rf"(?m)^(  {key}: )\S+", rf"\g<1>{value}", text)
            assert count >= 1, key
        (folder / "params.yaml").write_text(text)
        clone = cls(folder)
        clone.run("git", "init", "-q")
        clone.commit("the tree")
        return clone

    @property
    def environment(self) -> dict[str, str]:
        """Of its commands: this Python's own come first, and git knows who commits."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        identity = {
            f"GIT_{who}_{what}": "lego@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        return os.environ | identity | {"PATH": path, "DVC_NO_ANALYTICS": "1"}

    def run(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def json(self, name: str) -> dict:
        return read_json(self.folder / name)


def ran(output: str, pipeline: str = "") -> list[str]:
    """Stages that dvc says it ran: of the root's dvc.yaml, or of the one that is named."""
    place = re.escape(f"{pipeline}:") if pipeline else ""
    return re.findall(rf"^Running stage '{place}([\w@]+)':$", output, re.M)


def run_in_process(folder: Path, stages: list[str]) -> None:
    """Runs stages one after another in this process, in a folder with params.yaml."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        for stage in stages:
            importlib.import_module(f"stages.{stage}").main()
    finally:
        os.chdir(before)

"""What every stage does around its work: fixed threads and seeds, one clear error line, a record of the run."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lego.base.artifacts import ArtifactError, derived_seed, write_json
from lego.base.digests import verify
from lego.base.outside import printable
from lego.base.parameter_files import ParamsError
from lego.base.scratch import SCRATCH, BusyError, fingerprint, only_run, pipeline_entry

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h
RECOVERY = "mend it and run the same command again: what was made before comes from dvc's cache"
RECORDED_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "datasets", "pydantic")


class StageError(RuntimeError):
    """A stage that cannot go on, for a reason the user can mend; the message says how."""


def resolve_device(name: str) -> torch.device:
    """The device a `train.device` value names; `auto` takes cuda, then mps, then cpu.

    Raises:
        StageError: the named device is not available here.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available[name]:
        raise StageError(f"params.yaml: train.device is {name}, but this machine has none; use auto or cpu")
    return torch.device(name)


def reuse_freed_memory() -> None:
    """Lets glibc keep large freed blocks: else every step maps and clears the pages of its logits anew."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(option, 2**30)


def _interpreter() -> str:
    """sys.executable, relative to the working folder where it lies inside it, so that clones agree."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


def _verify_inputs(stage: str) -> None:
    try:
        deps = pipeline_entry(stage)["deps"]
    except KeyError:  # of no pipeline
        return
    for dep in deps:
        if dep.startswith("data/"):
            verify(dep)


class Stage:
    """Context of one stage: `with Stage("tokenize", seed=0, threads=2) as stage: ...`

    On entry it takes the stage's lock and fixes the number of threads, the seed and deterministic kernels. On success
    it removes the scratch folder and writes `data/timing/<name>.json`, the only file that holds times, rates and
    the environment; no stage depends on it.

    Args:
        name: the stage's name as `lego.base.scratch.pipeline_entry` takes it, `group@key` if it is one of a foreach.
        seed: the run's seed; the stage's own is `stage.seed`.
        threads: CPU threads of torch.

    Raises:
        BusyError: the stage is already running here.
        ArtifactError: an input is not as its stage wrote it; said at once, not after hours of training.
    """

    def __init__(self, name: str, seed: int = 0, threads: int = 1) -> None:
        self.name, self.seed = name, derived_seed(seed, name)
        self.threads = threads
        self.record: dict[str, Any] = {}
        self.kept = self.continued = False
        self.parent = os.getppid()
        self.lock = only_run(name)

    @cached_property
    def scratch(self) -> Path:
        """What outlives a killed or failed run, for a run of the same code, parameters and inputs to continue from."""
        return SCRATCH / self.name / fingerprint(self.name)

    def keep(self, name: str) -> Path:
        """A folder for the best model so far, which outlives a failure of this stage."""
        self.kept, folder = True, self.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def __enter__(self) -> Stage:
        _verify_inputs(self.name)
        self.lock.__enter__()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        reuse_freed_memory()
        torch.set_num_threads(self.threads)
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would load the compiler: 2 s a stage
        # nothing here reads memory before it is written, so it need not be filled for determinism
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(self.seed)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._succeed()
            elif self.kept:
                print(f"{self.name}: the best model it reached is in {self.scratch}/", file=sys.stderr)
        finally:
            self.lock.__exit__(None, None, None)

    def _succeed(self) -> None:
        seconds = time.perf_counter() - self._start
        counts = self.record.pop("counts", {})
        if self.continued:  # part of the work was done, and timed, by another run
            counts = {}
        rates = {f"{unit}_per_second": count / seconds for unit, count in counts.items()}
        environment = {
            "python_executable": _interpreter(),
            "python_version": platform.python_version(),
            "threads": self.threads,
            "continued": self.continued,
            **{f"{package}_version": version(package) for package in RECORDED_PACKAGES},
        }
        folder, slash, name = self.name.rpartition("/")
        file = f"data/timing/{folder}{slash}{name.split('@')[-1]}.json"
        write_json(file, {"seconds": seconds, **rates, **environment, **self.record})
        if os.getppid() == self.parent:  # else dvc was killed and will run this again: from here, in no time
            shutil.rmtree(SCRATCH / self.name, ignore_errors=True)


def exit_cleanly(main: Callable[[], None]) -> None:
    """Runs a stage's main(); errors a user can mend become one line on stderr and exit code 1."""
    try:
        main()
    except (ParamsError, ArtifactError, StageError, BusyError, FloatingPointError) as error:
        sentence = str(error)
    except torch.OutOfMemoryError as error:
        sentence = f"{str(error).splitlines()[0]}; lower train.batch_size or evaluation.batch_size"
    except OSError as error:
        sentence = f"{error.filename or 'a file'}: {error.strerror or error}; {_remedy(error)}"
    else:
        return
    print(f"error: {printable(' '.join(sentence.split()))} ({RECOVERY})", file=sys.stderr)
    raise SystemExit(1)


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            unpacked = f", or on that of {tempfile.gettempdir()}, where files are unpacked; TMPDIR names another folder"
            return "make room on the disk" + ("" if error.filename else unpacked)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "let this user write there"
        case _:
            return "see that it is there and can be read"

"""Answers, trust and whether to believe them, for the rows of a table.

python -m lego.satipatthana.predict rows.csv --system data/satipatthana/system --out answers.csv
python -m lego.satipatthana.predict rows.parquet --label species          also says how often accepted rows are right
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lego.base.artifacts import ArtifactError, write_text
from lego.base.harness import StageError
from lego.base.outside import printable
from lego.base.parameter_files import ParamsError
from lego.base.progress import track
from lego.satipatthana.jobs import probabilities
from lego.satipatthana.store import Use, load, standardized
from lego.satipatthana.system import Output, Satipatthana
from lego.satipatthana.tables import TaskError, features_of, read_table

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # with which a cell begins that a spreadsheet computes
AT_A_TIME = 1024  # rows, which changes no answer


def answers(system: Satipatthana, use: Use, x: torch.Tensor) -> pd.DataFrame:
    """One row an input: answer, its probability (classes alone), trust, how often such trust is right (not of
    anomalies), whether it is accepted, whether the gate knew it, steps and recon_error.

    Args:
        system: trained.
        use: what goes with it.
        x: inputs (n, *shape), standardized.
    """
    parts = [_part(system, use, rows) for rows in _batches(x)]
    return pd.concat(parts, ignore_index=True)


def _batches(x: torch.Tensor) -> Iterator[torch.Tensor]:
    parts = x.split(AT_A_TIME)
    yield from track(parts, len(x), "answering", "row", len)


def _part(system: Satipatthana, use: Use, x: torch.Tensor) -> pd.DataFrame:
    found = system(x)
    trust = found.trust[:, 0].double().numpy()
    return pd.DataFrame(
        _answer(system, use, found)
        | {
            "trust": trust,
            **({} if system.decoder is None else {"trust_calibrated": use.trust(trust)}),
            "accepted": trust >= use.threshold,
            "known": found.known.numpy(),
            "steps": found.steps.numpy(),
            "recon_error": found.recon_error[:, 0].double().numpy(),
        }
    )


def _answer(system: Satipatthana, use: Use, found: Output) -> dict[str, Any]:
    job = system.params.task.job
    if job == "regression":
        return {"answer": (found.output[:, 0].double() * use.answer[1] + use.answer[0]).numpy()}
    if job == "anomaly":
        normal, anomaly = use.classes
        return {"answer": np.where(found.trust[:, 0].double().numpy() >= use.threshold, normal, anomaly)}
    p = probabilities(found.output, use.temperature)
    return {"answer": [use.classes[one] for one in p.argmax(axis=1)], "probability": p.max(axis=1)}


def for_spreadsheets(frame: pd.DataFrame) -> pd.DataFrame:
    """The same table, in which no spreadsheet takes a text for a formula: names of classes come from data.

    A text that begins like a formula gets an apostrophe in front, as a spreadsheet itself marks text; a number stays.
    """
    shown = frame.copy()
    for column in shown.columns:
        if not pd.api.types.is_numeric_dtype(shown[column]):
            shown[column] = [_as_text(one) for one in shown[column]]
    return shown.rename(columns=_as_text)


def _as_text(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.lstrip(" ").startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def rights(system: Satipatthana, use: Use, found: pd.DataFrame, truth: pd.Series, name: str) -> np.ndarray:
    """Whether answers are right (n,).

    Raises:
        TaskError: the truth is missing somewhere, is no class of the system, or no number.
    """
    if system.params.task.job == "regression":
        values = features_of(truth.to_frame(), [str(truth.name)], name)[:, 0]
        close: np.ndarray = (
            np.abs(found["answer"].to_numpy() - values) <= system.params.reject.tolerance * use.answer[1]
        )
        return close
    if (missing := truth.isna().to_numpy()).any():
        raise TaskError(
            f"{name}: column {truth.name} has no value in row {int(missing.argmax())}; fill it or drop the row"
        )
    words = truth.astype(str)
    if pd.api.types.is_float_dtype(truth) and (truth % 1 == 0).all() and not set(words) <= set(use.classes):
        words = truth.astype("int64").astype(str)  # as pandas reads whole numbers once one was missing
    allowed = [*use.classes, *use.names]  # of the job anomaly also the classes of its data
    if odd := sorted(set(words) - set(allowed)):
        known = ", ".join(allowed[:10]) + (", ..." if len(allowed) > 10 else "")
        raise TaskError(f"{name}: column {truth.name} has {odd[0]}, which is none of the classes {known}")
    if system.params.task.job == "anomaly":
        anomaly = use.classes[1]
        strange = words.isin([anomaly, *system.params.task.anomalies])
        told: np.ndarray = ((found["answer"] == anomaly) == strange.to_numpy()).to_numpy()
        return told
    same: np.ndarray = found["answer"].to_numpy() == words.to_numpy()
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV or Parquet with the columns the system was trained on")
    parser.add_argument("--system", type=Path, default=Path("data/satipatthana/system"))
    parser.add_argument("--out", type=Path, help="a CSV file; default: standard output")
    parser.add_argument("--label", help="column with the right answers, to be compared with")
    asked = parser.parse_args()
    try:
        if asked.out and asked.out.is_dir():
            raise StageError(f"--out {asked.out}: is a folder; name a file")
        system, use = load(asked.system)
        columns = use.columns or [f"feature_{n}" for n in range(int(np.prod(system.shape)))]
        frame = read_table(asked.table, columns + ([asked.label] if asked.label else []))
        x = torch.tensor(features_of(frame, columns, str(asked.table)))
        if asked.label and asked.label not in frame:
            raise TaskError(f"{asked.table}: has no column {asked.label}, which --label names")
        x = standardized(x, use)
        if bool((odd := ~torch.isfinite(x).all(dim=1)).any()):
            row = int(odd.nonzero()[0])
            raise TaskError(f"{asked.table}: row {row} is too large for single precision; correct it or leave it out")
        found = answers(system, use, x.view(len(x), *system.shape))
        right = rights(system, use, found, frame[asked.label], str(asked.table)) if asked.label else None
        text = for_spreadsheets(found).to_csv(index=False)
        if asked.out:
            try:
                write_text(asked.out, text)
            except OSError as error:
                raise StageError(f"--out {asked.out}: cannot be written ({error.strerror}); name a file") from None
        else:
            print(text, end="")
        accepted = found["accepted"].to_numpy()
        said = f"{len(found)} rows, {accepted.sum()} accepted at trust {use.threshold:.4f}"
        if right is not None:
            share = right[accepted].mean() if accepted.any() else float("nan")
            said += f"; right: {100 * right.mean():.1f} % of all, {100 * share:.1f} % of the accepted"
        print(said, file=sys.stderr)
    except (ArtifactError, ParamsError, StageError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

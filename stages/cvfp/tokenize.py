"""Text to the ids that CVFP learns and is judged on, with the n-gram references.

dvc repro stages/cvfp/dvc.yaml:tokenize          (python -m stages.cvfp.tokenize)
"""

import math

from lego.base.artifacts import atomic_folder, write_json
from lego.base.experiments import require_tracked
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.base.sections import DataParams
from lego.cvfp.sections import OWN, PARAMS, load, root_data
from lego.cvfp.text import read_text_ids, write_text_ids
from lego.text.ngram import KneserNey, references
from lego.text.packing import write_splits
from lego.tokens.blocks import CorpusError


def of_this_pipeline(sentence: str) -> str:
    """A sentence that names keys of the root's file, with this pipeline's file where it has them itself."""
    sentence = sentence.replace("model.seq_len", "text.block_length")
    for key in ("text.block_length", *(f"data.{one}" for one in OWN)):
        sentence = sentence.replace(f"params.yaml: {key}", f"{PARAMS}: {key}")
    return sentence


def require_one_path(own: DataParams, root: DataParams) -> None:
    """DVC watches the path of this pipeline's file; whoever set the root's alone would train on other text, unawares.

    Raises:
        StageError: the two differ, and text is read from there.
    """
    if own.source == "text" and own.path != root.path:
        raise StageError(
            f"{PARAMS}: data.path is {own.path} and params.yaml: data.path is {root.path}; set both, "
            f"as in -S data.path={root.path} -S {PARAMS}:data.path={root.path}"
        )


def main() -> None:
    params = load()
    require_one_path(params.data, root_data())
    if params.data.source == "text":
        require_tracked(params.data.path, f"{PARAMS}: data.path")
    with Stage("cvfp/tokenize", params.seed) as stage, atomic_folder("data/cvfp/tokens") as folder:
        try:
            done = write_splits(params.data, params.text.block_length, None, folder)
        except CorpusError as error:
            raise CorpusError(of_this_pipeline(str(error))) from None
        counts = write_text_ids(folder, folder, done.encoder, params.text)
        text = read_text_ids(folder)
        ids = {split: one.numpy() for split, one in text.ids.items()}
        per_byte = {split: (len(ids[split]) - 1) / text.bytes_of(split) for split in ids}
        held_out = {split: ids[split] for split in ("validation", "test")}
        metrics = counts | references(ids["train"], held_out, text.vocab_size, per_byte)
        trigram = KneserNey(ids["train"], text.vocab_size, order=3).nll(ids["test"])
        metrics |= {"test_trigram_ppl": math.exp(trigram)}
        metrics |= {"test_trigram_bits_per_byte": text.bits_per_byte(trigram, "test")}
        metrics |= {f"{split}_sha256": one for split, one in text.digests().items()}
        write_json("metrics/cvfp/tokenize.json", metrics)
        stage.record |= {"counts": {"tokens": sum(len(one) for one in ids.values())}}


if __name__ == "__main__":
    exit_cleanly(main)

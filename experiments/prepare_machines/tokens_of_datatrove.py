"""What datatrove has tokenized already: its `.ds` files become the corpus that `slm prepare` gives.

    python tokens_of_datatrove.py IN OUT TOKENIZER      JSON lines in IN; OUT/corpus has the corpus

datatrove's tokenizer step writes a file a task, in the order of its reader; `slm import` takes
them in the order of their names. Where that is the order of the input, tokens, documents, bytes of
tokens and hence the fingerprint are those of `slm prepare heldout_ratio=0` on the text.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

import slm

EOS = "<|endoftext|>"


def main(given: str, out: str, tokenizer: str) -> None:
    folder, tasks = Path(out), len([*Path(given).glob("*.jsonl")])  # a file each
    step = DocumentTokenizer(
        str(folder / "tokens"),
        tokenizer_name_or_path=f"{tokenizer}/tokenizer.json",
        eos_token=EOS,
        shuffle_documents=False,
    )
    LocalPipelineExecutor(
        [JsonlReader(given, glob_pattern="*.jsonl"), step],
        tasks=tasks,
        workers=2,
        start_method="spawn",
        logging_dir=str(folder / "logs"),
    ).run()
    made = slm.import_corpus(
        "datatrove", folder / "tokens", folder / "corpus", tokenizer={"path": tokenizer}
    )
    print(made.fingerprint)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Token ids of a .jsonl by Hugging Face datasets and tokenizers: `bare_datasets.py TEXT TOKENIZER IDS PROCESSES`.

What a user of these libraries would write: `map` over batches in several processes, then one pass that writes uint16.
"""

import os
import sys
import tempfile

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import numpy as np
from tokenizers import Tokenizer


def main(source: str, tokenizer_path: str, output: str, processes: int) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_path)
    end = tokenizer.get_vocab()["<|endoftext|>"]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*found.ids, end] for found in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}

    with tempfile.TemporaryDirectory(dir=os.path.dirname(output)) as cache:
        given = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
        encoded = given.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
        with open(output, "wb") as file:
            for batch in encoded.with_format("arrow").iter(1000):
                batch["ids"].combine_chunks().values.to_numpy().astype(np.uint16).tofile(file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

"""Token ids of a .jsonl by one call of tokenizers a document: `bare_encode.py TEXT TOKENIZER IDS`."""

import json
import os
import sys

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer


def main(source: str, tokenizer_path: str, output: str) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_path)
    end = tokenizer.token_to_id("<|endoftext|>")
    with open(source, encoding="utf-8") as lines, open(output, "wb") as file:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            np.array([*ids, end], np.uint16).tofile(file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])

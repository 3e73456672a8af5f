"""What a stand-in for an annotator answers: a label by source, one in four off by one.

    python answer.py SOURCES answers.jsonl

The sources' texts differ in kind, so their labels are known; a real annotator is a language model
or a person. Lines are those of a batch API.
"""

import json
import random
import sys

import yaml

from slm.quality.annotate import choose

LABELS = {"math": 5, "gsm8k": 4, "aqua": 3, "planetmath": 2, "threads": 2}
LABELS |= {"wikitext": 1, "shakespeare": 0}


def main() -> None:
    _, sources, path = sys.argv
    rng = random.Random(0)
    with open(path, "w") as file:
        for document in choose(yaml.safe_load(sources), 300, 0):
            label = LABELS[document.source] + rng.choice([-1, 0, 0, 0, 0, 0, 0, 1])
            content = f"By its source.\nScore: {min(5, max(0, label))}"
            body = {"model": "stand-in", "choices": [{"message": {"content": content}}]}
            response = {"status_code": 200, "body": body}
            row = {"custom_id": document.id, "response": response, "error": None}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
